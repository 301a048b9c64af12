"""Where the rows of a batch are stored: which record of which shard."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from maxlm.data.manifest import Shard, file_sha256
from maxlm.data.mixture import Dataset, Stages, mixed


@dataclass(frozen=True)
class Place:
    """Record number `record` (from 0) of `shard`, a file of the prepared `folder`."""

    folder: str
    shard: Shard
    record: int

    @property
    def path(self) -> str:
        return os.path.join(self.folder, self.shard.file)


class RowPlaces:
    """The places of the rows of loader.TrainingData, without reading them: they are shuffled and mixed as numbers."""

    def __init__(self, datasets: Sequence[Dataset], *, global_batch_size: int, seed: int, stages: Stages = ()):
        import grain

        self._datasets, self._size = datasets, global_batch_size
        numbers = [
            grain.MapDataset.range(d.manifest.train.rows).map(lambda row, i=i: (i, row)) for i, d in enumerate(datasets)
        ]
        self._numbers = mixed(numbers, [d.weight for d in datasets], seed, stages, global_batch_size)

    def of_batch(self, index: int) -> list[Place]:
        """The place of each row of global batch `index`, in order."""
        return [self._place(*self._numbers[index * self._size + row]) for row in range(self._size)]

    def _place(self, dataset: int, row: int) -> Place:
        folder, split = self._datasets[dataset].folder, self._datasets[dataset].manifest.train
        for shard in split.shards:
            if row < shard.rows:
                return Place(folder, shard, int(row))
            row -= shard.rows
        raise AssertionError(f"row {row} lies beyond the shards of {folder}")


def altered_shards(places: Sequence[Place]) -> dict[str, list[int]]:
    """Of the shards that `places` lie in, those whose file is not what the manifest says: path -> positions in `places`
    that read it. Reads these files whole."""
    rows: dict[str, list[int]] = {}
    for position, place in enumerate(places):
        rows.setdefault(place.path, []).append(position)
    expected = {place.path: place.shard.sha256 for place in places}
    return {path: rows[path] for path in sorted(rows) if file_sha256(path) != expected[path]}
