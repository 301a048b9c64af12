"""Where a run's wall time went, over all its starts, kept in RUN_DIR/goodput.json.

At every moment exactly one category is running, so the categories add up to the wall time by construction:
    productive  steps made for the first time         redone      steps made again after a restart or a rollback
    data_wait   waiting for the next batch            save        the part of a save that holds up the steps
    evaluation  held-out evaluation                   restore     reading a checkpoint
    compile     compiling the step                    startup     from the start of the process to the first step
    check       looking for silent corruption
    unfinished  steps that were cut short by a kill, a failure or a hang, or are being made
    idle        between the last sign of life of one process and the start of the next
    other       everything else: figures, samples, clearing up
A thread writes the file every few seconds, so a killed process loses at most that much, which counts as idle.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

FILE = "goodput.json"
FORMAT = 1
CATEGORIES = ("productive", "redone", "data_wait", "save", "evaluation", "restore", "compile", "startup", "check",
              "unfinished", "idle", "other")
SAVE_SECONDS = 2.0
T = TypeVar("T")


def process_started() -> float:
    """When this process started, in seconds since 1970; where the system does not say (not Linux), now."""
    return started_of(os.getpid()) or time.time()


def started_of(pid: int) -> float | None:
    """When process `pid` of this host started, in seconds since 1970; None where there is none (a zombie is none) or
    the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return None
    return None if fields[0] in "ZX" else time.time() - max(age, 0.0)


class Goodput:
    """The clock of one start of a run. `startup` runs from `started` (seconds since 1970; None: now) on.

    Until `begin` it only counts. Use it from one thread, but for `activity`.
    """

    def __init__(self, run_dir: Path, *, started: float | None = None):
        self._path = Path(run_dir) / FILE
        now = time.time()
        self._started = now if started is None else min(started, now)
        self._mark = time.monotonic() - (now - self._started)
        self._phases = ["startup"]
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._before: dict[str, Any] | None = None
        self._highest = 0
        self._alive = time.monotonic()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, highest_step: int, *, writes: bool = True) -> None:
        """There is work to do: takes in what earlier starts wrote and, where this is the process that `writes`, starts
        writing. Steps up to `highest_step` have been made before."""
        self._highest = highest_step
        if not writes:
            return
        self._before = _read(self._path)
        if self._before:
            self._seconds["idle"] = max(0.0, self._started - self._before["updated"])
        self._thread = threading.Thread(target=self._keep_saving, name="goodput", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def phase(self, category: str) -> Iterator[None]:
        """Time inside counts as `category`, except for phases inside it."""
        assert category in CATEGORIES
        with self._lock:
            self._alive = self._count()
            self._phases.append(category)
        try:
            yield
        finally:
            with self._lock:
                self._alive = self._count()
                self._phases.pop()

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Time inside counts as `unfinished` until `step_done` says whose it was; after it, as `other`."""
        with self.phase("unfinished"):
            yield
        with self._lock:
            self._phases[0] = "other"
            self._seconds["other"] += self._seconds["unfinished"]
            self._seconds["unfinished"] = 0.0

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """`batches`, with the time that getting each takes as `data_wait`."""
        iterator = iter(batches)
        while True:
            with self.phase("data_wait"):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch

    def step_done(self, step: int) -> None:
        """`step` is finished: what was `unfinished` in this process was spent on it."""
        with self._lock:
            self._alive = self._count()
            self._seconds["redone" if step <= self._highest else "productive"] += self._seconds["unfinished"]
            self._seconds["unfinished"] = 0.0
            self._highest = max(self._highest, step)

    def sign_of_life(self) -> None:
        """A long phase moves on."""
        with self._lock:
            self._alive = time.monotonic()

    def activity(self) -> tuple[str, float]:
        """The category that is running, and when (time.monotonic) the run last gave a sign of life: a phase that began
        or ended, a step that was done. May be called from any thread."""
        with self._lock:
            return self._phases[-1], self._alive

    def end(self) -> None:
        """Counts up to now and writes for the last time. May be called again later."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        self._save()

    def totals(self) -> dict[str, Any]:
        """What goodput.json says: seconds and share of each category over all starts, and how many starts there were.

        `unaccounted_seconds` is the wall time since the first start less the sum of the categories.
        """
        with self._lock:
            self._count()
            now, seconds = time.time(), dict(self._seconds)
            highest = self._highest
        before = self._before or {"seconds": {}, "starts": 0, "since": self._started}
        seconds = {name: value + before["seconds"].get(name, 0.0) for name, value in seconds.items()}
        total = sum(seconds.values())
        return {
            "format": FORMAT,
            "goodput": seconds["productive"] / total if total else 0.0,
            "wall_seconds": total,
            "unaccounted_seconds": now - before["since"] - total,
            "seconds": seconds,
            "share": {name: value / total if total else 0.0 for name, value in seconds.items()},
            "starts": before["starts"] + 1,
            "since": before["since"],
            "updated": now,
            "step": highest,
            "process": {"pid": os.getpid(), "host": socket.gethostname(), "started": self._started,
                        "ended": self._ended.is_set()},
        }

    def _count(self) -> float:
        now = time.monotonic()
        self._seconds[self._phases[-1]] += now - self._mark
        self._mark = now
        return now

    def _keep_saving(self) -> None:
        while not self._ended.wait(SAVE_SECONDS):
            self._save()

    def _save(self) -> None:
        """Atomically. A full disk does not stop a run for the sake of its clock: the next save tries again."""
        partial = self._path.with_suffix(".partial")
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps(self.totals(), indent=1) + "\n")
            os.replace(partial, self._path)


def read_goodput(run_dir: Path) -> dict[str, Any] | None:
    """What RUN_DIR/goodput.json says, or None where there is none or it cannot be read."""
    try:
        found = json.loads((Path(run_dir) / FILE).read_text())
        ours = found["format"] == FORMAT and set(found["seconds"]) <= set(CATEGORIES)
        return found if ours and found["since"] <= found["updated"] and found["starts"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(path: Path) -> dict[str, Any] | None:
    """The record of earlier starts; one that cannot be read is set aside and said to be."""
    found = read_goodput(path.parent)
    if found is None and path.exists():
        aside = path.with_suffix(".damaged.json")
        with contextlib.suppress(OSError):
            os.replace(path, aside)
        print(f"{path.name} cannot be read: set aside as {aside.name}; wall time is counted anew", file=sys.stderr,
              flush=True)
    return found
