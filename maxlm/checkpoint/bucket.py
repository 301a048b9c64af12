"""The durable tier in an object store (gs://, s3://; file:// keeps the same format in a folder).

    URL/STEP.SAVE/process_I/00000 ...  process I's shards of all arrays (parts.py)
    URL/STEP.SAVE/writing/I            process I is at it; I.done: its table of objects and pieces; I.failed
    URL/STEP.SAVE/commit.json          {"format", "time", "document", "parts", "crc32"}; parts: those tables, in order,
                                       {"objects": [[bytes, crc32]], "pieces": [[name, box, offset, bytes]]}
    URL/STEP.SAVE/damaged              set aside
    URL/run_name

Object stores neither rename nor lock, but an object appears whole or not at all. So a checkpoint is complete when
commit.json is there, which process 0 writes last and which names all it consists of, with checksums. Every save has a
name of its own (SAVE: the start of the run and a count), so that nothing which an earlier life of the run still sends
can get into a checkpoint. Setting aside writes `damaged` into it: one small object instead of a copy of everything, and
removing it undoes that. Where there is neither commit.json nor a sign of `writing`, a complete checkpoint has lost its
commit, which is damage; with `writing` it is what a killed save left, and the next start deletes it.

Processes meet in the store itself (process 0 waits for I.done of all, they for the commit), not in a collective,
because they save in a thread while the devices train. Why not Orbax's arrays: docs/RESILIENCE.md.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from maxlm.checkpoint import layout, parts, pieces, reading
from maxlm.checkpoint.gather import in_order
from maxlm.checkpoint.integrity import sealed, unsealed
from maxlm.checkpoint.layout import CheckpointError, CheckpointRow, IntegrityError
from maxlm.checkpoint.object_store import BRIEFLY, Objects

FORMAT = 1
COMMIT, DAMAGED, WRITING = "commit.json", "damaged", "writing/"
PEERS_SECONDS, POLL_SECONDS = 600.0, 0.5  # how long a process waits for the others' parts, how often it looks

_KEY = re.compile(r"(\d+)\.([^/]+)/(.+)")


@dataclass
class _Save:
    """One STEP.SAVE, as its keys tell."""

    step: int
    root: str
    rest: set[str] = field(default_factory=set)

    committed = property(lambda self: COMMIT in self.rest)
    damaged = property(lambda self: DAMAGED in self.rest)
    writing = property(lambda self: any(name.startswith(WRITING) for name in self.rest))


class Bucket:
    """The checkpoints under `url`. Every process of a run makes one and calls `prepare`, `begin`, `finish` alike."""

    def __init__(self, url: str) -> None:
        self._objects = Objects(url)
        self._roots: dict[int, str] = {}
        self._commits: dict[str, parts.Commit] = {}
        self._start, self._count = "", 0
        self._saving: tuple[int, str, list[tuple[pieces.Piece, np.ndarray]], dict[str, Any]] | None = None

    def __str__(self) -> str:
        return self._objects.url

    def path(self, step: int) -> str:
        """The checkpoint's name in messages."""
        return f"{self}{self._roots.get(step, step)}"

    def prepare(self, start: str) -> None:
        """Before the first save: process 0 removes what killed saves and deletions left."""
        self._start = start
        if jax.process_index() == 0:
            self.run_name()  # fails where writing would
            for save in self._saves():
                if save.writing and not save.committed:
                    self._remove(save.root)
                elif save.writing:  # killed just after the commit, or before it was taken back
                    self._objects.delete(f"{save.root}/{WRITING}")

    def run_name(self) -> str:
        """A random name that these checkpoints keep, by which their local copies are known."""
        found = self._objects.read(layout.RUN_FILE)
        if found is None:
            found = uuid.uuid4().hex.encode()
            self._objects.write(layout.RUN_FILE, found)
        return found.decode()

    def complete_steps(self) -> list[int]:
        """Ascending."""
        return sorted({save.step for save in self._saves() if save.committed and not save.damaged})

    def present_steps(self) -> list[int]:
        """The complete ones, and those that were and have lost their commit."""
        return sorted({
            save.step for save in self._saves() if not save.damaged and (save.committed or not save.writing)
        })

    def rows(self) -> list[CheckpointRow]:
        """Of a save in progress neither size nor time is known: 0."""
        rows = []
        for save in self._saves():
            size, when = 0, 0.0
            if save.committed:
                with suppress(IntegrityError):
                    commit = self._commit_of(save.root)
                    size, when = sum(part.starts[-1] for part in commit.parts), commit.time
            if not save.damaged:
                rows.append(CheckpointRow(save.step, size, when, save.committed))
        return rows

    def document(self, step: int) -> dict[str, Any]:
        """{"format", "arrays": {name: [dtype, shape]}, "meta"} as it was saved."""
        return self._commit(step).document

    def damage(self, step: int, *, metadata_only: bool = False) -> str | None:
        """What is wrong with the checkpoint, in a few words; None if nothing is. metadata_only: the commit is sound and
        all its objects are there, unread."""
        try:
            commit = self._commit(step)
            there = set(self._objects.keys(f"{commit.root}/process_"))
            for process, number in commit.objects():
                if (key := parts.key_of(commit.root, process, number)) not in there:
                    return f"{key.partition('/')[2]} is missing"
            if not metadata_only:
                parts.check(self._objects, commit)
        except IntegrityError as error:
            return str(error)
        return None

    def restore(self, step: int, like: Any) -> tuple[Any, str | None]:
        """(what `like` describes, None), or (None, what is damaged). Each process reads the objects that hold what it
        needs, and compares their checksums before anything of them is used."""
        commit = self._commit(step)
        try:
            return reading.restore_like(commit.document, self.path(step), like, self._reader(commit)), None
        except IntegrityError as error:
            return None, str(error)

    def arrays(self, step: int, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The named arrays, whole, in host memory. Raises IntegrityError."""
        commit = self._commit(step)
        return reading.restore_numpy(commit.document, names, self._reader(commit))

    def begin(self, step: int, arrays: Mapping[str, Any], document: dict[str, Any]) -> None:
        """Copies this process's part to the host; on return the arrays may be donated."""
        self._count += 1
        root = f"{step}.{self._start}-{self._count:04d}"
        self._saving = step, root, pieces.on_host(arrays, first_copy_only=True), document

    def finish(self) -> None:
        """Writes it, and returns when the checkpoint is complete. Needs no collective. Raises CheckpointError."""
        assert self._saving is not None
        step, root, held, document = self._saving
        me = jax.process_index()
        self._objects.write(f"{root}/{WRITING}{me}", b"1")
        part = parts.write_part(self._objects, root, me, held)
        if me:
            self._objects.write(f"{root}/{WRITING}{me}.done", sealed(part))
            self._await(root, lambda names: str(me) not in names)
            if not self._objects.keys(f"{root}/{COMMIT}"):
                raise CheckpointError(f"{self}{root} was not completed by process 0: see its message")
        else:
            every = [part, *self._parts_of_others(root)]
            body = {"format": FORMAT, "time": time.time(), "document": document, "parts": every}
            self._objects.write(f"{root}/{COMMIT}", sealed(body))
            self._objects.delete(f"{root}/{WRITING}")
        self._roots[step], self._saving = root, None

    def discard(self) -> None:
        """After a failed `begin` or `finish`: tells the others. The next start's `prepare` removes what is there."""
        if self._saving is not None:
            root, self._saving = self._saving[1], None
            with suppress(CheckpointError):
                self._objects.write(f"{root}/{WRITING}{jax.process_index()}.failed", b"1", seconds=BRIEFLY)

    def delete(self, step: int) -> None:
        root = self._root(step)
        self._objects.write(f"{root}/{WRITING}0", b"1")  # killed from here on, `prepare` goes on
        self._objects.delete(f"{root}/{COMMIT}")
        self._remove(root)

    def set_aside(self, step: int) -> str:
        """Marks a damaged checkpoint, so that it counts no more; nothing is deleted. Returns what marks it."""
        name = f"{self._root(step)}/{DAMAGED}"
        self._objects.write(name, b"delete this object to take the checkpoint up again\n")
        del self._roots[step]
        return name

    def set_aside_before(self) -> list[str]:
        """Names of what `set_aside` has marked, now or in an earlier start."""
        return [f"{save.root}/{DAMAGED}" for save in self._saves() if save.damaged]

    def explain(self, error: BaseException, step: int, doing: str) -> CheckpointError:
        """CheckpointError in one line for whatever was raised while `doing` to the checkpoint."""
        if isinstance(error, CheckpointError):
            return error
        return CheckpointError(f"{doing} {self.path(step)} failed ({layout.first_line(error)}): fix the cause, then "
                               "run the same command again to resume")

    def close(self) -> None:
        pass

    def _saves(self) -> list[_Save]:
        """Ascending by step; of one step, the newest last."""
        keys, found = self._objects.keys(), {}
        if layout.RUN_FILE not in keys and self._objects.read(layout.RUN_FILE) is not None:
            # Refused with 403, TensorStore's list of a GCS bucket is empty, and the run would begin again.
            raise CheckpointError(f"{self} cannot be listed: check that the credentials allow it")
        for key in keys:
            if match := _KEY.fullmatch(key):
                root = key.partition("/")[0]
                found.setdefault(root, _Save(int(match[1]), root)).rest.add(match[3])
        saves = sorted(found.values(), key=lambda save: (save.step, save.root))
        self._roots = {save.step: save.root for save in saves if not (save.damaged or save.writing)}
        self._roots |= {save.step: save.root for save in saves if save.committed and not save.damaged}
        return saves

    def _root(self, step: int) -> str:
        if step not in self._roots:
            self._saves()
        if step not in self._roots:
            raise IntegrityError(f"{self} has no checkpoint of step {step} any more")
        return self._roots[step]

    def _commit(self, step: int) -> parts.Commit:
        return self._commit_of(self._root(step))

    def _commit_of(self, root: str) -> parts.Commit:
        """Raises IntegrityError where it is missing or damaged."""
        if root not in self._commits:
            data = self._objects.read(f"{root}/{COMMIT}")
            body = unsealed(data) if data is not None else None
            if body is None:
                raise IntegrityError(f"{COMMIT} is {'missing' if data is None else 'damaged'}")
            if (found := [body["format"], body["document"]["format"]]) != [FORMAT, layout.FORMAT]:
                raise CheckpointError(f"{self}{root} is of format {found}, this maxlm reads "
                                      f"{[FORMAT, layout.FORMAT]}: use the maxlm that wrote it")
            every = [parts.part_from(part) for part in body["parts"]]
            self._commits = {root: parts.Commit(root, body["time"], body["document"], every)}
        return self._commits[root]

    def _parts_of_others(self, root: str) -> list[dict[str, Any]]:
        others = range(1, jax.process_count())
        if others:
            self._await(root, lambda names: names.issuperset(f"{process}.done" for process in others))
        return list(in_order(lambda process: self._read_part(root, process), others, at_once=parts.AT_ONCE))

    def _read_part(self, root: str, process: int) -> dict[str, Any]:
        part = unsealed(self._objects.read(f"{root}/{WRITING}{process}.done") or b"")
        if part is None:
            raise CheckpointError(f"what process {process} wrote into {self}{root} cannot be read: run the same "
                                  "command again to resume")
        return part

    def _await(self, root: str, reached: Callable[[set[str]], bool]) -> None:
        """Until `reached` says so of the names under writing/. Raises CheckpointError where a process has failed, or
        nothing comes for PEERS_SECONDS."""
        until = time.monotonic() + PEERS_SECONDS
        while not reached(names := {key.rpartition("/")[2] for key in self._objects.keys(f"{root}/{WRITING}")}):
            failed = [name.removesuffix(".failed") for name in names if name.endswith(".failed")]
            if failed or time.monotonic() > until:
                why = f"process {failed[0]} failed" if failed else f"no word from the others for {PEERS_SECONDS:g} s"
                raise CheckpointError(f"{self}{root} is not complete, {why}: run the same command again to resume")
            time.sleep(POLL_SECONDS)

    def _remove(self, root: str) -> None:
        """What says that it is incomplete goes last."""
        self._objects.delete(f"{root}/process_")
        self._objects.delete(f"{root}/")

    def _reader(self, commit: parts.Commit) -> reading.Reader:
        return lambda index, boxes: parts.read(self._objects, commit, index, boxes)
