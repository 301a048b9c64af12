"""Which row is row number n of training: every dataset shuffled anew each epoch, and datasets mixed by weight.

Grain's `MapDataset` does this by random access: row n is found without visiting rows 0..n-1.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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


def mixture_digest(datasets: Sequence[Dataset]) -> str:
    """SHA-256 over each dataset's digest and its share of the weights."""
    total = sum(d.weight for d in datasets)
    content = [[d.manifest.digest, round(d.weight / total, 9)] for d in datasets]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def row_source(folder: str, split: Split) -> grain.MapDataset[bytes]:
    """The records of a split, by index. Files are opened on first use, so it pickles."""
    import grain

    paths = [f"{os.path.abspath(os.path.join(folder, shard.file))}[0:{shard.rows}]" for shard in split.shards]
    return grain.MapDataset.source(grain.sources.ArrayRecordDataSource(paths))


def mixed_rows(datasets: Sequence[Dataset], seed: int) -> grain.MapDataset[bytes]:
    """Endless training rows: element n is a function of the datasets, their weights, `seed` and n."""
    return mixed([row_source(d.folder, d.manifest.train) for d in datasets], [d.weight for d in datasets], seed)


def mixed(sources: Sequence[grain.MapDataset], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """Each source shuffled anew every epoch, endless, and mixed by weight: which element comes when does not depend on
    what the elements are."""
    import grain

    endless = [source.shuffle(seed=_shuffle_seed(seed, i)).repeat() for i, source in enumerate(sources)]
    return endless[0] if len(endless) == 1 else grain.MapDataset.mix(endless, list(weights))


def _shuffle_seed(seed: int, index: int) -> int:
    """Grain shuffles epoch e with seed + e: hashed seeds keep nearby seeds, and the datasets, from sharing orders."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:4], "little")
