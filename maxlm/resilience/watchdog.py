"""A thread that ends a run which stopped moving, so that whoever started it starts it again.

It looks at the run's clock (goodput.py): which phase is running, and when the run last gave a sign of life. When that
is too long ago it writes every thread's stack and what is known of the step to stderr and RUN_DIR/watchdog/, and ends
the process with exit code 75 (EX_TEMPFAIL), without the clearing up that may hang too.

A thread of Python needs the interpreter's lock (GIL). Where the main thread hangs while it holds that, C code from
faulthandler, set anew at every look for the phase of that look, writes the stacks to stderr and ends the process a
little later, with exit code 1.

What cannot be known: which collective a device is in. The report lists all of the program's, in order, and the last
step that finished.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from maxlm.config.resilience import WatchdogConfig
from maxlm.resilience.collectives import collectives
from maxlm.resilience.goodput import Goodput

FOLDER = "watchdog"
EXIT_CODE = 75
STEPPING = ("unfinished", "data_wait")  # phases of goodput.py in which a step is under way
RECENT = 64  # steps whose median counts
REPORT_SECONDS = 20.0  # for writing the report, on a file system that may hang as well
LAST_RESORT_SECONDS = 30.0  # after the bound, if Python itself cannot run


class Watchdog:
    """`with Watchdog(config, run_dir, goodput, process=i) as watchdog:` watches until it is left.

    The loop tells it of steps with `dispatched` and `finished`, and of the compiled step with `watch_program`.
    """

    def __init__(self, config: WatchdogConfig, run_dir: Path, goodput: Goodput, *, process: int):
        self._config, self._run_dir, self._goodput, self._process = config, run_dir, goodput, process
        self._hlo: Callable[[], str] | None = None
        self._axes: Mapping[str, int] = {}
        self._dispatched = self._finished = 0
        self._last: float | None = None
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._config.enabled:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._config.enabled:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def watch_program(self, hlo: Callable[[], str], axes: Mapping[str, int]) -> None:
        """The compiled step: a function that gives its HLO text, asked only for a report, and its mesh's axes."""
        self._hlo, self._axes = hlo, axes

    def dispatched(self, step: int) -> None:
        """The device was given `step`."""
        self._dispatched = step

    def finished(self, step: int) -> None:
        """The metrics of `step` are on the host."""
        now = time.monotonic()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last, self._finished = now, step

    def bound(self, phase: str) -> float:
        """Seconds without a sign of life that `phase` may take."""
        if phase not in STEPPING:
            return self._config.phase_seconds
        recent = list(self._seconds)
        median = statistics.median(recent) if recent else 0.0
        return max(self._config.step_seconds, self._config.step_factor * median)

    def _watch(self) -> None:
        while True:
            phase, alive = self._goodput.activity()
            bound, silent = self.bound(phase), time.monotonic() - alive
            if silent > bound:
                self._end(phase, silent, bound)
            pause = min(max(bound - silent, 0.02), bound / 20, 10.0)
            faulthandler.dump_traceback_later(bound - silent + pause + LAST_RESORT_SECONDS, exit=True, file=2)
            if self._left.wait(pause):
                return

    def _end(self, phase: str, silent: float, bound: float) -> None:
        report = threading.Thread(target=self._report, args=(phase, silent, bound), daemon=True)
        report.start()
        report.join(REPORT_SECONDS)
        os._exit(EXIT_CODE)

    def _report(self, phase: str, silent: float, bound: float) -> None:
        """Stacks first, to stderr; then the files; then what takes longest, the program's collectives."""
        doing = f"step {self._dispatched + 1} or its batch" if phase in STEPPING else phase
        what = (f"watchdog: process {self._process} on {socket.gethostname()} gave no sign of life for {silent:.1f} s "
                f"({doing}; bound {bound:.1f} s); last step finished {self._finished}, last given to the device "
                f"{self._dispatched}")
        with contextlib.suppress(OSError, ValueError):
            print(f"maxlm: {what}; exit code {EXIT_CODE}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=2, all_threads=True)
        name = f"{time.strftime('%Y%m%dT%H%M%S')}-{self._process}"
        folder = self._run_dir / FOLDER
        facts = {
            "time": time.time(), "process": self._process, "host": socket.gethostname(), "pid": os.getpid(),
            "phase": phase, "silent_seconds": silent, "bound_seconds": bound, "last_step_finished": self._finished,
            "last_step_dispatched": self._dispatched, "exit_code": EXIT_CODE, "stacks": f"{name}.txt",
        }
        folder.mkdir(exist_ok=True)
        with (folder / f"{name}.txt").open("w") as file:
            file.write(what + "\n\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
        _write(folder / f"{name}.json", facts)
        _write(folder / f"{name}.json", facts | {"collectives": self._collectives()})

    def _collectives(self) -> list[dict[str, Any]] | str:
        """Those of the program that was given to the device, or why they are not known."""
        if self._hlo is None:
            return "no step was compiled yet"
        try:
            return collectives(self._hlo(), self._axes)
        except Exception as error:
            return f"the compiler does not show the program: {str(error)[:200]}"


def _write(path: Path, facts: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(facts, indent=1) + "\n")
    os.replace(partial, path)
