"""Where a training step's time goes on the device: kernels by total time, with the HLO each came from.

    python3 benchmarks/profile_step.py configs/llama3_2_1b.py --set train.global_batch_size=8 --hlo step.hlo
"""

from __future__ import annotations

import argparse
import collections
import glob
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

import jax
import jax.profiler

from maxlm.overrides import apply_overrides, load_config
from maxlm.parallel.mesh import make_mesh
from maxlm.training.benchmark import synthetic_batch
from maxlm.training.evaluate import local_rows, to_device
from maxlm.training.state import init_state
from maxlm.training.step import compile_step

STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--top", type=int, default=40)
    parser.add_argument("--hlo", help="write the optimised HLO here")
    arguments = parser.parse_args()
    config = apply_overrides(load_config(arguments.config), arguments.overrides)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        step = compile_step(config, mesh)
        if arguments.hlo:
            Path(arguments.hlo).write_text(step.as_text())
        state = init_state(config, mesh)
        rows = local_rows(mesh, config.train.global_batch_size)
        batch = to_device(synthetic_batch(config, 0, arguments.documents, rows), mesh)
        for _ in range(2):
            state, metrics = step(state, batch)
        jax.block_until_ready(state)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(STEPS):
                    state, metrics = step(state, batch)
                jax.block_until_ready(state)
            (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
            report(path, arguments.top)


def report(path: str, top: int) -> None:
    """Prints milliseconds a step, calls a step and name of the `top` kernels of the first device."""
    spent, calls = collections.Counter(), collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(path).planes:
        if not plane.name.startswith("/device:") or not plane.name.endswith(":0"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                name = f"{re.sub(r'[.0-9]+$', '', str(stats.get('hlo_op', '')))} | {event.name[:90]}"
                spent[name] += event.duration_ns / 1e6 / STEPS
                calls[name] += 1 / STEPS
    print(f"{sum(spent.values()):.1f} ms of kernels a step")
    for name, milliseconds in spent.most_common(top):
        print(f"{milliseconds:9.2f} ms {calls[name]:7.1f} x  {name}")


if __name__ == "__main__":
    main()
