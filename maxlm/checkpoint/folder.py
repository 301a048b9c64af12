"""The durable tier in a folder, as Orbax writes it: one of the two places (bucket.py is the other) a run saves to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxlm.checkpoint import chunks, integrity, layout, orbax_io, reading
from maxlm.checkpoint.layout import CheckpointError, CheckpointRow, IntegrityError


class Folder:
    """The checkpoints in `directory`, which may be a link. Methods whose names are Bucket's do what Bucket's do."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory).absolute()
        self._orbax: Any = None  # made by the first save: importing Orbax is not paid before the first step
        self._saving: Path | None = None
        self._failed = False

    def __str__(self) -> str:
        return str(self.directory)

    def path(self, step: int) -> str:
        return str(layout.step_path(self.directory, step))

    def prepare(self, start: str) -> None:
        if jax.process_index() == 0:
            layout.prepare(self.directory)

    def run_name(self) -> str:
        return layout.run_name(self.directory)

    def complete_steps(self) -> list[int]:
        return layout.complete_steps(self.directory)

    def present_steps(self) -> list[int]:
        return layout.present_steps(self.directory)

    def rows(self) -> list[CheckpointRow]:
        return layout.rows(self.directory)

    def document(self, step: int) -> dict[str, Any]:
        return layout.read_document(layout.step_path(self.directory, step))

    def damage(self, step: int, *, metadata_only: bool = False) -> str | None:
        share = integrity.NO_ARRAYS if metadata_only else integrity.ALL
        return integrity.damage(layout.step_path(self.directory, step), share)

    def restore(self, step: int, like: Any) -> tuple[Any, str | None]:
        """Each process compares the checksums of what it reads, and of its share of the rest."""
        path, share = layout.step_path(self.directory, step), (jax.process_index(), jax.process_count())
        try:
            table = chunks.table(path)
        except IntegrityError:
            if (damage := integrity.damage(path)) is None:  # every byte is as written, and yet it cannot be read
                raise
            return None, damage
        read = partial(chunks.read, path, table, share=share)
        try:
            return reading.restore_like(self.document(step), str(path), like, read), None
        except IntegrityError as error:
            return None, str(error)

    def arrays(self, step: int, names: Iterable[str]) -> dict[str, np.ndarray]:
        path = layout.step_path(self.directory, step)
        return reading.restore_numpy(self.document(step), names, partial(chunks.read, path, chunks.table(path)))

    def begin(self, step: int, arrays: Mapping[str, Any], document: dict[str, Any]) -> None:
        path = layout.step_path(self.directory, step)
        self._saving, self._failed = path, False
        if self._orbax is None:
            self._orbax = orbax_io.async_checkpointer(self._before_commit)
        if jax.process_index() == 0 and path.exists():
            layout.set_aside(path)
        self._orbax.save(path, args=orbax_io.save_args(arrays, document))

    def finish(self) -> None:
        assert self._saving is not None
        self._orbax.wait_until_finished()
        if jax.process_index() == 0:
            for name in (self._saving / layout.COMMIT_FILE, self._saving, self.directory):
                layout.flush(name)

    def discard(self) -> None:
        self._failed = True
        if self._saving is not None and jax.process_index() == 0:
            layout.discard_in_progress(self._saving)

    def delete(self, step: int) -> None:
        layout.delete(layout.step_path(self.directory, step))

    def set_aside(self, step: int) -> str:
        return layout.set_aside(layout.step_path(self.directory, step)).name

    def set_aside_before(self) -> list[str]:
        return layout.set_aside_before(self.directory)

    def explain(self, error: BaseException, step: int, doing: str) -> CheckpointError:
        return layout.explain(error, layout.step_path(self.directory, step), doing)

    def close(self) -> None:
        if self._orbax is None:
            return
        try:
            self._orbax.close()
        except OSError:
            if not self._failed:  # else Orbax had metadata left for a folder that `discard` has removed
                raise
        finally:
            self._orbax = None

    def _before_commit(self) -> None:
        assert self._saving is not None
        writing = self._saving.with_name(self._saving.name + layout.IN_PROGRESS_SUFFIX)
        integrity.write_manifest(writing)
        layout.make_durable(writing)
