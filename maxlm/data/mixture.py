"""Which row is row number n of training: every dataset shuffled anew each epoch, and datasets mixed by weight.

Grain's `MapDataset` does this by random access: row n is found without visiting rows 0..n-1. Weights that change
during a run (stages) keep that: how many rows each dataset has given before a stage begins has a closed form.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from maxlm.config import DatasetConfig
from maxlm.data.manifest import TOKENIZER, Manifest, Split, check_shards, load_manifest
from maxlm.schema import require

if TYPE_CHECKING:
    import grain


@dataclass(frozen=True)
class Dataset:
    """A prepared folder that was opened and checked."""

    folder: str
    weight: float
    manifest: Manifest

    @property
    def tokenizer_path(self) -> str | None:
        """`tokenizer.json`, or None for bytes."""
        return None if self.manifest.tokenizer.name == "bytes" else os.path.join(self.folder, TOKENIZER)


def open_datasets(configs: Sequence[DatasetConfig], *, seq_len: int, verify: bool = False) -> tuple[Dataset, ...]:
    """Opens prepared folders that are to be used together.

    Checks size and presence of every shard, and all bytes if `verify`. Raises ConfigError for a folder that is missing,
    incomplete or corrupted, prepared for another sequence length, or with another tokenizer than the first.
    """
    require(bool(configs), "no data: set data.path, data.source or data.mixture")
    datasets = []
    for config in configs:
        manifest = load_manifest(config.path)
        check_shards(config.path, manifest, verify=verify)
        require(manifest.seq_len == seq_len, f"train.seq_len={seq_len} but {config.path} was prepared with --seq-len "
                f"{manifest.seq_len}: set train.seq_len={manifest.seq_len} or prepare the data again")
        datasets.append(Dataset(config.path, float(config.weight), manifest))
    first = datasets[0]
    for other in datasets[1:]:
        require(
            (other.manifest.tokenizer.sha256, other.manifest.eot_id)
            == (first.manifest.tokenizer.sha256, first.manifest.eot_id),
            f"data.mixture: {first.folder} and {other.folder} have different tokenizers "
            f"({first.manifest.tokenizer.name}, {other.manifest.tokenizer.name}): prepare the second with --tokenizer "
            f"{os.path.join(first.folder, TOKENIZER)}",
        )
    return tuple(datasets)


Weights = tuple[float, ...]
Stages = Sequence[tuple[int, Weights]]  # (first step, weight of each dataset), ascending, the first from step 0


def mixture_digest(datasets: Sequence[Dataset], stages: Stages = ()) -> str:
    """SHA-256 over each dataset's digest and its share of the weights, and over the later stages' steps and shares."""
    content: list[Any] = [
        [d.manifest.digest, share] for d, share in zip(datasets, _shares([d.weight for d in datasets]), strict=True)
    ]
    content += [[first_step, _shares(weights)] for first_step, weights in stages[1:]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def row_source(folder: str, split: Split) -> grain.MapDataset[bytes]:
    """The records of a split, by index. Files are opened on first use, so it pickles."""
    import grain

    paths = [f"{os.path.abspath(os.path.join(folder, shard.file))}[0:{shard.rows}]" for shard in split.shards]
    return grain.MapDataset.source(grain.sources.ArrayRecordDataSource(paths))


def mixed_rows(datasets: Sequence[Dataset], seed: int, stages: Stages = (), rows_per_step: int = 1) -> Any:
    """Endless training rows: element n is a function of the datasets, their weights, `seed`, the stages and n.

    Up to the second stage the rows are those of a run without stages.
    """
    sources = [row_source(d.folder, d.manifest.train) for d in datasets]
    return mixed(sources, [d.weight for d in datasets], seed, stages, rows_per_step)


def mixed(sources: Sequence[Any], weights: Sequence[float], seed: int, stages: Stages, rows_per_step: int) -> Any:
    """Each source shuffled anew every epoch, endless, and mixed by weight: which element comes when does not depend on
    what the elements are."""
    import grain

    endless = [source.shuffle(seed=_shuffle_seed(seed, i)).repeat() for i, source in enumerate(sources)]
    if len(stages) > 1:
        return _StagedRows(endless, stages, rows_per_step)
    return endless[0] if len(endless) == 1 else grain.MapDataset.mix(endless, list(weights))


class _StagedRows:
    """Rows of several endless datasets whose weights change at given steps, by random access."""

    def __init__(self, datasets: Sequence[Any], stages: Stages, rows_per_step: int):
        self._datasets = datasets
        self._starts = [first_step * rows_per_step for first_step, _ in stages]
        self._parts = [_parts(weights) for _, weights in stages]
        self._given = [[0] * len(datasets)]  # rows that each dataset gave before each stage
        for start, end, parts in zip(self._starts, self._starts[1:], self._parts, strict=False):
            counts = _counts(end - start, parts)
            self._given.append([before + count for before, count in zip(self._given[-1], counts, strict=True)])

    def __getitem__(self, n: int) -> bytes:
        stage = bisect.bisect_right(self._starts, n) - 1
        within, parts = n - self._starts[stage], self._parts[stage]
        before = _counts(within, parts)
        # The dataset that gives row n is the one whose count goes up.
        chosen = next(i for i, count in enumerate(_counts(within + 1, parts)) if count != before[i])
        return self._datasets[chosen][self._given[stage][chosen] + before[chosen]]


def _parts(weights: Weights) -> list[int]:
    """Whole-number proportions, as Grain makes them of weights; 0 stays 0."""
    scale = 100 / min(weight for weight in weights if weight)
    return [int(weight * scale) for weight in weights]


def _counts(n: int, parts: Sequence[int]) -> list[int]:
    """How many of the first n rows each dataset gives. Grain's rule of interleaving, in closed form: each dataset takes
    its share, rounded up, of what those before it leave."""
    counts, rest, remaining = [], n, sum(parts)
    for part in parts:
        left = rest * (remaining - part) // remaining if remaining else 0
        counts.append(rest - left)
        rest, remaining = left, remaining - part
    return counts


def _shares(weights: Sequence[float]) -> list[float]:
    return [round(weight / sum(weights), 9) for weight in weights]


def _shuffle_seed(seed: int, index: int) -> int:
    """Grain shuffles epoch e with seed + e: hashed seeds keep nearby seeds, and the datasets, from sharing orders."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:4], "little")
