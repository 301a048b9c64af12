"""What every scenario shares: prepared data, a config file, the undisturbed runs to compare with."""

from __future__ import annotations

import json
import os
from pathlib import Path

from maxlm.checkpoint import layout, tree_digest
from maxlm.training.loop import DONE_FILE
from maxlm.training.saved_run import CHECKPOINTS
from tests.chaos.hosts import Hosts
from tests.chaos.processes import Life, fork, wait
from tests.training.runs import arguments, prepared, timeless, write_config

EVERY, KEEP = 4, 3  # a run's checkpoints: one every EVERY steps, the newest KEEP of them stay
# Watchdogs of disturbed runs: seconds for a step, and for a restore, a compile or a save.
STEP_SECONDS, PHASE_SECONDS = 8, 30
EIGHT_BIT = ("precision.recipe=fp8", "optimizer.mu_dtype=float8", "optimizer.nu_dtype=float8")
MESH = {1: ("mesh.data=1", "mesh.fsdp=1"), 2: ("mesh.data=1", "mesh.fsdp=2"), 4: ("mesh.data=2", "mesh.fsdp=2")}


class Setting:
    """folder: where data, undisturbed runs and compiled programs are. steps: of each run."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps = folder, steps
        self.config = folder / "tiny.py"
        if not self.config.exists():
            code = wait(fork(lambda: self._prepare(), folder / "prepare.log"))
            assert code == 0, (folder / "prepare.log").read_text()

    def words(self, run: Path, processes: int, eight_bit: bool, *changes: str) -> list[str]:
        """The command of a run, without its place among the processes. eight_bit: see faults.Plan."""
        return arguments(
            self.config, run, f"train.num_steps={self.steps}", f"checkpoint.every_steps={EVERY}",
            f"checkpoint.keep_last={KEEP}", "eval.every_steps=0", "eval.num_batches=1", "logging.sample_prompt=",
            *MESH[processes], *(EIGHT_BIT if eight_bit else ()), *changes,
        )

    def watched(self, run: Path, processes: int, eight_bit: bool, *changes: str) -> list[str]:
        """The command of a run that will be disturbed: its programs are compiled, so it may be watched closely."""
        return self.words(run, processes, eight_bit, f"resilience.watchdog.step_seconds={STEP_SECONDS}",
                          "resilience.watchdog.step_factor=5",
                          f"resilience.watchdog.phase_seconds={PHASE_SECONDS}", *changes)

    def reference(self, processes: int, eight_bit: bool) -> dict:
        """{'digests': {step: digest}, 'rows': [...]} of the undisturbed run, made by `make_reference`."""
        content = json.loads(self._record(processes, eight_bit).read_text())
        return {"digests": {int(step): digest for step, digest in content["digests"].items()}, "rows": content["rows"]}

    def make_reference(self, processes: int, eight_bit: bool, hosts: Hosts) -> None:
        """Runs undisturbed, keeping every step, unless that was done before."""
        record = self._record(processes, eight_bit)
        if record.exists():
            return
        run = record.with_suffix("")
        words = self.words(run, processes, eight_bit, "checkpoint.every_steps=1", "checkpoint.keep_every=1")
        life = Life(words, processes, hosts, self.folder, processes)
        if not life.wait(600) or set(life.codes.values()) != {0} or not (run / DONE_FILE).exists():
            life.kill()
            raise RuntimeError(f"the undisturbed run of {processes} processes failed: see {life.logs[0]}")
        steps = layout.complete_steps(run / CHECKPOINTS)
        digests = digests_of([(run / CHECKPOINTS, step) for step in steps], self.folder)
        content = {"digests": dict(zip(steps, digests, strict=True)), "rows": timeless(run)}
        partial = record.with_suffix(".partial")
        partial.write_text(json.dumps(content))
        os.replace(partial, record)

    def _record(self, processes: int, eight_bit: bool) -> Path:
        return self.folder / f"undisturbed{processes}{'-8bit' if eight_bit else ''}-{self.steps}.json"

    def _prepare(self) -> int:
        data = prepared(self.folder / "data")
        write_config(self.config, data)
        return 0


def digests_of(checkpoints: list[tuple[Path, int]], folder: Path) -> list[str]:
    """Parameter digests of (folder of checkpoints, step), by another process; '' where one cannot be read."""
    answer = folder / f"digests-{os.getpid()}.json"

    def body() -> int:
        answer.write_text(json.dumps([_digest(*checkpoint) for checkpoint in checkpoints]))
        return 0

    code = wait(fork(body, folder / "digests.log"))
    assert code == 0, (folder / "digests.log").read_text()
    return json.loads(answer.read_text())


def _digest(directory: Path, step: int) -> str:
    try:
        return tree_digest(directory, step)
    except layout.CheckpointError as error:
        print(error, flush=True)
        return ""
