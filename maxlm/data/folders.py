"""From `data.*` of a config to prepared folders."""

from __future__ import annotations

from pathlib import Path

from maxlm.config import DataConfig, DatasetConfig
from maxlm.schema import ConfigError


def datasets_of(data: DataConfig, seq_len: int, source_dir: Path) -> tuple[DatasetConfig, ...]:
    """The prepared folders and weights a run reads. `data.source` is prepared into `source_dir` on first use."""
    if data.mixture:
        return data.mixture
    if data.path:
        return (DatasetConfig(data.path),)
    if data.source:
        from maxlm.data.prepare import ensure_source

        return (DatasetConfig(str(ensure_source(data, seq_len, source_dir))),)
    raise ConfigError("data.path is not set: --set data.path=FOLDER made by `maxlm data prepare`, or set data.source")
