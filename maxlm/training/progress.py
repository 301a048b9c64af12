"""How a run shows itself: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Progress:
    """Context manager over `total` steps, `done` of them made by an earlier start. Writes to stderr.

    shown: of several processes one shows the bar.
    """

    def __init__(self, total: int, done: int, *, shown: bool = True):
        self.total, self.done, self.shown = total, done, shown
        self._bar = None

    def __enter__(self) -> Progress:
        if self.shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True),
            )
            self._task = self._bar.add_task("train", total=self.total, completed=self.done, figures="")
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """The step has finished; on a terminal the bar moves."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def figures(self, row: dict[str, Any], seconds_left: float) -> None:
        """Shows a logged row: as the bar's text, or as a line."""
        mfu = "" if row["mfu"] is None else f"  mfu {row['mfu']:.1%}"
        text = f"loss {row['loss']:.4f}  {row['tokens_per_second_per_chip']:,.0f} tok/s/chip{mfu}"
        if self._bar:
            self._bar.update(self._task, figures=text)
        else:
            minutes, seconds = divmod(int(seconds_left), 60)
            self.line(f"step {row['step']}/{self.total}  {text}  left {minutes}:{seconds:02d}")

    def line(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)
