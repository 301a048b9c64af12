"""Where a run's durable checkpoints are, a folder or an object store, and what anyone may ask of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from maxlm.checkpoint import layout
from maxlm.checkpoint.bucket import Bucket
from maxlm.checkpoint.folder import Folder
from maxlm.checkpoint.layout import CheckpointError, CheckpointRow, IntegrityError

Directory = str | os.PathLike[str]  # a folder, a URL, or the file RUN_DIR/checkpoints that holds a URL
Durable = Folder | Bucket  # the same methods


def opened(directory: Directory) -> Durable:
    """What `directory` names."""
    url = url_of(directory)
    return Folder(Path(directory)) if url is None else Bucket(url)


def url_of(directory: Directory) -> str | None:
    """The URL that `directory` is or, as a file, holds; None for a folder. Raises CheckpointError."""
    if "://" in str(directory):
        return str(directory)
    if not Path(directory).is_file():
        return None
    try:
        text = Path(directory).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} cannot be read ({error}): it should hold a URL") from error
    return text if "://" in text else None


def redirect(folder: Path, target: str) -> None:
    """Makes `folder` lead to `target`, a folder or a URL, where the checkpoints are kept: a link to it, or a file with
    the URL in it. So whoever reads a run finds them.

    Raises CheckpointError where `folder` holds checkpoints of its own, or cannot be made to lead there.
    """
    url = url_of(target)
    try:
        if url is None:
            Path(target).absolute().mkdir(parents=True, exist_ok=True)
        if folder.is_symlink() or folder.is_file():
            if _leads_to(folder, target):
                return
            folder.unlink()  # checkpoint.path was changed: the checkpoints have been moved
        elif folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        if folder.exists():
            raise CheckpointError(f"checkpoint.path={target}: {folder} has checkpoints of its own: move what is in it "
                                  "to checkpoint.path, remove it, and run the same command again")
        if url is None:
            folder.symlink_to(Path(target).absolute(), target_is_directory=True)
        else:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = folder.with_name(folder.name + ".partial")
            partial.write_text(url + "\n", encoding="utf-8")
            os.replace(partial, folder)
    except OSError as error:
        raise layout.explain(error, Path(target), "preparing checkpoint.path") from error


def _leads_to(folder: Path, target: str) -> bool:
    if folder.is_symlink():
        return url_of(target) is None and Path(os.readlink(folder)) == Path(target).absolute()
    return url_of(folder) == url_of(target)


def complete_steps(directory: Directory) -> list[int]:
    """Steps of the complete checkpoints in `directory`, ascending; empty where there is no such folder."""
    return opened(directory).complete_steps()


def latest_step(directory: Directory) -> int | None:
    """The newest complete checkpoint's step, or None."""
    return max(complete_steps(directory), default=None)


def require_step(directory: Directory, step: int | None) -> int:
    """`step`, or the newest one for None. Raises CheckpointError where there is none, IntegrityError where the newest
    is half-written: what to read then is the user's choice."""
    durable = opened(directory)
    steps = durable.complete_steps()
    known = ", ".join(map(str, steps)) or "none"
    if step is None and (newest := max(durable.present_steps(), default=-1)) > max(steps, default=-1):
        raise IntegrityError(
            f"{durable.path(newest)} is not complete, parts of it are missing: choose --step ({known}), or let "
            "`maxlm train` set it aside"
        )
    if step is None and not steps:
        raise CheckpointError(f"no complete checkpoint in {directory}: check the path, or train first")
    if step is not None and step not in steps:
        raise CheckpointError(f"no complete checkpoint of step {step} in {directory}: choose one of: {known}")
    return steps[-1] if step is None else step


def list_checkpoints(directory: Directory) -> list[CheckpointRow]:
    """One row for every checkpoint and every save in progress, ascending by step.

    Raises CheckpointError where `directory` does not exist.
    """
    return opened(directory).rows()


def read_meta(directory: Directory, step: int | None = None) -> dict[str, Any]:
    """The `meta` given to `Checkpointer.save` for `step` (None: the newest complete one)."""
    return opened(directory).document(require_step(directory, step))["meta"]
