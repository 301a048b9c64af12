"""Which host holds the others up, from what each host's own work costs a step.

In synchronous training every host sees the same step time, because each waits for the slowest in the step's first
collective. What differs is how long a host works before its devices can go on: waiting for data, copying it over,
dispatching, logging. That is what is compared: the time of a step less what the host waited for its device. A device
that is itself slow makes every host wait and cannot be told apart this way.

Every process keeps the last steps' times, and every so many steps a thread writes their medians to
RUN_DIR/hosts/PROCESS.json; the thread of process 0 reads them all. The steps themselves wait for none of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from maxlm.config.resilience import WatchdogConfig

FOLDER = "hosts"
LEAST_SHARE = 0.5  # of the step: a host that works less than this is hidden behind its device


class HostTimes:
    """One process's share of the report. `close` when the run ends; one process alone reports nothing.

    say: shows a line, on process 0.
    """

    def __init__(self, config: WatchdogConfig, run_dir: Path, *, process: int, processes: int,
                 say: Callable[[str], None]):
        self._config, self._folder, self._process, self._processes = config, run_dir / FOLDER, process, processes
        self._say, self._named = say, -1
        self._own: deque[float] = deque(maxlen=config.host_report_steps)
        self._whole: deque[float] = deque(maxlen=config.host_report_steps)
        self._mark: float | None = None
        self._waited = 0.0
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        if processes > 1:
            self._thread = threading.Thread(target=self._keep_reporting, name="host times", daemon=True)
            self._thread.start()

    @contextlib.contextmanager
    def device_wait(self) -> Iterator[None]:
        """Around waiting for the device."""
        begun = time.monotonic()
        yield
        self._waited += time.monotonic() - begun

    def finished(self, step: int) -> None:
        """A step is over on this host."""
        now = time.monotonic()
        if self._mark is not None:
            self._whole.append(now - self._mark)
            self._own.append(now - self._mark - self._waited)
        self._mark, self._waited = now, 0.0
        if self._thread and self._own and step % self._config.host_report_steps == 0:
            self._queue.put({
                "process": self._process, "host": socket.gethostname(), "pid": os.getpid(), "step": step,
                "time": time.time(), "own_seconds": statistics.median(self._own),
                "step_seconds": statistics.median(self._whole),
            })

    def close(self) -> None:
        if self._thread:
            self._queue.put(None)
            self._thread.join()

    def _keep_reporting(self) -> None:
        while (row := self._queue.get()) is not None:
            with contextlib.suppress(OSError):  # a full disk does not stop a run for the sake of its clock
                self._folder.mkdir(exist_ok=True)
                partial = self._folder / f"{self._process}.partial"
                partial.write_text(json.dumps(row) + "\n")
                os.replace(partial, self._folder / f"{self._process}.json")
            if self._process == 0:
                self._name(read_host_times(self._folder.parent)[: self._processes])

    def _name(self, rows: Sequence[dict[str, Any]]) -> None:
        """Says who is slowest, once for each."""
        slow = slowest(rows, self._config.straggler_ratio)
        if slow and slow["process"] != self._named:
            others = statistics.median(row["own_seconds"] for row in rows if row is not slow)
            self._say(f"straggler: host {slow['host']} (process {slow['process']}) works {slow['own_seconds']:.3f} s "
                      f"before its devices can go on, the median of the others is {others:.3f} s, a step "
                      f"{slow['step_seconds']:.3f} s")
        self._named = slow["process"] if slow else -1


def read_host_times(run_dir: Path) -> list[dict[str, Any]]:
    """The newest row of every process that wrote one, by process number; those that cannot be read are left out."""
    rows = []
    for path in (run_dir / FOLDER).glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            rows.append(json.loads(path.read_text()))
    return sorted(rows, key=lambda row: row["process"])


def slowest(rows: Sequence[dict[str, Any]], ratio: float) -> dict[str, Any] | None:
    """The row of the host whose own work is above `ratio` times the median of the others' and takes at least half of
    the step; None where there is none."""
    if len(rows) < 2:
        return None
    slow = max(rows, key=lambda row: row["own_seconds"])
    others = statistics.median(row["own_seconds"] for row in rows if row is not slow)
    held_up = slow["own_seconds"] >= LEAST_SHARE * slow["step_seconds"]
    return slow if held_up and slow["own_seconds"] > ratio * others else None
