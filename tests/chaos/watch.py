"""What the harness sees of a run from outside, without asking it: how far it is, whether it is saving."""

from __future__ import annotations

import json
import re
from pathlib import Path

from maxlm.checkpoint import layout
from maxlm.training.loop import DONE_FILE
from maxlm.training.metrics import FILE
from maxlm.training.saved_run import CHECKPOINTS
from tests.chaos.processes import Life


class Watch:
    """One life of the run in `run_dir`."""

    def __init__(self, run_dir: Path, life: Life):
        self.run_dir, self.life = run_dir, life
        self._rows = run_dir / FILE
        self._old = self._inode()

    def training(self) -> bool:
        """Whether this life has begun to train: it then replaces the rows file, once."""
        return self._inode() not in (0, self._old)

    def step(self) -> int:
        """The newest step that this life logged (or the one it resumed from); 0 before it trains."""
        if not self.training():
            return 0
        with self._rows.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 2000))
            lines = file.read().split(b"\n")[1:-1]
        return max((json.loads(line)["step"] for line in lines[-2:]), default=0)

    def saving(self) -> bool:
        return any((self.run_dir / CHECKPOINTS).glob(f"*{layout.IN_PROGRESS_SUFFIX}"))

    def restoring(self) -> bool:
        """Whether this life has got to its checkpoints: it says which attention it uses just before."""
        return "attention:" in self.life.log()

    def resumed_from(self) -> int | None:
        """The step this life went on from, 0 where it began anew; None as long as it has not got there."""
        found = re.findall(r"^resumed from step (\d+)", self.life.log(), re.MULTILINE)
        return int(found[-1]) if found else 0 if self.training() else None

    def done(self) -> bool:
        return (self.run_dir / DONE_FILE).exists()

    def _inode(self) -> int:
        try:
            return self._rows.stat().st_ino
        except FileNotFoundError:
            return 0
