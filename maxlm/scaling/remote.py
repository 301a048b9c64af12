"""Runs the trials of a sweep on a cluster: submits what is left, and says how what was submitted before stands.

It does not wait. What a run directory says is what happened, and the scheduler says what is still to come; so the same
command gathers results, submits again what failed, and submits branches once their trunk is done.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from maxlm.hardware import Chip
from maxlm.scaling.cost import Device
from maxlm.scaling.devices import devices_here
from maxlm.scaling.grid import Trial
from maxlm.scaling.launcher import DONE, FAILED, QUEUED, RUNNING, WAITING, Job, last_line
from maxlm.scaling.sweep import SweepFolder
from maxlm.scaling.table import Table
from maxlm.schema import ConfigError
from maxlm.submit import gke, job, slurm
from maxlm.submit.tool import call
from maxlm.submit.topology import Topology

SCRIPTS = "slurm"  # in the sweep's folder: each array as it was submitted, named as its job


class Remote(abc.ABC):
    """What the launchers of clusters share. `jobs` is how many runs are planned for at a time."""

    share = 1  # runs that use one device at a time

    def __init__(self, topology: Topology, retries: int, jobs: int):
        self.topology, self.retries, self.jobs = topology, retries, jobs
        self.device = _device(topology.chip, topology.platform)
        self.where = str(topology)

    def placed(self, trial: Trial) -> Trial:
        """`trial` on its devices. Raises ConfigError where its mesh does not fit them."""
        try:
            return dataclasses.replace(trial, config=job.check(trial.config, self.topology))
        except ConfigError as error:
            raise ConfigError(f"run {trial.name}: {error}") from None

    def run(self, folder: SweepFolder) -> dict[str, Job]:
        jobs = {trial.name: Job(trial) for trial in folder.sweep.trials}
        active = self.active(folder)
        with Table(folder, jobs) as table:
            for one in jobs.values():
                one.state = DONE if folder.is_done(one.trial) else active.get(one.trial.name, WAITING)
            ready = [one for one in jobs.values() if one.state == WAITING and _can_start(folder, one, jobs)]
            if ready:
                self.submit(folder, [one.trial for one in ready])
            for one in ready:
                one.state = QUEUED
            for one in jobs.values():
                table.event(one)
        return jobs

    @abc.abstractmethod
    def active(self, folder: SweepFolder) -> dict[str, str]:
        """The state of each run that the scheduler still has."""

    @abc.abstractmethod
    def render(self, folder: SweepFolder, trials: Sequence[Trial]) -> str:
        """What is submitted for these runs."""

    @abc.abstractmethod
    def submit(self, folder: SweepFolder, trials: Sequence[Trial]) -> None: ...


class SlurmLauncher(Remote):
    """One job array for all runs, `at_a_time` of them (None: as Slurm has room)."""

    def __init__(self, topology: Topology, retries: int, cluster: slurm.Cluster, at_a_time: int | None, runs: int):
        super().__init__(topology, retries, at_a_time or runs)
        self.cluster, self.at_a_time = cluster, at_a_time

    def active(self, folder: SweepFolder) -> dict[str, str]:
        found = {}
        said = call(["squeue", "--me", "--noheader", "--array", "--format=%j|%K|%T"])
        for name, element, state in (line.split("|") for line in said.splitlines()):
            script = folder.out / SCRIPTS / f"{name}.sh"
            if element.isdecimal() and script.exists():
                run = slurm.runs_of(script.read_text())[int(element)]
                found[run] = QUEUED if state == "PENDING" else RUNNING
        return found

    def render(self, folder: SweepFolder, trials: Sequence[Trial]) -> str:
        names = [trial.name for trial in trials]
        return slurm.array(
            _array_name(folder, names), names, str(folder.out.absolute()), self.topology, self.cluster,
            retries=self.retries, at_a_time=self.at_a_time,
            grace_seconds=max(job.grace_seconds(trial.config) for trial in trials))

    def submit(self, folder: SweepFolder, trials: Sequence[Trial]) -> None:
        script = self.render(folder, trials)
        file = folder.out / SCRIPTS / f"{_array_name(folder, [trial.name for trial in trials])}.sh"
        file.parent.mkdir(exist_ok=True)
        file.write_text(script)
        call(["sbatch"], script)


class GkeLauncher(Remote):
    """A JobSet for each run; Kueue's quota says how many at a time. OUT is on a volume that pods mount at this path."""

    def __init__(self, topology: Topology, retries: int, cluster: gke.Cluster, runs: int):
        super().__init__(topology, retries, runs)
        self.cluster = cluster

    def active(self, folder: SweepFolder) -> dict[str, str]:
        said = call(["kubectl", "get", "jobsets.jobset.x-k8s.io", *self._namespace(), "--output=json",
                     f"--selector={gke.SWEEP}={_key(folder)}"])
        runs = {self._name(folder, trial): trial for trial in folder.sweep.trials}
        found = {}
        for item in json.loads(said)["items"]:
            name = item["metadata"]["name"]
            if name not in runs:
                continue
            if item.get("status", {}).get("terminalState"):
                if not folder.is_done(runs[name]):  # its name is needed for the next one
                    call(["kubectl", "delete", "jobset", name, *self._namespace()])
                continue
            found[runs[name].name] = QUEUED if item["spec"].get("suspend") else RUNNING
        return found

    def render(self, folder: SweepFolder, trials: Sequence[Trial]) -> str:
        manifests = []
        for trial in trials:
            one = job.Job(self._name(folder, trial), folder.config(trial), str(folder.run_dir(trial).absolute()),
                          self.topology, retries=self.retries)
            manifests.append(gke.jobset(one, self.cluster, {gke.SWEEP: _key(folder)}))
        return gke.to_yaml(*manifests)

    def submit(self, folder: SweepFolder, trials: Sequence[Trial]) -> None:
        call(["kubectl", "create", "-f", "-"], self.render(folder, trials))

    def _name(self, folder: SweepFolder, trial: Trial) -> str:
        return job.job_name(trial.name, str(folder.run_dir(trial).absolute()))

    def _namespace(self) -> list[str]:
        return [f"--namespace={self.cluster.namespace}"] if self.cluster.namespace else []


def _can_start(folder: SweepFolder, one: Job, jobs: dict[str, Job]) -> bool:
    """Puts a branch's checkpoint where it begins. False, with the reason, where its trunk is not done."""
    trunk = jobs.get(one.trial.branch_of or "")
    if trunk is not None and trunk.state != DONE:
        one.reason = f"its trunk {trunk.trial.name} comes first"
        return False
    try:
        folder.begin_branch(one.trial)
    except ConfigError as error:
        one.state, one.reason = FAILED, str(error)
        return False
    if folder.log(one.trial).exists():
        one.reason = f"submitted again; before, it said: {_said(folder.log(one.trial))}"
    return True


def _said(log: Path) -> str:
    """The last of maxlm's own lines in a log that the scheduler writes to as well, or its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("maxlm: ")]
    return lines[-1].removeprefix("maxlm: ") if lines else last_line(log)


def _device(chip: Chip | None, platform: str) -> Device:
    if chip is None:
        return devices_here()[0]
    rate = chip.peak("bf16") or chip.peak("float32")
    return Device(chip.name, platform, chip.hbm_bytes // chip.devices_per_chip, rate / chip.devices_per_chip)


def _key(folder: SweepFolder) -> str:
    return hashlib.sha256(str(folder.out.absolute()).encode()).hexdigest()[:16]


def _array_name(folder: SweepFolder, names: Sequence[str]) -> str:
    return job.job_name(folder.out.name, "\n".join([_key(folder), *names]))
