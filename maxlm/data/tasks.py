"""What one worker does at a time in `prepare`: scan a unit, encode a unit, pack a shard, compress held-out text.

Each is a pure function of a picklable task. Encoded units and shards are files in the work folder, written under a
temporary name and renamed, with a small `.done` record that says which task made them: that is what a restart reuses.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import lzma
import os
import pickle
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from maxlm.data.documents import read_documents
from maxlm.data.manifest import Shard, file_sha256, write_atomically
from maxlm.data.packing import best_fit, cut_documents, fill_rows
from maxlm.data.rows import RowFormat, token_dtype
from maxlm.data.sources import Unit
from maxlm.data.tokenizer import load_tokenizer
from maxlm.schema import require

SPLITS = ("train", "heldout")
METHODS = ("gzip", "xz")
KINDS = ("tokens", "bytes", "text")
_SAMPLE_PIECE_BYTES = 8 << 10
_ENCODE_BATCH_BYTES = 1 << 20
_ROWS_AT_ONCE_TOKENS = 1 << 22


@dataclass(frozen=True)
class Scan:
    """Hash the documents of `unit` and draw pieces of text from each with probability `sample_fraction`.

    Pieces come from the first 1 - `sample_skips_last` of a document (see EncodeTask.cut_fraction).
    """

    unit: Unit
    text_field: str
    sample_fraction: float
    sample_skips_last: float


@dataclass(frozen=True)
class Scanned:
    """hashes: uint64 [N, 2], first half of each SHA-256. sizes: int64 [N], bytes. sample: (document, text) pieces."""

    hashes: np.ndarray
    sizes: np.ndarray
    sample: list[tuple[int, str]]
    skipped: Counter[str]


def scan(task: Scan) -> Scanned:
    """Raises ConfigError for what read_documents refuses."""
    hashes, sizes, sample = [], [], []
    skipped: Counter[str] = Counter()
    for _, data in read_documents(task.unit, task.text_field, lambda reason: skipped.update([reason])):
        digest = hashlib.sha256(data).digest()[:16]
        if task.sample_fraction > 0:
            sample += [(len(hashes), text) for text in _pieces(data, digest, task)]
        hashes.append(digest)
        sizes.append(len(data))
    words = np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 2)
    return Scanned(words, np.array(sizes, np.int64), sample, skipped)


def _pieces(data: bytes, digest: bytes, task: Scan) -> Iterator[str]:
    draw = random.Random(digest)
    end = int(len(data) * (1 - task.sample_skips_last))
    for start in range(0, end, _SAMPLE_PIECE_BYTES):
        if draw.random() < task.sample_fraction:
            # A cut through a character loses at most 3 bytes of it.
            yield data[start : min(start + _SAMPLE_PIECE_BYTES, end)].decode(errors="ignore")


@dataclass(frozen=True)
class EncodeTask:
    """Tokenize the kept documents of `unit` into `folder`/`name`.*.

    keep, heldout: bool [N] over the unit's documents. expected: SHA-256 of all their hashes, as scanned.
    cut_fraction: above 0, the last such share of each document is held out (for a corpus of a single document).
    """

    unit: Unit
    text_field: str
    tokenizer: str
    tokenizer_sha256: str
    folder: str
    name: str
    keep: np.ndarray
    heldout: np.ndarray
    expected: str
    cut_fraction: float

    def output(self, split: str, kind: str) -> str:
        """Path of the split's 'tokens', their 'bytes' (empty where a table gives them) or its 'text' (heldout)."""
        return os.path.join(self.folder, f"{self.name}.{split}.{kind}")

    @property
    def outputs(self) -> list[str]:
        return [self.output(split, kind) for split in SPLITS for kind in KINDS]


@dataclass(frozen=True)
class Encoded:
    """Per split: token count of each document (its two EOTs included), and UTF-8 bytes in all."""

    lengths: dict[str, np.ndarray]
    bytes: dict[str, int]


def encode(task: EncodeTask) -> Encoded:
    """Raises ConfigError when the unit no longer reads as it was scanned, or text does not survive the tokenizer."""
    return _once(task, _encode)


def _encode(task: EncodeTask) -> Encoded:
    tokenizer = load_tokenizer(task.tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    eot, none = np.array([tokenizer.eot_id], dtype), np.zeros(1, np.uint16)
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    total = dict.fromkeys(SPLITS, 0)
    files = {(split, kind): open(task.output(split, kind) + ".tmp", "wb") for split in SPLITS for kind in KINDS}
    try:
        for batch in _batches(_kept(task)):
            encoded = tokenizer.encode_batch_bytes([data.decode() for _, data in batch])
            for (split, data), (ids, widths) in zip(batch, encoded, strict=True):
                require(int(widths.sum()) == len(data), f"tokenizer {task.tokenizer!r} loses text: "
                        f"{int(widths.sum())} of a document's {len(data)} bytes are in its tokens")
                files[split, "tokens"].write(np.concatenate([eot, ids.astype(dtype), eot]).tobytes())
                if tokenizer.token_bytes is None:
                    files[split, "bytes"].write(np.concatenate([none, widths.astype(np.uint16), none]).tobytes())
                if split == "heldout":
                    files[split, "text"].write(data)
                lengths[split].append(len(ids) + 2)
                total[split] += len(data)
    finally:
        for file in files.values():
            file.close()
    for path in task.outputs:
        os.replace(path + ".tmp", path)
    return Encoded({split: np.array(values, np.int64) for split, values in lengths.items()}, total)


def _kept(task: EncodeTask) -> Iterator[tuple[str, bytes]]:
    """(split, bytes) of each kept document."""
    seen = hashlib.sha256()
    count = 0
    for _, data in read_documents(task.unit, task.text_field, lambda reason: None):
        seen.update(hashlib.sha256(data).digest()[:16])
        if count < len(task.keep) and task.keep[count]:
            cut = _cut_at_line(data, task.cut_fraction) if task.cut_fraction else len(data)
            yield ("heldout" if task.heldout[count] else "train"), data[:cut]
            if cut < len(data):
                yield "heldout", data[cut:]
        count += 1
    changed = f"{task.unit.entries[0][1]} or a file after it changed while it was being prepared: run the command again"
    require(count == len(task.keep) and seen.hexdigest() == task.expected, changed)


def _cut_at_line(data: bytes, fraction: float) -> int:
    """Where the last `fraction` of `data` begins: after a line break, or else between two characters."""
    wanted = int(len(data) * (1 - fraction))
    cut = data.find(b"\n", wanted) + 1 or wanted
    while cut < len(data) and data[cut] & 0xC0 == 0x80:
        cut += 1
    return cut or len(data)


def _batches(documents: Iterator[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    batch: list[tuple[str, bytes]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= _ENCODE_BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class PackTask:
    """Pack consecutive documents into one shard `out`/`name`.

    parts: (token file, byte-width file, documents' token counts int64 [n], first token) of each unit's share.
    content: the keys of the tasks that wrote those files.
    """

    parts: tuple[tuple[str, str, np.ndarray, int], ...]
    content: tuple[str, ...]
    tokenizer: str
    seq_len: int
    out: str
    name: str
    folder: str
    seed: int

    @property
    def outputs(self) -> list[str]:
        return [os.path.join(self.out, self.name)]


@dataclass(frozen=True)
class Packed:
    shard: Shard
    tokens: int
    used: int


def pack(task: PackTask) -> Packed:
    """Rows come in an order drawn from `seed`, so that the first of them are no longer than the rest."""
    return _once(task, _pack)


def _pack(task: PackTask) -> Packed:
    from array_record.python.array_record_module import ArrayRecordWriter

    tokenizer = load_tokenizer(task.tokenizer)
    fmt = RowFormat(task.seq_len, tokenizer.vocab_size, tokenizer.eot_id)
    stream, widths = _streams(task, tokenizer.token_bytes, token_dtype(tokenizer.vocab_size))
    lengths = np.concatenate([part[2] for part in task.parts])
    pieces = cut_documents(lengths, fmt.capacity)
    placement = best_fit(pieces.lengths, fmt.capacity)
    order = np.random.default_rng(task.seed).permutation(placement.num_rows)
    placement = type(placement)(order[placement.rows], placement.columns, placement.num_rows)

    path = os.path.join(task.out, task.name)
    content = hashlib.sha256()
    writer = ArrayRecordWriter(f"{path}.tmp", "group_size:1,uncompressed")
    by_row = np.argsort(placement.rows, kind="stable")
    rows_sorted = placement.rows[by_row]
    at_once = max(1, _ROWS_AT_ONCE_TOKENS // fmt.capacity)
    for first in range(0, placement.num_rows, at_once):
        count = min(at_once, placement.num_rows - first)
        low, high = np.searchsorted(rows_sorted, [first, first + count])
        block = type(placement)(placement.rows - first, placement.columns, count)
        records = fill_rows(pieces, block, by_row[low:high], stream, widths, fmt)
        content.update(records)
        for record in records:
            writer.write(record.tobytes())
    writer.close()
    _check_written(f"{path}.tmp", placement.num_rows)
    shard = Shard(task.name, placement.num_rows, os.path.getsize(f"{path}.tmp"), file_sha256(f"{path}.tmp"),
                  content.hexdigest())
    os.replace(f"{path}.tmp", path)
    return Packed(shard, int((pieces.lengths - 1).sum()), int(pieces.lengths.sum()))


def _streams(task: PackTask, token_bytes: np.ndarray | None, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    stream = np.concatenate(
        [np.fromfile(tokens, dtype, int(n.sum()), offset=first * dtype.itemsize) for tokens, _, n, first in task.parts]
    )
    if token_bytes is not None:
        return stream, token_bytes[stream]
    return stream, np.concatenate(
        [np.fromfile(widths, np.uint16, int(n.sum()), offset=first * 2) for _, widths, n, first in task.parts]
    )


def _check_written(path: str, rows: int) -> None:
    """The writer reports no error on a full disk: count what can be read back."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path)
    written = reader.num_records()
    reader.close()
    if written != rows:
        raise OSError(28, f"only {written} of {rows} rows could be written (no space left?)", path)


@dataclass(frozen=True)
class CompressTask:
    """Bits per byte of the `files`' text joined, at most `cap` bytes, by `method` (one of METHODS) at level 9."""

    method: str
    files: tuple[str, ...]
    cap: int


def compress(task: CompressTask) -> tuple[int, float]:
    """Bytes compressed, and bits per byte."""
    text = bytearray()
    for path in task.files:
        with open(path, "rb") as file:
            text += file.read(task.cap - len(text))
    packed = gzip.compress(text, 9, mtime=0) if task.method == "gzip" else lzma.compress(text, preset=9)
    return len(text), 8 * len(packed) / len(text)


def finish(task: PackTask | CompressTask) -> Any:
    """`pack` or `compress`."""
    return pack(task) if isinstance(task, PackTask) else compress(task)


def _once(task: Any, function: Any) -> Any:
    """The recorded result if this very task already ran in this work folder, else runs and records it."""
    done = os.path.join(task.folder, f"{task.name}.done")
    key = task_key(task)
    try:
        with open(done, "rb") as file:
            recorded_key, sizes, result = pickle.load(file)
        if recorded_key == key and sizes == [os.path.getsize(path) for path in task.outputs]:
            return result
    except (OSError, EOFError, pickle.UnpicklingError):
        pass
    result = function(task)
    write_atomically(done, pickle.dumps((key, [os.path.getsize(path) for path in task.outputs], result)))
    return result


def task_key(task: Any) -> str:
    """SHA-256 of a task's fields by value (a pickle also depends on which of them are the same object)."""
    key = hashlib.sha256()

    def update(value: Any) -> None:
        if isinstance(value, np.ndarray):
            key.update(f"{value.dtype.str}{value.shape}".encode() + value.tobytes())
        elif isinstance(value, (tuple, list)):
            key.update(f"{len(value)}:".encode())
            for item in value:
                update(item)
        else:
            key.update(repr(value).encode() + b"\0")

    update([getattr(task, field.name) for field in dataclasses.fields(task)])
    return key.hexdigest()
