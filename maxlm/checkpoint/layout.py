"""What a checkpoint folder looks like on disk, and the rules of which steps count and which stay.

    DIR/STEP/commit_success.txt      written by Orbax just before the rename that makes STEP visible
    DIR/STEP/state/                  arrays, OCDBT
    DIR/STEP/meta/meta.json          {"format", "arrays": {name: [dtype, shape]}, "meta": {...}}
    DIR/STEP/manifest.json           sizes and checksums of all these files (integrity.py)
    DIR/STEP.damaged/                a checkpoint that failed its checksums, or half of one: renamed, never deleted
    DIR/STEP.orbax-checkpoint-tmp/   a save in progress, or what a killed one left
    DIR/STEP.deleting/               a step on its way out: renamed first, so that a kill never leaves half of one

Reads with the standard library alone, so listing needs neither JAX nor Orbax.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 2  # 2: a manifest of checksums
STATE_ITEM = "state"
META_ITEM = "meta"
META_FILE = "meta.json"
COMMIT_FILE = "commit_success.txt"
IN_PROGRESS_SUFFIX = ".orbax-checkpoint-tmp"  # Orbax's name for it
DELETING_SUFFIX = ".deleting"
RUN_FILE = "run_name"
DAMAGED_SUFFIX = ".damaged"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. The message is one line that names the path and the fix."""


class IntegrityError(CheckpointError):
    """What is stored is not what was saved. Exit code 3."""


@dataclass(frozen=True)
class CheckpointRow:
    """One line of `maxlm checkpoint list`. time: seconds since 1970 of the commit (of the last write if incomplete)."""

    step: int
    bytes: int
    time: float
    complete: bool


def step_path(directory: str | os.PathLike[str], step: int) -> Path:
    return Path(directory).absolute() / str(step)


def is_complete(path: Path) -> bool:
    return (path / COMMIT_FILE).is_file() and (path / META_ITEM / META_FILE).is_file() and (path / STATE_ITEM).is_dir()


def step_folders(directory: str | os.PathLike[str], suffix: str = "") -> list[tuple[int, Path]]:
    """(step, folder) of every entry of `directory` called STEP followed by `suffix`, ascending."""
    try:
        entries = list(Path(directory).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise explain(error, Path(directory), "reading") from error
    found = []
    for entry in entries:
        name = entry.name.removesuffix(suffix)
        if entry.name == name + suffix and name.isascii() and name.isdigit() and name == str(int(name)):
            found.append((int(name), entry))
    return sorted(found)


def complete_steps(directory: str | os.PathLike[str]) -> list[int]:
    """Steps of the complete checkpoints in `directory`, ascending; empty where there is no such folder."""
    return [step for step, path in step_folders(directory) if is_complete(path)]


def present_steps(directory: str | os.PathLike[str]) -> list[int]:
    """Steps of all step folders in `directory`, ascending, half-written ones included."""
    return [step for step, _ in step_folders(directory)]


def rows(directory: Path) -> list[CheckpointRow]:
    """What `maxlm checkpoint list` shows of a folder. Raises CheckpointError where it does not exist."""
    if not Path(directory).is_dir():
        raise CheckpointError(f"{directory} is not a folder of checkpoints: give RUN_DIR/checkpoints")
    folders = step_folders(directory) + step_folders(directory, IN_PROGRESS_SUFFIX)
    return [_row(step, path) for step, path in sorted(folders)]


def read_document(path: Path) -> dict[str, Any]:
    """meta.json of the checkpoint at `path`. Raises CheckpointError where it cannot be read or is another format."""
    try:
        document = json.loads((path / META_ITEM / META_FILE).read_text(encoding="utf-8"))
        found = document["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(path, error) from error
    if found != FORMAT:
        raise CheckpointError(f"{path} is of format {found!r}, this maxlm reads {FORMAT}: use the maxlm that wrote it")
    return document


def steps_to_delete(steps: list[int], keep_last: int, keep_every: int, keep_behind: int = 0) -> list[int]:
    """Of the complete `steps`, those that neither belong to the newest `keep_last` nor are multiples of `keep_every`.

    keep_every=0 keeps none beyond keep_last. keep_behind: the newest one that lies so many steps behind the step after
    the newest stays as well, for a rollback.
    """
    older = sorted(steps)[:-keep_last]
    behind = max((step for step in steps if step <= max(steps) + 1 - keep_behind), default=None)
    return [step for step in older if step != behind and not (keep_every and step % keep_every == 0)]


def prepare(directory: Path) -> None:
    """Makes the folder and removes what killed saves and deletions left. Only the one writer may call it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for entry in directory.iterdir():
            if entry.name.endswith((IN_PROGRESS_SUFFIX, DELETING_SUFFIX)):
                shutil.rmtree(entry)
    except OSError as error:
        raise explain(error, directory, "preparing") from error


def run_name(directory: Path) -> str:
    """A random name that the checkpoints in `directory` keep, by which their local copies are known."""
    path = directory / RUN_FILE
    try:
        if not path.exists():
            partial = path.with_name(RUN_FILE + ".partial")
            partial.write_text(uuid.uuid4().hex)
            os.replace(partial, path)
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise explain(error, path, "writing") from error


def set_aside(path: Path) -> Path:
    """Renames a damaged or half-written step folder, so that the step can be saved again; nothing is deleted."""
    for attempt in range(1000):
        target = path.with_name(f"{path.name}{DAMAGED_SUFFIX}{attempt or ''}")
        if not target.exists():
            try:
                return path.rename(target)
            except OSError as error:
                raise explain(error, path, "setting aside") from error
    raise OSError(errno.EEXIST, f"1000 folders named {path.name}{DAMAGED_SUFFIX}* are in the way", str(path))


def set_aside_before(directory: Path) -> list[str]:
    """Names of what `set_aside` has renamed in `directory`, now or in an earlier start."""
    pattern = re.compile(rf"\d+{re.escape(DAMAGED_SUFFIX)}\d*")
    return sorted(entry.name for entry in directory.iterdir() if pattern.fullmatch(entry.name))


def delete(path: Path) -> None:
    """Removes a complete checkpoint; killed in between, it leaves a STEP.deleting that `prepare` removes."""
    doomed = path.with_name(path.name + DELETING_SUFFIX)
    path.rename(doomed)
    shutil.rmtree(doomed)


def discard_in_progress(path: Path) -> None:
    """Gives back the space of a failed save of `path`. Best effort: `prepare` does it again on the next start."""
    shutil.rmtree(path.with_name(path.name + IN_PROGRESS_SUFFIX), ignore_errors=True)


def make_durable(path: Path) -> None:
    """Flushes every file and folder under `path` to the disk, so that a power cut cannot empty a committed step."""
    for folder, _, files in os.walk(path):
        for name in files:
            flush(Path(folder) / name)
        flush(Path(folder))


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_CAUSES = (  # what the system says, what we say, how to fix it
    (("No space left", "ENOSPC"), "no space left on the device", "free some space"),
    (("quota exceeded", "EDQUOT"), "the disk quota is used up", "free some space"),
    (("File too large", "EFBIG"), "a file would be larger than the limit", "raise `ulimit -f`"),
    (("Read-only file system", "EROFS"), "the file system is read-only", "choose a writable --run-dir"),
    (("Permission denied", "PERMISSION_DENIED", "Operation not permitted"), "permission denied",
     "make it writable or choose another --run-dir"),
    (("Not a directory", "File exists"), "a file is in the way", "move that file or choose another --run-dir"),
    (("No such file", "NOT_FOUND"), "a file or folder vanished", "check that nothing else deletes in that folder"),
)


def explain(error: BaseException, path: Path, doing: str) -> CheckpointError:
    """CheckpointError in one line for whatever the file system, TensorStore or Orbax raised while `doing` to `path`."""
    if isinstance(error, CheckpointError):
        return error
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    said = " ".join(texts)
    for patterns, problem, fix in _CAUSES:
        if any(pattern in said for pattern in patterns):
            return CheckpointError(f"{problem} while {doing} {path}: {fix}, then run the same command again to resume")
    first = first_line(error)
    return CheckpointError(f"{doing} {path} failed ({first}): fix the cause, then run the same command again to resume")


def unreadable(path: Path, error: BaseException) -> IntegrityError:
    return IntegrityError(
        f"{path} cannot be read ({first_line(error)}): rename that folder to resume from the checkpoint before it"
    )


def first_line(error: BaseException) -> str:
    """The error's type and what it says first."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def _row(step: int, path: Path) -> CheckpointRow:
    size, newest = 0, 0.0
    for folder, _, files in os.walk(path):
        for name in files:
            try:  # a step may be pruned, or a file renamed, while we look
                stat = os.stat(os.path.join(folder, name))
            except FileNotFoundError:
                continue
            size, newest = size + stat.st_size, max(newest, stat.st_mtime)
    return CheckpointRow(step, size, newest, is_complete(path) and path.name == str(step))
