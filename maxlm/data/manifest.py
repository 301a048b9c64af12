"""`manifest.json` of a prepared folder: what was read, how it was tokenized and packed, and hashes of all of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

from maxlm.data.rows import RowFormat
from maxlm.schema import ConfigError, require

VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Shard:
    """One ArrayRecord file. `sha256` is of the file, `rows_sha256` of the records in it."""

    file: str
    rows: int
    size: int
    sha256: str
    rows_sha256: str


@dataclass(frozen=True)
class Split:
    """The training or the held-out part.

    tokens: tokens predicted, each once, the end of each document included. bytes: of UTF-8 text they stand for.
    padding_fraction: share of the rows' capacity that holds no token.
    """

    documents: int
    tokens: int
    bytes: int
    rows: int
    padding_fraction: float
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class HeldoutSplit(Split):
    """The held-out part, and what gzip -9 and xz -9 reach on its documents joined in order, in bits per byte.

    compressed_bytes: how much of that text they were given (at most 64 MiB). None where there is no held-out text.
    """

    compressed_bytes: int
    gzip9_bits_per_byte: float | None
    xz9_bits_per_byte: float | None


@dataclass(frozen=True)
class TokenizerInfo:
    """`sha256` is of what determines the ids. The file is `tokenizer.json` in the folder, none for 'bytes'."""

    name: str
    vocab_size: int
    sha256: str


@dataclass(frozen=True)
class SourceInfo:
    """One input. `digest` is over the hashes of its kept documents, in order."""

    name: str
    version: str | None
    packages: dict[str, str]
    documents: int
    bytes: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """See the field classes. `request` is the command's arguments, `inputs_fingerprint` the files' sizes and times.

    digest: over everything that determines tokens (sequence length, tokenizer, rows), not over paths or times.
    """

    version: int
    digest: str
    seq_len: int
    eot_id: int
    tokenizer: TokenizerInfo
    train: Split
    heldout: HeldoutSplit
    sources: tuple[SourceInfo, ...]
    skipped: dict[str, int]
    duplicates: int
    request: dict[str, Any]
    inputs_fingerprint: str

    @property
    def row_format(self) -> RowFormat:
        return RowFormat(self.seq_len, self.tokenizer.vocab_size, self.eot_id)

    def summary(self) -> str:
        """A few lines for a person."""
        lines = [
            f"{name}: {split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens in {split.rows:,} "
            f"rows of {self.seq_len:,} ({split.padding_fraction:.2%} padding)"
            for name, split in (("train", self.train), ("heldout", self.heldout))
        ]
        if self.heldout.gzip9_bits_per_byte is not None:
            lines.append(f"held-out text: gzip -9 {self.heldout.gzip9_bits_per_byte:.3f} bits a byte, "
                         f"xz -9 {self.heldout.xz9_bits_per_byte:.3f}")
        skipped = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items()) or "none"
        lines.append(f"left out: {self.duplicates:,} exact duplicates; unusable: {skipped}")
        lines.append(f"tokenizer {self.tokenizer.name}, {self.tokenizer.vocab_size:,} ids; digest {self.digest}")
        return "\n".join(lines)


def content_digest(seq_len: int, eot_id: int, tokenizer: TokenizerInfo, train: Split, heldout: Split) -> str:
    """SHA-256 over what determines tokens."""
    content = {
        "version": VERSION,
        "seq_len": seq_len,
        "eot_id": eot_id,
        "tokenizer": [tokenizer.vocab_size, tokenizer.sha256],
        "train": [[s.rows, s.rows_sha256] for s in train.shards],
        "heldout": [[s.rows, s.rows_sha256] for s in heldout.shards],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Atomically: a folder with a manifest is complete."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1) + "\n"
    write_atomically(os.path.join(folder, MANIFEST), text.encode())


def write_atomically(path: str, content: bytes) -> None:
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_manifest(folder: str) -> Manifest:
    """Raises ConfigError when `folder` is not a complete prepared folder or its manifest was altered."""
    path = os.path.join(folder, MANIFEST)
    again = "delete the folder and run `maxlm data prepare` again"
    require(os.path.isdir(folder), f"data.path={folder!r} does not exist: make it with `maxlm data prepare`")
    require(os.path.isfile(path), f"data.path={folder!r} has no {MANIFEST}: run `maxlm data prepare INPUT... --out "
            f"{folder}` (again, if it was interrupted: it continues)")
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{path} is corrupted (not JSON): {again}") from None
    version = values.get("version") if isinstance(values, dict) else None
    require(version in (None, VERSION), f"{path} has version {version}, this maxlm reads {VERSION}: prepare it again")
    try:
        manifest = Manifest(
            **{
                **values,
                "tokenizer": TokenizerInfo(**values["tokenizer"]),
                "train": _split(Split, values["train"]),
                "heldout": _split(HeldoutSplit, values["heldout"]),
                "sources": tuple(SourceInfo(**source) for source in values["sources"]),
            }
        )
        digest = content_digest(
            manifest.seq_len, manifest.eot_id, manifest.tokenizer, manifest.train, manifest.heldout
        )
        require(digest == manifest.digest, f"{path} is corrupted (its digest does not match its content): {again}")
    except (TypeError, KeyError, AttributeError):
        raise ConfigError(f"{path} is corrupted (fields missing or unknown): {again}") from None
    return manifest


def _split(kind: type[Split], values: dict[str, Any]) -> Any:
    return kind(**{**values, "shards": tuple(Shard(**shard) for shard in values["shards"])})


def check_shards(folder: str, manifest: Manifest, *, verify: bool = False) -> None:
    """Checks that every shard is there with its size; `verify` also reads them all and compares SHA-256.

    Raises ConfigError naming the first shard that is missing, truncated or altered.
    """
    again = "delete the folder and run `maxlm data prepare` again"
    for shard in (*manifest.train.shards, *manifest.heldout.shards):
        path = os.path.join(folder, shard.file)
        require(os.path.isfile(path), f"{path} is missing: run the `maxlm data prepare` of this folder again")
        size = os.path.getsize(path)
        require(size == shard.size, f"{path} has {size} bytes, its manifest says {shard.size}: {again}")
        if verify:
            require(file_sha256(path) == shard.sha256, f"{path} does not match its SHA-256 in the manifest: {again}")


def file_sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
