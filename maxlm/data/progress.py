"""Progress of `maxlm data prepare`: a rich bar on a terminal, plain lines on stderr elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Phases one after another, each counted in its own unit. `show=False` prints nothing."""

    def __init__(self, show: bool = True):
        self._show = show
        self._bar: Any = None
        self._task: Any = None
        self._name, self._total, self._done = "", 0.0, 0.0
        self._began = self._printed = 0.0

    def __enter__(self) -> Progress:
        if self._show and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TaskProgressColumn(),
                progress.TimeElapsedColumn(), progress.TimeRemainingColumn(), console=Console(stderr=True),
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        if self._bar is not None:
            self._bar.stop()

    def phase(self, name: str, total: float) -> None:
        """Ends the phase before and begins one of `total` steps."""
        self._finish()
        self._name, self._total, self._done = name, total, 0.0
        self._began = self._printed = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=total)

    def advance(self, amount: float) -> None:
        self._done += amount
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif self._show and time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            print(f"{self._name}: {100 * self._done / max(self._total, 1e-9):.0f}%", file=sys.stderr, flush=True)

    def _finish(self) -> None:
        if not self._name or not self._show:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self._total)
        else:
            print(f"{self._name}: done in {time.monotonic() - self._began:.1f} s", file=sys.stderr, flush=True)
        self._name = ""
