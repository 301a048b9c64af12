"""A run directory on a full disk, and one that cannot be written, for root and for others, with and without mounts."""

from __future__ import annotations

import contextlib
import os
import pathlib
import resource
import subprocess
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def full_disk(folder: pathlib.Path, free: int) -> Iterator[tuple[pathlib.Path, list[str], Callable[[], None]]]:
    """(a run directory whose disk has `free` bytes left, what the error must say, a function that makes room).

    A small tmpfs; where mounting is not permitted, a limit on the size of files, which fails writes the same way.
    """
    folder.mkdir()
    size = 8 << 20
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        with _file_size_limit(free // 40) as lift:
            yield folder / "run", ["a file would be larger than the limit", "raise `ulimit -f`"], lift
        return
    try:
        ballast = folder / "ballast"
        ballast.write_bytes(bytes(size - free))
        yield folder / "run", ["no space left", "free some space"], ballast.unlink
    finally:
        subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def _file_size_limit(size: int) -> Iterator[Callable[[], None]]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    lift = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)  # noqa: E731
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield lift
    finally:
        lift()


@contextlib.contextmanager
def read_only(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """`folder`, not writable. Root writes through permissions, so it gets a read-only mount of it, or, where it may
    not mount, the immutable attribute."""
    if os.geteuid():
        folder.chmod(0o555)
        undo = lambda: folder.chmod(0o755)  # noqa: E731
    elif not subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        undo = lambda: subprocess.run(["umount", folder], check=True)  # noqa: E731
    else:
        subprocess.run(["chattr", "-R", "+i", folder], check=True)
        undo = lambda: subprocess.run(["chattr", "-R", "-i", folder], check=True)  # noqa: E731
    try:
        yield folder
    finally:
        undo()
