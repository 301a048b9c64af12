"""Batches of packed rows for training and evaluation.

A training batch is a pure function of (prepared folders, weights, seed, data index): the rows of global batch `index`
are elements index * global_batch_size onwards of mixture.mixed_rows. A process asks for its own rows of it, so the
global batch is the same for any number of processes, and resuming is giving the step. The data index of a step is the
step, until data is skipped (skipping.py).

A batch is a dict of numpy arrays: int32 tokens, targets, segment_ids, positions [rows, seq_len] and bytes [rows]
(see rows.RowFormat.decode).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from maxlm.config import DatasetConfig
from maxlm.data.mixture import Stages, mixed_rows, mixture_digest, open_datasets, row_source
from maxlm.data.rows import Batch, RowFormat
from maxlm.data.skipping import Skipped, data_index
from maxlm.schema import require

_ENDLESS = 1 << 40  # steps


class _Batches:
    """Random access by step, as a Grain source: picklable, and all that a reading thread or process needs."""

    def __init__(self, rows: Any, fmt: RowFormat, global_batch_size: int, wanted: Sequence[int], skipped: Skipped):
        self._rows, self._fmt, self._skipped = rows, fmt, skipped
        self._global_batch_size, self._wanted = global_batch_size, wanted

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: int) -> Batch:
        first = data_index(int(step), self._skipped) * self._global_batch_size
        return self._fmt.decode([self._rows[first + row] for row in self._wanted])


class BatchStream:
    """Iterates (step, batch) for ever. `close()` stops its threads and processes; it is also a context manager."""

    def __init__(self, iterator: Any, start_step: int, copy: bool = False):
        self._iterator, self._step, self._copy = iterator, start_step, copy

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        if self._iterator is None:
            raise ValueError("this stream of batches was closed")
        batch = next(self._iterator)
        if self._copy:  # a worker process's arrays are shared memory that must be freed before the program ends
            batch = {name: np.array(value) for name, value in batch.items()}
        self._step += 1
        return self._step - 1, batch

    def close(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class TrainingData:
    """The training rows of a mixture of prepared folders.

    stages: (first step, weight of each folder), ascending from step 0, where the weights change during the run (in
    place of those in `folders`); a step here is the number of a batch. digest: SHA-256 of the tokens and weights.
    rows, tokens: in one epoch of every folder. Raises ConfigError where open_datasets does, and when the data is
    shorter than one global batch.
    """

    def __init__(
        self, folders: Sequence[DatasetConfig], *, seq_len: int, global_batch_size: int, seed: int,
        stages: Stages = (), verify: bool = False,
    ):
        self.datasets = open_datasets(folders, seq_len=seq_len, verify=verify)
        self.digest = mixture_digest(self.datasets, stages)
        self.row_format = self.datasets[0].manifest.row_format
        self.vocab_size = self.row_format.vocab_size
        self.tokenizer_path = self.datasets[0].tokenizer_path
        self.rows = sum(d.manifest.train.rows for d in self.datasets)
        self.tokens = sum(d.manifest.train.tokens for d in self.datasets)
        self._global_batch_size = global_batch_size
        require(
            self.rows >= global_batch_size,
            f"the data is shorter than one batch: {self.rows} rows of {seq_len} tokens, "
            f"train.global_batch_size={global_batch_size}: lower it or train.seq_len, or prepare more text",
        )
        self._rows = mixed_rows(self.datasets, seed, stages, global_batch_size)

    def batch(self, index: int, rows: Sequence[int] | None = None) -> Batch:
        """The global batch at data index `index`, or those of its `rows` (0 to global_batch_size) that this process
        wants."""
        return self._batches(rows)[index]

    def iterate(
        self, start_step: int, rows: Sequence[int] | None = None, *, read_threads: int = 4, worker_processes: int = 0,
        prefetch_batches: int = 8, skipped: Skipped = (),
    ) -> BatchStream:
        """(step, batch) from `start_step` on, equal to `batch(data_index(step, skipped), rows)`, read ahead by
        `prefetch_batches`.

        `worker_processes` above 0 reads in that many spawned processes, each with `read_threads`; a script that
        asks for them needs the usual `if __name__ == "__main__"`.
        """
        import grain

        dataset = grain.MapDataset.source(self._batches(rows, skipped)).slice(slice(start_step, None))
        workers = max(1, worker_processes)
        each = max(1, -(-prefetch_batches // workers))
        stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=each))
        if worker_processes:
            _let_grain_read_its_flags()
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=worker_processes, per_worker_buffer_size=each)
            )
        return BatchStream(iter(stream), start_step, copy=worker_processes > 0)

    def _batches(self, rows: Sequence[int] | None, skipped: Skipped = ()) -> _Batches:
        wanted = range(self._global_batch_size) if rows is None else rows
        assert wanted and 0 <= min(wanted) and max(wanted) < self._global_batch_size
        return _Batches(self._rows, self.row_format, self._global_batch_size, wanted, skipped)


def _let_grain_read_its_flags() -> None:
    """Grain's process workers read absl flags, which raise in a program that is not an absl app."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


class HeldoutData:
    """The held-out rows of prepared folders, one folder after another, in order.

    num_batches: global batches that cover them all (0 when none were held out); the last is filled up with empty
    rows: segment 0, targets -1, bytes 0. Raises ConfigError where open_datasets does.
    """

    def __init__(self, folders: Sequence[DatasetConfig], *, seq_len: int, global_batch_size: int):
        self.datasets = open_datasets(folders, seq_len=seq_len)
        self.row_format = self.datasets[0].manifest.row_format
        self.tokenizer_path = self.datasets[0].tokenizer_path
        self.rows = sum(d.manifest.heldout.rows for d in self.datasets)
        self.tokens = sum(d.manifest.heldout.tokens for d in self.datasets)
        self.bytes = sum(d.manifest.heldout.bytes for d in self.datasets)
        self.num_batches = -(-self.rows // global_batch_size)
        self._global_batch_size = global_batch_size
        splits = [(d.folder, d.manifest.heldout) for d in self.datasets if d.manifest.heldout.rows]
        self._sources = [row_source(folder, split) for folder, split in splits]

    def batch(self, index: int, rows: Sequence[int] | None = None) -> Batch:
        """Global batch `index` (0 to num_batches), or those of its `rows` that this process wants."""
        assert 0 <= index < self.num_batches
        first = index * self._global_batch_size
        wanted = range(self._global_batch_size) if rows is None else rows
        return self.row_format.decode([self._record(first + row) for row in wanted])

    def _record(self, index: int) -> bytes:
        for source in self._sources:
            if index < len(source):
                return source[index]
            index -= len(source)
        return b""
