"""Real processes that run the real `maxlm` command, forked from one that has imported everything and started nothing.

An import of JAX and its libraries takes 3 s and a life of a tiny run takes less, so each process is a fork of the
harness: `maxlm.cli.run` in its own process, on its own host, with a clean exit of the interpreter.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

from maxlm import cli
from tests.chaos.hosts import Hosts

_LIBRARIES = ("flax.nnx", "grain", "matplotlib.pyplot", "optax", "orbax.checkpoint", "rich.progress", "tensorstore",
              "maxlm.data.prepare", "maxlm.training.loop", "maxlm.training.report")
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
POLL = 0.005  # seconds


def preload() -> None:
    """Imports what a run imports, so that a fork has it. Call it once, before any other process is made.

    JAX keeps the compiled programs of process 0 alone, for on TPUs and GPUs the others can use them too. On CPUs they
    cannot, and compiled everything again in each life: here, and only here, every process keeps its own.
    """
    import matplotlib

    matplotlib.use("Agg")
    for library in _LIBRARIES:
        importlib.import_module(library)
    from jax._src import compiler

    gc.freeze()  # the collector of a fork need not look at the libraries
    compiler.distributed = SimpleNamespace(global_state=SimpleNamespace(process_id=0, client=None))


def fork(body: Callable[[], int], log: Path) -> int:
    """Runs `body` in a new process with its output in `log`; its result is the exit code. Returns the process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = body()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:  # as the interpreter ends, without unwinding the harness, whose stack this process has too
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_maxlm(words: list[str]) -> NoReturn:
    """The `maxlm` command, from here on: exits as it does."""
    sys.argv = ["maxlm", *words]
    cli.run()


def wait(process: int) -> int:
    """The exit code of `process`, minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class Life:
    """One start of a run: `processes` processes of one `maxlm train`, each on its host."""

    def __init__(self, words: list[str], processes: int, hosts: Hosts, folder: Path, number: int):
        self.logs = [folder / f"life{number:02d}-process{index}.log" for index in range(processes)]
        self.codes: dict[int, int] = {}
        self.cpu_seconds = 0.0  # of the processes that have exited
        coordinator = hosts.coordinator() if processes > 1 else ""

        def body(index: int) -> NoReturn:
            place: list[str] = []
            if coordinator:
                hosts.enter(index)
                place = ["--coordinator", coordinator, "--num-processes", str(processes), "--process-id", str(index)]
            run_maxlm([*words, *place])

        self.processes = [fork(lambda index=index: body(index), log) for index, log in enumerate(self.logs)]

    def running(self) -> list[int]:
        """The indices of the processes that have not exited."""
        for index, process in enumerate(self.processes):
            if index not in self.codes:
                done, status, used = os.wait4(process, os.WNOHANG)
                if done:
                    self.codes[index] = os.waitstatus_to_exitcode(status)
                    self.cpu_seconds += used.ru_utime + used.ru_stime
        return [index for index in range(len(self.processes)) if index not in self.codes]

    def signal(self, indices: Collection[int], number: signal.Signals) -> None:
        for index in self.running():
            if index in indices:
                os.kill(self.processes[index], number)

    def wait(self, seconds: float, indices: Collection[int] | None = None) -> bool:
        """Whether `indices` (default: all) have exited within `seconds`."""
        deadline = time.monotonic() + seconds
        wanted = set(range(len(self.processes)) if indices is None else indices)
        while wanted & set(self.running()):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL)
        return True

    def kill(self) -> None:
        self.signal(self.running(), signal.SIGKILL)
        self.wait(60)

    def log(self, index: int = 0) -> str:
        """What the process has said; empty before it said anything."""
        return self.logs[index].read_text(errors="replace") if self.logs[index].exists() else ""
