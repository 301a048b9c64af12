"""How a sweep shows itself: one live table on a terminal, a line for each event anywhere else."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from maxlm.scaling.sweep import SweepFolder, metrics

if TYPE_CHECKING:
    from maxlm.scaling.launcher import Job

SECONDS = 1.0  # between looks at what runs have written
MOST_ROWS = 30


class Table:
    """Context manager over the jobs of a launcher. Writes to stderr."""

    def __init__(self, folder: SweepFolder, jobs: dict[str, Job]):
        self.folder, self.jobs = folder, jobs
        self._live: Any = None
        self._shown = 0.0

    def __enter__(self) -> Table:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def event(self, job: Job) -> None:
        """A job was started or has ended: a line, where there is no live table."""
        if self._live:
            return
        done = sum(other.state == "done" for other in self.jobs.values())
        said = f": {job.reason}" if job.reason and job.state in ("failed", "waiting", "queued") else ""
        again = f" (start {job.starts})" if job.starts > 1 and job.state == "running" else ""
        loss = self._progress(job)[2] if job.state == "done" else ""
        print(f"[{done}/{len(self.jobs)}] {job.trial.name} {job.state}{again}{f', loss {loss}' if loss else ''}{said}",
              file=sys.stderr, flush=True)

    def show(self) -> None:
        """Draws the live table again, now and then."""
        if self._live and time.monotonic() - self._shown > SECONDS:
            self._shown = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Any:
        from rich.table import Table as Drawn

        drawn = Drawn("run", "state", "step", "tokens", "loss", "note")
        order = {"running": 0, "failed": 1, "queued": 2, "waiting": 3, "stopped": 4, "done": 5}
        jobs = sorted(self.jobs.values(), key=lambda job: order[job.state])
        for job in jobs[:MOST_ROWS]:
            drawn.add_row(job.trial.name, job.state, *self._progress(job), job.reason if job.state == "failed" else "")
        counts = {state: sum(job.state == state for job in jobs) for state in order}
        drawn.caption = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        return drawn

    def _progress(self, job: Job) -> tuple[str, str, str]:
        rows = metrics(self.folder.run_dir(job.trial))
        if not rows:
            return f"0 of {job.trial.config.train.num_steps}", "", ""
        losses = [row.get("eval_loss", row.get("loss")) for row in rows]
        loss = next((value for value in reversed(losses) if value is not None), None)
        return (f"{rows[-1]['step']} of {job.trial.config.train.num_steps}", f"{rows[-1]['tokens']:.3g}",
                "" if loss is None else f"{loss:.4f}")
