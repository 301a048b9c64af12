"""The `sweep` verb: its options, the plan, and running it. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from maxlm.schema import require
from maxlm.submit import gke, job, slurm

if TYPE_CHECKING:
    from maxlm.scaling.cost import Cost
    from maxlm.scaling.grid import Sweep
    from maxlm.scaling.launcher import LocalLauncher
    from maxlm.scaling.remote import Remote

LAUNCHERS = ("local", "slurm", "gke")
CLUSTERS = ("topology", "image", "setup", "retries")  # options of slurm and gke, of slurm, of gke
SLURM = ("partition", "account", "time", "cpus_per_task", "sbatch", "mount")
GKE = ("queue", "priority", "namespace", "claim", "node_selector")
NOT_FOR = {"local": (*CLUSTERS, *SLURM, *GKE), "slurm": GKE, "gke": (*SLURM, "jobs")}
MISTAKE, UNSAFE = 2, 3


def add_options(sweep: argparse.ArgumentParser) -> None:
    sweep.add_argument("sweep", metavar="SWEEP", help="a file with sweep() -> Sweep: configs/sweeps/*.py")
    sweep.add_argument("--out", required=True, type=Path, help="folder for the runs, runs.jsonl and curves.jsonl")
    sweep.add_argument("--dry-run", action="store_true", help="print every run and what it costs, and start none")
    sweep.add_argument("--launcher", choices=LAUNCHERS, default="local", help="where the runs run (default: local)")
    sweep.add_argument("--jobs", type=int, metavar="N",
                       help="runs at a time (default: one a device; slurm: as there is room; gke: Kueue's quota)")
    sweep.add_argument("--packed", type=int, metavar="N", default=1,
                       help="up to N runs that differ in seed and learning rate alone are one program (default: 1)")
    sweep.add_argument("--chip", help="with --dry-run: plan for this chip, such as 'NVIDIA H200'")
    job.add_place_options(sweep.add_argument_group("slurm and gke", "OUT is where this machine and the cluster see the "
                                                   "same storage").add_argument)
    slurm.add_options(sweep.add_argument_group("slurm", "One job array; docs/SUBMIT.md").add_argument)
    gke.add_options(sweep.add_argument_group("gke", "A JobSet for each run; docs/SUBMIT.md").add_argument)


def sweep(arguments: argparse.Namespace) -> int:
    """Raises ConfigError for a user's mistake, before anything is spent. Returns the exit code."""
    from maxlm.scaling.cost import cost, too_large
    from maxlm.scaling.grid import load_sweep
    from maxlm.scaling.sweep import SweepFolder, check_branches

    _check(arguments)
    planned = load_sweep(arguments.sweep)
    check_branches(planned)
    folder = SweepFolder(arguments.out, planned)
    with contextlib.nullcontext() if arguments.dry_run else folder:  # runs of a killed start have left the devices then
        launcher = _launcher(arguments, len(planned.trials))
        costs = {trial.name: cost(launcher.placed(trial), planned, launcher.device) for trial in planned.trials}
        folder.check()
        if arguments.dry_run:
            print(plan(planned, costs, launcher.jobs, launcher.where, folder))
        refused = too_large(costs, launcher.device, launcher.share * arguments.packed)
        more = f" (and {len(refused) - 5} more)" if len(refused) > 5 else ""
        require(not refused, f"{'; '.join(refused[:5])}{more}: lower train.global_batch_size, raise "
                             "train.grad_accumulation, set remat.policy, or lower --jobs or --packed")
        if arguments.dry_run:
            left = [trial for trial in planned.trials if not folder.is_done(trial)]
            print(launcher.render(folder, left) if left else "", end="")
            return 0
        for path, words in folder.corpora().items():
            print(f"preparing {path.name}", file=sys.stderr, flush=True)
            _prepare(words)
        folder.write_configs()
        jobs = launcher.run(folder)
        rows = folder.collect()
    return _verdict(jobs, rows, arguments.out)


def _check(arguments: argparse.Namespace) -> None:
    require(arguments.jobs is None or arguments.jobs > 0, f"--jobs {arguments.jobs} must be 1 or more")
    require(arguments.packed > 0, f"--packed {arguments.packed} must be 1 or more")
    require(arguments.chip is None or arguments.dry_run, "--chip is for --dry-run: runs use the devices that are here")
    for name in NOT_FOR[arguments.launcher]:
        require(getattr(arguments, name) in (None, [], job.RETRIES),
                f"--{name.replace('_', '-')} is not for --launcher {arguments.launcher}: leave it out")
    if arguments.launcher != "local":
        require(arguments.chip is None, f"--chip is for --launcher local: --topology names {arguments.launcher}'s chip")
        require(arguments.packed == 1, f"--packed is for --launcher local: {arguments.launcher} starts each run alone")


def _launcher(arguments: argparse.Namespace, runs: int) -> LocalLauncher | Remote:
    from maxlm.scaling.devices import device_called, devices_here
    from maxlm.scaling.launcher import LocalLauncher
    from maxlm.scaling.remote import GkeLauncher, SlurmLauncher

    if arguments.launcher == "slurm":
        topology = job.topology_of(arguments, slurm.PLATFORMS)
        return SlurmLauncher(topology, arguments.retries, slurm.cluster(arguments), arguments.jobs, runs)
    if arguments.launcher == "gke":
        topology = job.topology_of(arguments, gke.PLATFORMS)
        cluster = gke.cluster(arguments)
        gke.check_claimed(str(arguments.out.absolute()), cluster)
        return GkeLauncher(topology, arguments.retries, cluster, runs)
    device, count = (device_called(arguments.chip), 1) if arguments.chip else devices_here()
    return LocalLauncher(device, count, arguments.jobs, arguments.packed)


def plan(planned: Sweep, costs: dict[str, Cost], jobs: int, where: str, folder) -> str:
    """The table of `--dry-run`."""
    from maxlm.scaling.cost import wall_seconds

    lines = [f"{'run':40} {'params':>10} {'tokens':>10} {'FLOPs':>10} {'steps':>8} {'time':>9} {'memory':>10}"]
    for trial in planned.trials:
        row = costs[trial.name]
        done = "  done" if folder.is_done(trial) else f"  after {trial.branch_of}" if trial.branch_of else ""
        lines.append(
            f"{trial.name:40} {row.params:>10.4g} {row.tokens:>10.4g} {row.flops_spent:>10.3e} "
            f"{trial.config.train.num_steps - trial.from_step:>8} {_time(row.seconds):>9} "
            f"{row.memory_bytes / 2**30:>6.2g} GiB{done}")
    total = sum(row.flops_spent for row in costs.values())
    lines.append(f"{len(costs)} runs, {total:.3e} FLOPs, about {_time(wall_seconds(costs, planned, jobs))} with "
                 f"{jobs} at a time on {where}. Time and memory are estimates; FLOPs are what each run adds.")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _prepare(words: list[str]) -> None:
    child = subprocess.run([sys.executable, "-m", "maxlm", *words], stdout=sys.stderr)
    require(child.returncode == 0, "the corpus of data.source could not be prepared: see above")


def _verdict(jobs: dict, rows: int, out: Path) -> int:
    failed = [job for job in jobs.values() if job.state == "failed"]
    counts = {state: sum(job.state == state for job in jobs.values())
              for state in ("running", "queued", "waiting", "stopped")}
    left = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    print(f"{rows} results in {out / 'runs.jsonl'}" + (f"; {left}: the same command goes on" if left else ""))
    trunks = {job.trial.branch_of for job in jobs.values()}
    lost = sum(job.state == "done" and name not in trunks for name, job in jobs.items()) - rows
    if lost:
        print(f"maxlm: {lost} finished runs have no held-out loss: prepare data with --heldout-fraction, and give "
              "another --out", file=sys.stderr)
    if not failed:
        return MISTAKE if lost else 0
    first = failed[0]
    print(f"maxlm: {len(failed)} of {len(jobs)} runs failed, first {first.trial.name}: {first.reason} (its log: "
          f"{out / 'logs' / first.trial.name}.log)", file=sys.stderr)
    return MISTAKE if all(job.exit_code == MISTAKE for job in failed) else UNSAFE
