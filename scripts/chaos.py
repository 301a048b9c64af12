"""Kills, stops, cuts off and damages real runs, starts them again, and compares the parameters they end with.

    python3 scripts/chaos.py                                   200 faults, about 25 minutes on 2 cores
    python3 scripts/chaos.py --faults 20 --seed 7
    python3 scripts/chaos.py --seed 7 --only 3                 scenario 3 of seed 7 again, and its logs kept
    python3 scripts/chaos.py --markdown docs/CHAOS.md --json benchmarks/results/chaos_cpu.json
    python3 scripts/chaos.py --short                           the 15 scenarios of tests/chaos, one fault each

Exit code 1 where a check failed. What is checked: tests/chaos/scenario.py. What can go wrong: tests/chaos/faults.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout that is not installed

FAULTS_A_SCENARIO, STEPS, SHORT_STEPS = 5, 120, 40
QUICK_COMPILES = ("--xla_backend_optimization_level=1", "--xla_llvm_disable_expensive_passes=true")
ENVIRONMENT = {  # JAX and malloc read it as they start: one CPU device a process, compiled programs kept
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": " ".join((*QUICK_COMPILES, "--xla_force_host_platform_device_count=1")),
    "JAX_COMPILATION_CACHE_DIR": os.path.join(tempfile.gettempdir(), f"maxlm-chaos-{os.getuid()}"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "PYTHONWARNINGS": "ignore",
}


def main() -> int:
    arguments = _parser().parse_args()
    networked = prepare()
    work = Path(arguments.work or tempfile.mkdtemp(prefix="maxlm-chaos-"))
    work.mkdir(parents=True, exist_ok=True)
    failed = _run(arguments, work, networked)
    if failed or arguments.only is not None:
        print(f"logs: {work}", file=sys.stderr)
    elif not arguments.work:
        for disk in work.glob("*/disk"):  # each scenario's own tmpfs, where mounting is permitted
            subprocess.run(["umount", disk], capture_output=True)
        shutil.rmtree(work)
    return 1 if failed else 0


def prepare() -> bool:
    """Sets the environment of all processes and imports what they need; must come before JAX. Whether each process
    can have a host of its own: to that end it may start the program again."""
    os.environ.update(ENVIRONMENT)
    from tests.chaos.hosts import private

    networked = private()
    if not networked:
        print("chaos: no user namespaces here, so networks are not cut and disks are filled by a limit on files",
              file=sys.stderr)
    from tests.chaos.processes import preload

    preload()
    return networked


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=200, help=f"rounded up to scenarios of {FAULTS_A_SCENARIO}")
    parser.add_argument("--short", action="store_true", help="the scenarios of tests/chaos instead")
    parser.add_argument("--only", type=int, nargs="+", metavar="K", help="only these scenarios")
    parser.add_argument("--lanes", type=int, default=2, help="scenarios at a time (default: 2)")
    parser.add_argument("--work", type=Path, help="an empty folder to work in (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write every fault and what came of it")
    parser.add_argument("--markdown", type=Path, help="write the table")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE",
                        help="change the disturbed runs and not the undisturbed: the harness must complain")
    return parser


def _run(arguments: argparse.Namespace, work: Path, networked: bool) -> bool:
    """Whether any check failed."""
    from tests.chaos import faults, lanes, table
    from tests.chaos.setting import Setting

    clock = time.monotonic()
    steps = SHORT_STEPS if arguments.short else STEPS
    if arguments.short:
        plans = faults.short_plans(arguments.seed, steps, networked)
    else:
        count = math.ceil(arguments.faults / FAULTS_A_SCENARIO)
        indices = range(count) if arguments.only is None else arguments.only
        plans = [faults.plan(arguments.seed, index, FAULTS_A_SCENARIO, steps, networked) for index in indices]
    plans = [plan for plan in plans if arguments.only is None or plan.index in arguments.only]
    results = []
    with table.Display(sum(len(plan.faults) for plan in plans)) as display:
        for result in lanes.run_all(plans, Setting(work, steps), work, arguments.lanes, networked,
                                    tuple(arguments.changes)):
            results.append(result)
            display.add(result)
    record = table.record(results, seed=arguments.seed, steps_a_run=steps, lanes=arguments.lanes,
                          networks_cut=networked, wall_seconds=round(time.monotonic() - clock, 1))
    print(table.summary(record))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(table.document(record))
    return bool(table.problems(results))


if __name__ == "__main__":
    sys.exit(main())
