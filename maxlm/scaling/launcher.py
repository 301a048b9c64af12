"""Runs the trials of a sweep as processes of `maxlm train`, and keeps an account of them.

A launcher takes the folder of a sweep and brings each trial to an end. This one starts N at a time on this machine's
devices; those of clusters are in remote.py. It keeps no state of its own: what a run directory says is what happened,
so after kill -9 the same command goes on. Its runs die with it (SIGTERM from the kernel: they save and stop) and hold
the folder's lock until they have stopped.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from maxlm.config.packing import on_one_device, packing_difference
from maxlm.scaling.cost import Device, devices_of
from maxlm.scaling.devices import visible
from maxlm.scaling.grid import Trial
from maxlm.scaling.sweep import SweepFolder
from maxlm.scaling.table import Table
from maxlm.schema import ConfigError

MISTAKE, UNSAFE, RESTART = 2, 3, 75  # exit codes of `maxlm train`; others are crashes
RETRIES, RESTARTS = 2, 20  # of a crash, and where the run itself asks to be started again
LOOK_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1

WAITING, QUEUED, RUNNING, DONE, FAILED, STOPPED = "waiting", "queued", "running", "done", "failed", "stopped"


@dataclass
class Job:
    """A trial's state, and why it failed; `starts` of this launcher. `mates` are trained by the same process."""

    trial: Trial
    state: str = WAITING
    reason: str = ""
    exit_code: int | None = None
    starts: int = 0
    crashes: int = 0
    process: subprocess.Popen | None = None
    devices: list[int] = field(default_factory=list)
    mates: list[Job] = field(default_factory=list)


class LocalLauncher:
    """`jobs` processes at a time on `count` devices of this machine; more processes than devices share them. Up to
    `packed` runs that differ in seed and learning rate alone are one process."""

    def __init__(self, device: Device, count: int, jobs: int | None, packed: int = 1):
        self.device, self.count, self.packed = device, count, packed
        self.where = f"{count} x {device.kind}"
        self.jobs = jobs or count
        if device.platform == "tpu" and self.jobs > 1:  # a process takes all of a host's chips
            self.jobs = 1

    @property
    def share(self) -> int:
        """Runs that use one device at a time."""
        return -(-self.jobs // self.count)

    def placed(self, trial: Trial) -> Trial:
        """`trial` as it is run; it sees itself whether its mesh fits."""
        return trial

    def render(self, folder: SweepFolder, trials: Sequence[Trial]) -> str:
        """What is submitted: nothing."""
        return ""

    def run(self, folder: SweepFolder) -> dict[str, Job]:
        jobs = {trial.name: Job(trial) for trial in folder.sweep.trials}
        for job in jobs.values():
            if folder.is_done(job.trial):
                job.state = DONE
        free = [number for number in range(self.count) for _ in range(self.share)]
        self._stopping = False
        handlers = {s: signal.signal(s, self._ask_to_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            with Table(folder, jobs) as table:
                while self._step(folder, jobs, free, table):
                    time.sleep(LOOK_SECONDS)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for job in jobs.values():
                if job.process is not None:
                    job.process.terminate()
        return jobs

    def _ask_to_stop(self, *_: object) -> None:
        self._stopping = True

    def _step(self, folder: SweepFolder, jobs: dict[str, Job], free: list[int], table: Table) -> bool:
        """Looks at what has ended and starts what can start. False where nothing is left to wait for."""
        for job in jobs.values():
            if job.process is not None and (code := job.process.poll()) is not None:
                job.process = None
                free += job.devices
                for ended in (job, *job.mates):
                    ended.exit_code = code
                    self._ended(folder, ended, folder.log(job.trial))
                    table.event(ended)
                folder.collect()
            elif job.process is not None and self._stopping and job.state == RUNNING:
                for stopped in (job, *job.mates):
                    stopped.state = STOPPED  # it saves first, and is waited for
                job.process.terminate()
        for job in jobs.values():
            if self._stopping:
                job.state = STOPPED if job.state == WAITING else job.state
            elif job.state == WAITING:
                self._start(folder, job, jobs, free, table)
        table.show()
        return any(job.process is not None or job.state == WAITING for job in jobs.values())

    def _start(self, folder: SweepFolder, job: Job, jobs: dict[str, Job], free: list[int], table: Table) -> None:
        trunk = jobs.get(job.trial.branch_of)
        if trunk is not None and trunk.state == FAILED:
            job.state, job.reason = FAILED, f"its trunk {trunk.trial.name} failed"
            return table.event(job)
        needed = min(devices_of(job.trial.config), self.count) if self.device.platform == "gpu" else 1
        running = sum(other.process is not None for other in jobs.values())
        distinct = sorted(set(free), key=lambda number: -free.count(number))
        if (trunk is not None and trunk.state != DONE) or running >= self.jobs or len(distinct) < needed:
            return None
        try:
            folder.begin_branch(job.trial)
        except ConfigError as error:
            job.state, job.reason = FAILED, str(error)
            return table.event(job)
        job.devices = distinct[:needed]
        for number in job.devices:
            free.remove(number)
        job.mates = self._mates(folder, job, jobs)
        job.process = self._spawn(folder, job)
        for started in (job, *job.mates):
            started.state, started.starts = RUNNING, started.starts + 1
            table.event(started)
        return None

    def _mates(self, folder: SweepFolder, job: Job, jobs: dict[str, Job]) -> list[Job]:
        """Other waiting trials that one program can train with `job`'s. Packs keep no checkpoints, so neither trunks
        nor branches are in one, nor what was begun alone."""
        trunks = {other.trial.branch_of for other in jobs.values()}
        config = job.trial.config

        def alone(one: Job) -> bool:
            begun = (folder.run_dir(one.trial) / "checkpoints").exists()
            return begun or one.trial.branch_of is not None or one.trial.name in trunks

        if self.packed == 1 or alone(job) or not on_one_device(config) or config.model.num_experts:
            return []
        fit = [other for other in jobs.values() if other is not job and other.state == WAITING and not alone(other)
               and not packing_difference(config, other.trial.config)]
        return fit[: self.packed - 1]

    def _spawn(self, folder: SweepFolder, job: Job) -> subprocess.Popen:
        words = ["train", str(folder.config_file(job.trial)), "--run-dir", str(folder.run_dir(job.trial))]
        if job.mates:
            files = [str(folder.config_file(one.trial)) for one in (job, *job.mates)]
            words = ["packed", *files, "--out", str(folder.run_dir(job.trial).parent)]
        environment = {**os.environ, **visible(self.device, job.devices, self.share)}
        with folder.log(job.trial).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "maxlm", *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=environment, pass_fds=(folder.lock,), start_new_session=True, preexec_fn=_die_with_parent,
            )

    def _ended(self, folder: SweepFolder, job: Job, log: Path) -> None:
        code = job.exit_code
        if folder.is_done(job.trial):
            job.state = DONE
        elif self._stopping:
            job.state = STOPPED
        elif code in (MISTAKE, UNSAFE):
            job.state, job.reason = FAILED, last_line(log)
        elif code in (0, RESTART):  # it was preempted, or asks for it
            job.state = WAITING if job.starts <= RESTARTS else FAILED
            job.reason = f"started {job.starts} times without an end: {last_line(log)}"
        else:
            job.crashes += 1
            job.state = WAITING if job.crashes <= RETRIES else FAILED
            job.reason = f"ended with exit code {code}, {job.crashes} times: {last_line(log)}"


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("maxlm: ") if lines else "it said nothing"


def _die_with_parent() -> None:
    """Linux sends the run SIGTERM when the launcher is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
