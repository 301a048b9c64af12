"""One run directory, one run: an advisory lock that the kernel releases however its holder dies."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
import weakref
from pathlib import Path

from maxlm.schema import ConfigError

LOCK_FILE = ".lock"


class RunLock:
    """`with RunLock(run_dir):` holds RUN_DIR/.lock (flock) and makes the folder if need be.

    process_index: only process 0 of a run takes the lock; the others pass through.
    Raises ConfigError in one line where another process holds it (naming its pid and host) or the folder cannot
    be written. On a file system without locks (some Lustre mounts) it warns and goes on.
    """

    def __init__(self, run_dir: str | os.PathLike[str], *, process_index: int = 0) -> None:
        self._run_dir = Path(run_dir)
        self._takes_part = process_index == 0
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        if self._takes_part:
            self._acquire()
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            _held.discard(self)
            os.close(descriptor)

    def _acquire(self) -> None:
        path = self._run_dir / LOCK_FILE
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _unusable(self._run_dir, error) from error
        try:
            _lock(descriptor, self._run_dir)
            self._describe_holder(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _held.add(self)

    def _describe_holder(self, descriptor: int) -> None:
        holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)
        except OSError as error:
            raise _unusable(self._run_dir, error) from error


def _lock(descriptor: int, run_dir: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"--run-dir {run_dir} is in use by {_holder(descriptor)}: wait for it, stop it, or choose another --run-dir"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise _unusable(run_dir, error) from error
        logging.getLogger(__name__).warning(
            "%s is on a file system without locks: make sure that no other run writes there", run_dir
        )


def _holder(descriptor: int) -> str:
    for _ in range(20):  # the holder may be between taking the lock and writing its name
        try:
            holder = json.loads(os.pread(descriptor, 4096, 0))
            return f"process {holder['pid']} on host {holder['host']}"
        except (ValueError, KeyError, TypeError):
            time.sleep(0.05)
    return "another process"


def _unusable(run_dir: Path, error: OSError) -> ConfigError:
    reason = error.strerror or str(error)
    return ConfigError(f"--run-dir {run_dir} cannot be used ({reason}): choose a folder that you can write")


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _release_in_child() -> None:
    """A forked child shares the lock, and would hold it after its parent was killed; closing its copy lets go."""
    for lock in list(_held):
        if lock._descriptor is not None:
            os.close(lock._descriptor)
            lock._descriptor = None
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)
