"""What the ledger and the check for silent corruption cost beside a step of a config.

    python benchmarks/step_guards.py configs/quickstart.py --json benchmarks/results/step_guards_cpu.json

Times, in turns so that a slow moment of the machine meets all of them: the whole step; the digest of a batch, which
is part of the step; the digest of parameters and optimizer state, made every `resilience.digest_every_steps`; the check
for silent corruption, made every `resilience.corruption_check_every_steps`; and, on the host, a line of the ledger and
a write of goodput.json. Takes about `--turns` times four steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402

from maxlm.overrides import apply_overrides, load_config  # noqa: E402
from maxlm.parallel.mesh import make_mesh  # noqa: E402
from maxlm.resilience import Goodput, Ledger  # noqa: E402
from maxlm.training.benchmark import synthetic_batch  # noqa: E402
from maxlm.training.corruption import CorruptionCheck  # noqa: E402
from maxlm.training.digest import tree_digest  # noqa: E402
from maxlm.training.evaluate import local_rows, to_device  # noqa: E402
from maxlm.training.state import init_state  # noqa: E402
from maxlm.training.step import compile_step  # noqa: E402
from maxlm.training.step_ledger import StateDigests  # noqa: E402


def on_device(config: Any, turns: int) -> dict[str, list[float]]:
    """Seconds of each device-side part, in turns."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        state, step = init_state(config, mesh), compile_step(config, mesh)
        rows = local_rows(mesh, config.train.global_batch_size)
        batch = to_device(synthetic_batch(config, 0, 1, rows), mesh)
        batch_digest, state_digests, check = jax.jit(tree_digest), StateDigests(mesh), CorruptionCheck(config, mesh)
        seconds: dict[str, list[float]] = {name: [] for name in ("step", "batch_digest", "state_digest", "check")}
        for turn in range(turns + 1):
            clock = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            took = {"step": time.perf_counter() - clock}
            parts = {"batch_digest": lambda: batch_digest(batch), "state_digest": lambda now=state: state_digests(now),
                     "check": lambda now=state, turn=turn: check.check(turn, now, batch)}
            for name, part in parts.items():
                clock = time.perf_counter()
                jax.block_until_ready(part())
                took[name] = time.perf_counter() - clock
            if turn:  # the first one compiles
                for name, value in took.items():
                    seconds[name].append(value)
    return seconds


def on_host(folder: Path) -> dict[str, list[float]]:
    """Seconds that a line of the ledger and a write of goodput.json take the thread that asks for them."""
    ledger, goodput = Ledger(folder), Goodput(folder)
    ledger.start(0, "0" * 16, {})
    goodput.begin(0)
    line = {"batch": "0" * 16, "loss": (1.1).hex(), "grad_norm": (0.3).hex()}
    seconds = {"ledger_line": timed(lambda step: ledger.step(step, index=step, **line), 2000),
               "goodput_write": timed(lambda _: goodput.end(), 50)}
    ledger.close()
    return seconds


def timed(call: Callable[[int], Any], times: int) -> list[float]:
    found = []
    for number in range(times):
        clock = time.perf_counter()
        call(number)
        found.append(time.perf_counter() - clock)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = apply_overrides(load_config(args.config), args.overrides)
    seconds = on_device(config, args.turns)
    with tempfile.TemporaryDirectory() as folder:
        seconds |= on_host(Path(folder))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    record = {
        "benchmark": "step_guards",
        "recipe": Path(args.config).stem,
        "seconds": {name: {"median": median[name], "min": min(values), "max": max(values)}
                    for name, values in seconds.items()},
        "share_of_a_step": {name: median[name] / median["step"] for name in median if name != "step"},
        "devices": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "load": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    print(json.dumps(record))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
