"""SIGTERM and Ctrl-C as a request to stop after a step, on a step that all processes agree on."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from maxlm.schema import ConfigError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _announce(name: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone: that is often why we were signalled
        print(f"\n{name}: saving after this step, then exiting; once more exits at once", file=sys.stderr, flush=True)


class StopRequest:
    """`with StopRequest() as stop:` turns the first SIGTERM or SIGINT into `stop.should_stop(step)`.

    A second signal ends the process at once with status 128 + signal (143, 130), even inside a long compile;
    what is saved is not harmed, because a checkpoint becomes visible only when complete.

    With several processes (jax.distributed initialised) JAX's preemption service agrees on the step: a SIGTERM to
    any process makes `should_stop` true on all of them at one common later step, so every process must call it at
    every step. There SIGTERM stays with JAX until that step, and SIGINT is passed on to it as SIGTERM.

    announce: called from another thread with the first signal's name. Enter and leave on the main thread.
    """

    def __init__(self, announce: Callable[[str], None] = _announce) -> None:
        self._announce = announce
        self._distributed = False
        self._stop = threading.Event()
        self._previous: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._previous_fd = -1
        self._listener: threading.Thread | None = None
        self.signal_name: str | None = None  # the first signal's name, once there was one

    def __enter__(self) -> StopRequest:
        self._distributed = _several_processes()
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._pipe = (read, write)
        self._previous_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True)
        self._listener.start()
        for number in (signal.SIGINT,) if self._distributed else _SIGNALS:
            self._take_over(number)
        return self

    def __exit__(self, *_: object) -> None:
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
        """Whether to save and leave after `step`. One process: reads a flag. Several: all get True at the same step."""
        if not self._distributed:
            return self._stop.is_set()
        from jax.experimental import multihost_utils

        try:
            reached = multihost_utils.reached_preemption_sync_point(step)
        except RuntimeError as error:
            raise ConfigError(
                "JAX's preemption service is off, so a stop cannot be agreed on: unset jax_enable_preemption_service"
            ) from error
        if reached and signal.SIGTERM not in self._previous:
            self._stop.set()  # agreed: from here on one more SIGTERM ends this process at once
            self.signal_name = self.signal_name or signal.SIGTERM.name
            self._take_over(signal.SIGTERM)
        return reached

    def _take_over(self, number: signal.Signals) -> None:
        self._previous[number] = signal.signal(number, _only_wake)

    def _listen(self, read: int) -> None:
        """Reads each signal's number as it arrives: a Python handler would wait for a running compile to return."""
        while data := os.read(read, 1):
            number = data[0]
            if number not in _SIGNALS:
                continue
            if self._stop.is_set():
                os._exit(128 + number)
            self.signal_name = signal.Signals(number).name
            self._stop.set()
            self._announce(self.signal_name)
            if self._distributed:
                os.kill(os.getpid(), signal.SIGTERM)  # JAX's own handler tells the other processes


def _only_wake(number: int, frame: FrameType | None) -> None:
    """The listener thread has been woken through the wake-up descriptor; nothing is left to do here."""


def _several_processes() -> bool:
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1
