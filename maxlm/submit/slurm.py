"""Slurm: one run as a batch job, a sweep's runs as a job array.

One task is one process of the run: a task for each GPU, as JAX assumes under Slurm. A run that the time limit or
a preemption stops has saved by then (`--signal`) and is put back into the queue; one that crashed is started again
inside its allocation.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from maxlm.schema import require
from maxlm.submit.job import Job, check_kept
from maxlm.submit.shell import CONFIG_VARIABLE, RESTART, supervised, train
from maxlm.submit.topology import Topology

PLATFORMS = ("gpu", "cpu")
LAST_TASK_SECONDS = 120  # that the other tasks have once one has ended; they leave together within 30


@dataclass(frozen=True)
class Cluster:
    """What this cluster needs beside the job. `cpus` are a task's, `more` further sbatch options, `mounts` host paths
    that a container sees, `setup` lines of shell before the first start."""

    partition: str | None = None
    account: str | None = None
    time: str | None = None
    cpus: int | None = None
    more: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    image: str | None = None
    mounts: tuple[str, ...] = ()


def add_options(add: Callable[..., object]) -> None:
    """`add` is a parser's or a group's add_argument."""
    add("--partition")
    add("--account")
    add("--time", metavar="D-HH:MM", help="limit of a start; a run stopped by it goes on from its checkpoint")
    add("--cpus-per-task", type=int, metavar="N", help="of each process, which is each GPU (Slurm's default is 1)")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="a further option, such as --qos=high")
    add("--mount", action="append", default=[], metavar="PATH", help="a path that --image (pyxis) sees; repeatable")


def cluster(arguments: argparse.Namespace) -> Cluster:
    require(not arguments.mount or arguments.image, "--mount is for --image: without one a task sees all of its host")
    return Cluster(arguments.partition, arguments.account, arguments.time, arguments.cpus_per_task,
                   tuple(arguments.sbatch), tuple(arguments.setup), arguments.image, tuple(arguments.mount))


def single(job: Job, cluster: Cluster) -> str:
    """The batch script of one run. Its log is RUN_DIR.log."""
    _check_seen(job.run_dir, cluster)
    lines = [f"export {CONFIG_VARIABLE}={shlex.quote(job.config_json)}"]
    return _script(job.name, job.topology, cluster, job.retries, job.grace_seconds, f"{job.run_dir}.log", lines,
                   _srun(cluster, train(job.run_dir)), shlex.quote(job.run_dir))


def array(name: str, runs: Sequence[str], out: str, topology: Topology, cluster: Cluster, *, retries: int,
          grace_seconds: int, at_a_time: int | None) -> str:
    """The batch script of a job array over the runs of a sweep, `at_a_time` of them (None: as many as Slurm starts).

    Element I is run `runs[I]` of OUT: its config is OUT/configs/RUN.json, its log OUT/logs/RUN.log.
    """
    _check_seen(out, cluster)
    out = shlex.quote(out)
    command = f'exec maxlm train {out}/configs/"$run".json --run-dir {out}/runs/"$run"'
    limit = f"%{at_a_time}" if at_a_time else ""
    lines = [f"runs=({' '.join(map(shlex.quote, runs))})", "export run=${runs[$SLURM_ARRAY_TASK_ID]}",
             f'exec >> {out}/logs/"$run".log 2>&1']
    return _script(name, topology, cluster, retries, grace_seconds, "/dev/null", lines, _srun(cluster, command),
                   f'{out}/runs/"$run"', more=[f"--array=0-{len(runs) - 1}{limit}"])


def runs_of(script: str) -> list[str]:
    """The runs of a script that `array` made, in the order of its elements."""
    line = next(line for line in script.splitlines() if line.startswith("runs=("))
    return shlex.split(line.removeprefix("runs=(").removesuffix(")"))


def _check_seen(path: str, cluster: Cluster) -> None:
    if cluster.image:
        check_kept(path, cluster.mounts, "let the container see its folder with --mount PATH")


def _srun(cluster: Cluster, command: str) -> str:
    words = ["srun", f"--wait={LAST_TASK_SECONDS}", "--kill-on-bad-exit=0"]
    if cluster.cpus:  # Slurm 22.05 and later do not take it from sbatch
        words.append(f"--cpus-per-task={cluster.cpus}")
    if cluster.image:
        mounts = ",".join(f"{path}:{path}" for path in cluster.mounts)
        words += [f"--container-image={cluster.image}"] + ([f"--container-mounts={mounts}"] if mounts else [])
    return f"{shlex.join(words)} bash -c {shlex.quote(command)}"


def _script(name: str, topology: Topology, cluster: Cluster, retries: int, grace_seconds: int, log: str,
            lines: list[str], start: str, run_dir: str, more: Sequence[str] = ()) -> str:
    options = [f"--job-name={name}", f"--nodes={topology.hosts}", f"--ntasks-per-node={topology.chips_per_host}"]
    if topology.platform == "gpu":  # not --gpus-per-task, which hides from a task the GPU that JAX gives it by its rank
        options.append(f"--gpus-per-node={topology.chips_per_host}")
    options += [f"--{key}={value}" for key, value in (
        ("partition", cluster.partition), ("account", cluster.account), ("time", cluster.time),
        ("cpus-per-task", cluster.cpus)) if value]
    options += [*more, f"--output={log}", "--open-mode=append", "--requeue", f"--signal=TERM@{grace_seconds}",
                *cluster.more]
    header = "\n".join(f"#SBATCH {option}" for option in options)
    requeue = f'scontrol requeue "$SLURM_JOB_ID" && sleep 300; exit {RESTART}'  # it ends this script
    return "\n".join(["#!/bin/bash", header, "", *cluster.setup, *lines,
                      supervised(start, run_dir, retries, requeue)])
