"""Worker processes for `maxlm data prepare`: plain child interpreters that take pickled tasks over a pipe.

`multiprocessing` would import the caller's `__main__` again in each child (spawn) or copy a process that may hold an
accelerator and its threads (fork). A child here imports this package and nothing of the caller, and it
ends by itself when its parent is killed, because its input closes.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_CHILD = "from maxlm.data.workers import serve; serve()"


class WorkerError(RuntimeError):
    """A worker process died, or a task raised something that is not a user's mistake."""


def usable_cores() -> int:
    """Cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def run_tasks(function: Callable[[Any], Any], tasks: Sequence[Any], workers: int) -> Iterator[tuple[int, Any]]:
    """Yields (index, function(task)) as tasks finish, over `workers` processes (in this one for a single worker).

    `function` must be importable by name. Its ConfigError or OSError is raised here; anything else as WorkerError.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        for index, task in enumerate(tasks):
            yield index, function(task)
        return
    waiting: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    for item in enumerate(tasks):
        waiting.put(item)
    results: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    children = [_start_child() for _ in range(workers)]
    feeders = [
        threading.Thread(target=_feed, args=(child, function, waiting, results), daemon=True) for child in children
    ]
    try:
        for feeder in feeders:
            feeder.start()
        for _ in tasks:
            index, result, error = results.get()
            if error is not None:
                raise error
            yield index, result
    finally:
        for child in children:
            child.kill()
        for child, feeder in zip(children, feeders, strict=True):
            if feeder.ident is not None:  # an interrupt may come before it is started
                feeder.join()
            _close(child)


def _start_child() -> subprocess.Popen[bytes]:
    package_parent = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    paths = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    # One thread a worker, since the workers take all cores. Its own process group: Ctrl-C reaches the parent alone.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen([sys.executable, "-P", "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            env=environment, process_group=0)


def _close(child: subprocess.Popen[bytes]) -> None:
    child.wait()
    child.stdout.close()
    try:
        child.stdin.close()
    except OSError:  # what it had not read yet cannot be flushed
        pass


def _feed(child: subprocess.Popen[bytes], function: Callable[[Any], Any], waiting: Any, results: Any) -> None:
    while True:
        try:
            index, task = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            pickle.dump((function, task), child.stdin)
            child.stdin.flush()
            result, error = pickle.load(child.stdout)
        except (OSError, EOFError, pickle.UnpicklingError, ValueError):
            result, error = None, WorkerError(
                f"a data worker process ended unexpectedly (exit status {child.poll()}; out of memory?): "
                "run the same command again to continue, with fewer --workers"
            )
        results.put((index, result, error))
        if error is not None:
            return


def serve() -> None:
    """The child's loop: one pickled (function, task) in, one pickled (result, error) out, until input closes."""
    tasks, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print must not enter the answers
    while True:
        try:
            function, task = pickle.load(tasks)
        except EOFError:
            return
        try:
            answer: tuple[Any, BaseException | None] = (function(task), None)
        except Exception as error:
            answer = (None, _portable(error))
        try:
            pickle.dump(answer, answers)
            answers.flush()
        except BrokenPipeError:
            return


def _portable(error: Exception) -> BaseException:
    import traceback

    from maxlm.schema import ConfigError

    if isinstance(error, (ConfigError, OSError)):
        return error
    return WorkerError("".join(traceback.format_exception(error)))
