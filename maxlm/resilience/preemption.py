"""SIGTERM and Ctrl-C as a request to stop after a step, on a step that all processes agree on."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from maxlm.schema import ConfigError

PREEMPTED_UNSAVED = 75  # EX_TEMPFAIL: the deadline passed with work unsaved; the same command makes it again

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _announce(name: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone: that is often why we were signalled
        print(f"\n{name}: saving after this step, then exiting; once more exits at once", file=sys.stderr, flush=True)


class StopRequest:
    """`with StopRequest() as stop:` turns the first SIGTERM or SIGINT into `stop.should_stop(step)`.

    A second signal ends the process at once with status 128 + signal (143, 130), even inside a long compile;
    what is saved is not harmed, because a checkpoint becomes visible only when complete. So does the deadline,
    `deadline_seconds` after the first signal, if the caller has not left by then (a step, an evaluation or a compile
    that takes longer, a disk that is too slow): with the status that `too_late`, called in another thread, returns. It
    may be set when there is something to lose.

    With several processes (jax.distributed initialised) JAX's preemption service agrees on when: a signal to any
    process makes `should_stop` true on all of them at one common later call, so all must make the same calls in the
    same order; which step each call is for does not matter to it.

    announce: called from another thread with the first signal's name. Enter and leave on the main thread.
    """

    def __init__(self, announce: Callable[[str], None] = _announce, *, deadline_seconds: float = math.inf) -> None:
        self._announce, self._deadline_seconds = announce, deadline_seconds
        self.too_late: Callable[[], int] = lambda: PREEMPTED_UNSAVED
        self._notify_jax: Callable[[int], None] | None = None  # with several processes
        self._calls = 0
        self._agreed = False
        self._stop = threading.Event()
        self._signalled_at = math.nan
        self._deadline: threading.Timer | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._previous_fd = -1
        self._listener: threading.Thread | None = None
        self.signal_name: str | None = None  # the first signal's name, once this process had one

    def __enter__(self) -> StopRequest:
        self._notify_jax = _jax_handler() if _several_processes() else None
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._pipe = (read, write)
        self._previous_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True)
        self._listener.start()
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, _only_wake)
        return self

    def __exit__(self, *_: object) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        for number, handler in self._previous.items():
            # None: a handler installed from C (JAX's), which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
        signal.set_wakeup_fd(self._previous_fd)
        if self._pipe is not None and self._listener is not None:
            read, write = self._pipe
            os.close(write)  # the listener reads the end of the pipe
            self._listener.join()
            os.close(read)
            self._pipe = self._listener = None

    def should_stop(self, step: int) -> bool:
        """Whether to save and leave after `step`. One process: reads a flag. Several: all get True at the same call."""
        if self._notify_jax is None:
            return self._stop.is_set()
        if self._agreed:
            return True
        from jax.experimental import multihost_utils

        self._calls += 1
        try:
            self._agreed = multihost_utils.reached_preemption_sync_point(self._calls)
        except RuntimeError as error:
            raise ConfigError(
                "JAX's preemption service is off, so a stop cannot be agreed on: unset jax_enable_preemption_service"
            ) from error
        if self._agreed:
            self._stop.set()  # from here on one signal, also the first to this process, ends it at once
        return self._agreed

    def seconds_since_signal(self) -> float | None:
        """Time since the first signal to this process; None where another process of the run had it."""
        return None if math.isnan(self._signalled_at) else time.monotonic() - self._signalled_at

    def _listen(self, read: int) -> None:
        """Reads each signal's number as it arrives: a Python handler would wait for a running compile to return."""
        while data := os.read(read, 1):
            number = data[0]
            if number not in _SIGNALS:
                continue
            if self._stop.is_set():
                os._exit(128 + number)
            self.signal_name, self._signalled_at = signal.Signals(number).name, time.monotonic()
            self._stop.set()
            self._announce(self.signal_name)
            if self._notify_jax is not None:
                self._notify_jax(signal.SIGTERM)
            if math.isfinite(self._deadline_seconds):
                self._deadline = threading.Timer(self._deadline_seconds, self._leave)
                self._deadline.daemon = True
                self._deadline.start()

    def _leave(self) -> None:
        code = PREEMPTED_UNSAVED
        try:
            code = self.too_late()
        finally:
            os._exit(code)


def _only_wake(number: int, frame: FrameType | None) -> None:
    """The listener thread has been woken through the wake-up descriptor; nothing is left to do here."""


def _jax_handler() -> Callable[[int], None]:
    """JAX's own SIGTERM handler, by which its preemption service tells the other processes. It is installed from C and
    only sets a flag; called like this it works while the signal itself is ours, which Python would not hear of."""
    action = ctypes.create_string_buffer(1024)  # a struct sigaction: the handler's address comes first
    if ctypes.CDLL(None).sigaction(int(signal.SIGTERM), None, action) != 0:
        raise OSError("sigaction failed")
    address = ctypes.c_void_p.from_buffer(action).value
    if address in (None, 1) or callable(signal.getsignal(signal.SIGTERM)):  # default, ignored, or Python's own
        raise ConfigError(
            "JAX's preemption service is off, so a stop cannot be agreed on: unset jax_enable_preemption_service"
        )
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(address)


def _several_processes() -> bool:
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1
