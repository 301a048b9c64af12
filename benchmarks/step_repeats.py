"""Does a training step make the same bits each time it starts from the same state?

    python3 benchmarks/step_repeats.py configs/olmoe_1b_7b.py --set compute.deterministic=true --repeats 20 --json OUT

Makes a first step, then the next one again and again, each from a copy of the same state, and compares the digests of
parameters, optimizer state and metrics. On GPUs few steps are expected to without `compute.deterministic`
(docs/RESILIENCE.md). The copy has to fit beside the step. Exits 1 where digests differ.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from maxlm.config import RunConfig  # noqa: E402
from maxlm.overrides import apply_overrides, load_config  # noqa: E402
from maxlm.parallel.mesh import make_mesh  # noqa: E402
from maxlm.planning.compiled import versions  # noqa: E402
from maxlm.schema import to_dict  # noqa: E402
from maxlm.training.benchmark import commit, synthetic_batch  # noqa: E402
from maxlm.training.digest import hex_digest, tree_digest  # noqa: E402
from maxlm.training.evaluate import local_rows, to_device  # noqa: E402
from maxlm.training.state import init_state  # noqa: E402
from maxlm.training.step import compile_step  # noqa: E402


def repeated(config: RunConfig, repeats: int) -> dict[str, int]:
    """How often each digest came."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        step, state = compile_step(config, mesh), init_state(config, mesh)
        batch = to_device(synthetic_batch(config, 0, 1, local_rows(mesh, config.train.global_batch_size)), mesh)
        copy, digest = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree)), jax.jit(tree_digest)
        state, _ = step(state, batch)
        found = collections.Counter()
        for _ in range(repeats):
            found[hex_digest(digest(step(copy(state), batch)))] += 1
        return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="append the record to the list in this file")
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error("--repeats: two steps at least, to be compared")
    config = apply_overrides(load_config(arguments.config), arguments.overrides)
    found = repeated(config, arguments.repeats)
    print(f"{Path(arguments.config).stem} {' '.join(arguments.overrides)}: {arguments.repeats} steps from one state, "
          f"results that came {', '.join(map(str, sorted(found.values(), reverse=True)))} times", flush=True)
    if arguments.json:
        record = {"benchmark": "step_repeats", "recipe": Path(arguments.config).stem, "commit": commit(),
                  "device_kind": jax.devices()[0].device_kind, "date": time.strftime("%Y-%m-%d"),
                  "versions": versions(), "repeats": arguments.repeats, "digests": found,
                  "config": to_dict(config)}
        before = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
        arguments.json.write_text(json.dumps([*before, record], indent=1) + "\n")
    sys.exit(len(found) > 1)


if __name__ == "__main__":
    main()
