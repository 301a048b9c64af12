"""The fast tier: each process keeps its own part of the state on its own host, often, and waits for nobody.

    LOCAL/RUN/process_I/STEP/pieces         the process's shards of all arrays, one after another, raw
    LOCAL/RUN/process_I/STEP/manifest.json  {"format", "start", "document", "crc32",
                                             "pieces": [[name, box, offset, bytes, crc32]]}

A box is [[start, stop], ...], the part of the array that a shard is. `start` names the start of the run that wrote the
copy: pieces of one step are put together only where one start wrote them. RUN is the run's random name (its durable
folder keeps it), so that runs which share LOCAL, or a run directory made anew, never meet each other's checkpoints. A
save is complete when STEP appears, on this host alone: what all hosts together hold is worked out on restore
(peers.py). No fsync: after a power cut the checksums tell. Why not Orbax's emergency managers: docs/RESILIENCE.md.
"""

from __future__ import annotations

import os
import shutil
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxlm.checkpoint import integrity, layout
from maxlm.checkpoint.layout import CheckpointError
from maxlm.checkpoint.leaves import aligned_empty
from maxlm.checkpoint.pieces import Piece, as_bytes, box_from, on_host

PIECES_FILE, MANIFEST_FILE = "pieces", "manifest.json"
PARTIAL_SUFFIX = ".partial"
_READ_BYTES = 1 << 20
KEEP_AT_LEAST = 2  # a process may be one save ahead of another: fewer could leave no step that all of them have


@dataclass
class Copy:
    """What one folder LOCAL/RUN/process_I/STEP holds. pieces: offset in its file, bytes and crc32 of each."""

    path: Path
    step: int
    start: str
    document: dict[str, Any]
    pieces: dict[Piece, tuple[int, int, int]]

    def read(self, piece: Piece) -> np.ndarray | None:
        """The piece's bytes; None where they differ from their checksum or cannot be read."""
        offset, size, crc = self.pieces[piece]
        data = aligned_empty([size], np.dtype(np.uint8))
        view, got, found = memoryview(data), 0, 0
        try:
            with open(self.path / PIECES_FILE, "rb", buffering=0) as file:
                file.seek(offset)
                while got < size and (count := file.readinto(view[got : got + _READ_BYTES])):
                    found = zlib.crc32(view[got : got + count], found)  # while it is in the cache
                    got += count
        except OSError:
            return None
        return data if got == size and found == crc else None


class LocalTier:
    """Writes this process's copies under `folder`/RUN, one at a time in the background, and finds what is there.

    The newest `keep_last` (at least KEEP_AT_LEAST) stay beside the one being written. Errors of the background are
    raised as CheckpointError by the next call.
    """

    def __init__(self, folder: str | os.PathLike[str], run: str, start: str, *, keep_last: int) -> None:
        if keep_last < KEEP_AT_LEAST:
            raise ValueError(f"{keep_last=} must be at least {KEEP_AT_LEAST}")
        self.folder = Path(folder).absolute() / run
        self._keep_last, self._start = keep_last, start
        self._own = self.folder / f"process_{jax.process_index()}"
        self._writing: threading.Thread | None = None
        self._error: CheckpointError | None = None
        try:
            self._own.mkdir(parents=True, exist_ok=True)
            for leftover in (*self._own.glob("*" + PARTIAL_SUFFIX), *self._own.glob("*" + layout.DELETING_SUFFIX)):
                shutil.rmtree(leftover)
        except OSError as error:
            raise layout.explain(error, self._own, "preparing checkpoint.local_path") from error

    def save(self, step: int, arrays: Mapping[str, Any], document: dict[str, Any]) -> None:
        """Starts writing this process's shards of `arrays`, once the save before is done; they may be donated then."""
        self.wait()
        self._prune(step)
        pieces = on_host(arrays)
        self._writing = threading.Thread(target=self._write, args=(step, pieces, document), name="local checkpoint")
        self._writing.start()

    def wait(self) -> None:
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def copies(self) -> tuple[list[Copy], list[tuple[Path, str]]]:
        """(every readable copy in sight, newest first; [(folder, what is wrong)] of the others)."""
        found, damaged = [], []
        for step, path in self._step_folders():
            try:
                found.append(_read_manifest(path, step))
            except FileNotFoundError as error:
                if path.exists():  # else another process removed it meanwhile
                    damaged.append((path, f"{Path(error.filename).name} is missing"))
            except (OSError, ValueError, KeyError, TypeError) as error:
                damaged.append((path, str(error) or type(error).__name__))
        return sorted(found, key=lambda copy: (-copy.step, copy.path.parent != self._own, copy.path)), damaged

    def set_aside_before(self) -> list[str]:
        """Names of damaged copies in sight that were set aside, now or earlier."""
        return [name for folder in self._process_folders() for name in layout.set_aside_before(folder)]

    def discard_after(self, step: int) -> None:
        """Removes copies of later steps, the newest first: the run goes on from `step`, perhaps in another way."""
        self.wait()
        for number, path in sorted(self._step_folders(), reverse=True):
            if number > step:
                _remove(path)

    def _prune(self, step: int) -> None:
        """Before `step` is written. Copies in folders of processes that now run elsewhere go in the same way: every
        process has made at least the older of the two newest saves before this one's `save` was called."""
        before = sorted({number for number, path in self._step_folders() if path.parent == self._own and number < step})
        if len(before) > self._keep_last:
            for number, path in self._step_folders():
                if number < before[-self._keep_last]:
                    _remove(path)

    def _write(self, step: int, pieces: list[tuple[Piece, np.ndarray]], document: dict[str, Any]) -> None:
        path = layout.step_path(self._own, step)
        partial = path.with_name(path.name + PARTIAL_SUFFIX)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            table, offset = [], 0
            with open(partial / PIECES_FILE, "wb", buffering=0) as file:
                for (name, box), array in pieces:
                    data = as_bytes(array)
                    table.append([name, box, offset, data.size, zlib.crc32(data)])
                    offset += data.size
                    view = memoryview(data)
                    while len(view):
                        view = view[file.write(view) :]
            body = {"format": layout.FORMAT, "start": self._start, "document": document, "pieces": table}
            (partial / MANIFEST_FILE).write_bytes(integrity.sealed(body))
            if path.exists():  # of a life before this one
                _remove(path)
            partial.rename(path)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            self._error = layout.explain(error, path, "saving")

    def _process_folders(self) -> list[Path]:
        return sorted(self.folder.glob("process_*"))

    def _step_folders(self) -> list[tuple[int, Path]]:
        return [found for folder in self._process_folders() for found in layout.step_folders(folder)]


def _read_manifest(path: Path, step: int) -> Copy:
    body = integrity.unsealed((path / MANIFEST_FILE).read_bytes())
    if body is None or body["format"] != layout.FORMAT:
        raise ValueError(f"{MANIFEST_FILE} is damaged")
    pieces = {
        (name, box_from(box)): (offset, size, crc)
        for name, box, offset, size, crc in body["pieces"]
    }
    expected = max((offset + size for offset, size, _ in pieces.values()), default=0)
    found = (path / PIECES_FILE).stat().st_size
    if found != expected:
        raise ValueError(f"{PIECES_FILE} has {found} bytes instead of {expected}")
    return Copy(path, step, body["start"], body["document"], pieces)


def _remove(path: Path) -> None:
    """Another process that sees the same folder may be removing it too."""
    doomed = path.with_name(path.name + layout.DELETING_SUFFIX)
    try:
        path.rename(doomed)
    except OSError:
        return
    shutil.rmtree(doomed, ignore_errors=True)
