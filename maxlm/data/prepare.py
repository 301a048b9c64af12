"""`maxlm data prepare`: text of any kind to packed, hashed token shards.

Four phases: scan (hash every document, which finds duplicates and decides the split), train the tokenizer if one is
asked for, encode, pack. All but training run over processes. The manifest is written last, so a folder is complete or
has none; the same command run again after a kill reuses the units and shards that were finished.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maxlm.config import DataConfig
from maxlm.data.manifest import (
    MANIFEST,
    TOKENIZER,
    VERSION,
    HeldoutSplit,
    Manifest,
    SourceInfo,
    Split,
    TokenizerInfo,
    check_shards,
    content_digest,
    load_manifest,
    write_atomically,
    write_manifest,
)
from maxlm.data.progress import Progress
from maxlm.data.sources import NAMED_SOURCES, Corpus, discover
from maxlm.data.tasks import (
    METHODS,
    SPLITS,
    CompressTask,
    Encoded,
    EncodeTask,
    Packed,
    PackTask,
    Scan,
    Scanned,
    encode,
    finish,
    scan,
    task_key,
)
from maxlm.data.tokenizer import Tokenizer, bpe_size, load_tokenizer, train_bpe
from maxlm.data.workers import run_tasks, usable_cores
from maxlm.schema import ConfigError, require

_WORK = ".work"
_SAMPLE_BYTES = 16 << 20  # of training text that a BPE is trained on
_COMPARED_BYTES = 64 << 20  # of held-out text that gzip and xz compress
_MIN_SHARD_TOKENS, _MAX_SHARD_TOKENS = 1 << 22, 1 << 26


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str],
    tokenizer: str,
    seq_len: int,
    source: str | None = None,
    heldout_fraction: float = 0.02,
    workers: int | None = None,
    text_field: str = "text",
    shard_rows: int | None = None,
    show_progress: bool = True,
) -> Manifest:
    """Prepares `inputs` (files, folders, archives) and the named `source` into the folder `out`.

    tokenizer: 'bytes', 'bpe:SIZE' (trained here) or a Hugging Face tokenizer.json. seq_len: predictions a row.
    heldout_fraction: share of the documents, chosen by a hash of their content, kept for evaluation. workers:
    processes (all cores). shard_rows: rows a shard, about. A complete folder from the same command returns at once.
    Raises ConfigError for inputs that cannot be used and for a folder that holds other data.
    """
    inputs, out = [os.fspath(path) for path in inputs], os.fspath(out)
    require(seq_len >= 1, f"--seq-len {seq_len} must be 1 or more")
    require(0 < heldout_fraction < 1, f"--heldout-fraction {heldout_fraction} must be between 0 and 1")
    require(workers is None or workers >= 1, f"--workers {workers} must be 1 or more")
    require(shard_rows is None or shard_rows >= 1, f"--shard-rows {shard_rows} must be 1 or more")
    request = _request(inputs, source, tokenizer, seq_len, heldout_fraction, text_field, shard_rows)
    corpus = discover(inputs, source)
    try:
        with _locked(out):
            if os.path.exists(os.path.join(out, MANIFEST)):
                return _already_complete(out, request, corpus)
            _begin_work(out, request)
            with Progress(show_progress) as progress:
                manifest = _Preparation(corpus, request, out, workers or usable_cores(), progress).run()
            shutil.rmtree(os.path.join(out, _WORK))
            return manifest
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise ConfigError(f"cannot prepare into {out}: {where}{error.strerror or error}") from None


def ensure_source(data: DataConfig, seq_len: int, out_dir: str | os.PathLike[str]) -> str:
    """`out_dir`, prepared from `data.source` (a named source, or a path to text) unless it already is.

    A complete folder is used as it is, even if the source changed since: a run goes on with the data it began with.
    One process a job should call it. Raises ConfigError when the folder holds data prepared with other settings.
    """
    assert data.source is not None
    out_dir = os.fspath(out_dir)
    named = data.source in NAMED_SOURCES
    inputs, source = ([], data.source) if named else ([data.source], None)
    if os.path.exists(os.path.join(out_dir, MANIFEST)):
        request = _request(inputs, source, data.tokenizer, seq_len, data.heldout_fraction, "text", None)
        _check_same_request(out_dir, load_manifest(out_dir).request, request)
        return out_dir
    require(named or os.path.exists(data.source), f"data.source={data.source!r} is not one of "
            f"{', '.join(NAMED_SOURCES)} and not a path that exists")
    prepare(inputs, source=source, out=out_dir, tokenizer=data.tokenizer, seq_len=seq_len,
            heldout_fraction=data.heldout_fraction)
    return out_dir


def _request(
    inputs: Sequence[str], source: str | None, tokenizer: str, seq_len: int, heldout_fraction: float, text_field: str,
    shard_rows: int | None,
) -> dict[str, Any]:
    if bpe_size(tokenizer) is None:
        loaded = load_tokenizer(tokenizer)
        tokenizer = tokenizer if tokenizer == "bytes" else f"{os.path.abspath(tokenizer)} sha256:{loaded.sha256[:16]}"
    return {
        "inputs": [os.path.abspath(path) for path in inputs],
        "source": source,
        "tokenizer": tokenizer,
        "seq_len": seq_len,
        "heldout_fraction": heldout_fraction,
        "text_field": text_field,
        "shard_rows": shard_rows,
    }


@contextlib.contextmanager
def _locked(out: str) -> Iterator[None]:
    """One process at a time in `out`; the lock goes with its process, however that ends."""
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is preparing data in {out}: wait, or give another --out") from None
        yield


def _check_same_request(out: str, held: dict[str, Any], asked: dict[str, Any]) -> None:
    differing = [f"{key} {held.get(key)!r} (asked: {asked[key]!r})" for key in asked if held.get(key) != asked[key]]
    require(not differing, f"{out} holds data prepared with {', '.join(differing)}: give another folder, or delete it")


def _already_complete(out: str, request: dict[str, Any], corpus: Corpus) -> Manifest:
    manifest = load_manifest(out)
    _check_same_request(out, manifest.request, request)
    require(manifest.inputs_fingerprint == corpus.fingerprint, f"{out} was prepared from the same inputs, but files in "
            "them were added, removed or changed since: give another folder, or delete it")
    check_shards(out, manifest)
    shutil.rmtree(os.path.join(out, _WORK), ignore_errors=True)
    return manifest


def _begin_work(out: str, request: dict[str, Any]) -> None:
    """Makes the work folder, or takes it over from an interrupted run of the same command."""
    path = os.path.join(out, _WORK, "request.json")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            _check_same_request(out, json.load(file), request)
        return
    foreign = sorted(set(os.listdir(out)) - {_WORK, ".lock"})
    require(not foreign, f"{out} is not empty (it has {', '.join(foreign[:3])}): give a new folder")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_atomically(path, json.dumps(request, indent=1).encode())


@dataclass
class _Selection:
    """Which documents are used: per unit, bool [N] of those kept and of those held out."""

    keep: list[np.ndarray]
    heldout: list[np.ndarray]
    duplicates: int
    cut_fraction: float  # above 0: the only document is cut in two


class _Preparation:
    """One run of the four phases over one corpus."""

    def __init__(self, corpus: Corpus, request: dict[str, Any], out: str, workers: int, progress: Progress):
        self._corpus, self._request, self._out = corpus, request, out
        self._workers, self._progress = workers, progress
        self._work = os.path.join(out, _WORK)

    def run(self) -> Manifest:
        scanned = self._scan()
        selection = _select(scanned, self._request["heldout_fraction"])
        require(any(kept.any() for kept in selection.keep), "nothing usable in "
                f"{', '.join(s.name for s in self._corpus.sources)}: {_skipped_words(scanned)}")
        tokenizer, spec = self._tokenizer(scanned, selection)
        tasks, encoded = self._encode(scanned, selection, spec, tokenizer.sha256)
        train, heldout = self._pack(tasks, encoded, spec)
        manifest = self._manifest(scanned, selection, tokenizer, train, heldout)
        check_shards(self._out, manifest)
        write_manifest(self._out, manifest)
        return manifest

    def _run(self, name: str, function: Any, tasks: Sequence[Any]) -> list[Any]:
        self._progress.phase(name, len(tasks))
        results: list[Any] = [None] * len(tasks)
        for index, result in run_tasks(function, tasks, self._workers):
            results[index] = result
            self._progress.advance(1)
        return results

    def _scan(self) -> list[Scanned]:
        wanted = bpe_size(self._request["tokenizer"]) is not None
        fraction = min(1.0, _SAMPLE_BYTES / max(1, self._corpus.total_bytes)) if wanted else 0.0
        skips = self._request["heldout_fraction"]
        tasks = [Scan(unit, self._request["text_field"], fraction, skips) for unit in self._corpus.units]
        return self._run(f"Read {self._corpus.total_bytes / 1e6:,.0f} MB", scan, tasks)

    def _tokenizer(self, scanned: list[Scanned], selection: _Selection) -> tuple[Tokenizer, str]:
        """The tokenizer, and what load_tokenizer takes to load it in a worker."""
        path = os.path.join(self._out, TOKENIZER)
        spec = self._request["tokenizer"].split(" sha256:")[0]
        size = bpe_size(spec)
        if size is None:
            tokenizer = load_tokenizer(spec)
            if spec == "bytes":
                return tokenizer, spec
        else:
            self._progress.phase(f"Train a BPE of {size:,}", 1)
            texts = _training_sample(scanned, selection)
            tokenizer = train_bpe(texts, size)
        tokenizer.save(path)
        return tokenizer, path

    def _encode(
        self, scanned: list[Scanned], selection: _Selection, spec: str, sha256: str
    ) -> tuple[list[EncodeTask], list[Encoded]]:
        tasks = [
            EncodeTask(unit, self._request["text_field"], spec, sha256, self._work, f"unit-{i:06d}",
                       selection.keep[i], selection.heldout[i], hashlib.sha256(scanned[i].hashes.tobytes()).hexdigest(),
                       selection.cut_fraction)
            for i, unit in enumerate(self._corpus.units)
        ]
        return tasks, self._run("Tokenize", encode, tasks)

    def _pack(self, units: list[EncodeTask], encoded: list[Encoded], spec: str) -> tuple[Split, HeldoutSplit]:
        packs = {split: self._pack_tasks(split, units, encoded, spec) for split in SPLITS}
        texts = tuple(unit.output("heldout", "text") for unit in units)
        compressions = [CompressTask(method, texts, _COMPARED_BYTES) for method in METHODS if packs["heldout"]]
        results = self._run("Pack", finish, [*compressions, *packs["train"], *packs["heldout"]])
        compressed = [results.pop(0) for _ in compressions] or [(0, None)] * len(METHODS)
        train, heldout = results[: len(packs["train"])], results[len(packs["train"]) :]
        seq_len = self._request["seq_len"]
        return Split(**_counts("train", encoded, train, seq_len)), HeldoutSplit(
            **_counts("heldout", encoded, heldout, seq_len),
            compressed_bytes=compressed[0][0],
            gzip9_bits_per_byte=compressed[0][1],
            xz9_bits_per_byte=compressed[1][1],
        )

    def _manifest(
        self, scanned: list[Scanned], selection: _Selection, tokenizer: Tokenizer, train: Split, heldout: HeldoutSplit
    ) -> Manifest:
        seq_len, eot_id = self._request["seq_len"], tokenizer.eot_id
        info = TokenizerInfo(tokenizer.name, tokenizer.vocab_size, tokenizer.sha256)
        return Manifest(
            version=VERSION,
            digest=content_digest(seq_len, eot_id, info, train, heldout),
            seq_len=seq_len,
            eot_id=eot_id,
            tokenizer=info,
            train=train,
            heldout=heldout,
            sources=tuple(self._source_infos(scanned, selection)),
            skipped=dict(sorted(sum((s.skipped for s in scanned), Counter()).items())),
            duplicates=selection.duplicates,
            request=self._request,
            inputs_fingerprint=self._corpus.fingerprint,
        )

    def _pack_tasks(self, split: str, units: list[EncodeTask], encoded: list[Encoded], spec: str) -> list[PackTask]:
        """Shards of consecutive documents, by token count, whatever units those lie in."""
        lengths = [result.lengths[split] for result in encoded]
        total = int(sum(n.sum() for n in lengths))
        seq_len, shard_rows = self._request["seq_len"], self._request["shard_rows"]
        target = shard_rows * seq_len if shard_rows else min(max(total // 256, _MIN_SHARD_TOKENS), _MAX_SHARD_TOKENS)
        shards: dict[int, list[tuple[str, str, np.ndarray, int]]] = {}
        content: dict[int, list[str]] = {}
        before = 0
        for unit, n in zip(units, lengths, strict=True):
            ends = np.cumsum(n)
            key = task_key(unit)
            shard_of = (before + ends - n) // target
            for shard in np.unique(shard_of):
                mine = shard_of == shard
                first = int((ends - n)[mine][0])
                files = unit.output(split, "tokens"), unit.output(split, "bytes")
                shards.setdefault(int(shard), []).append((*files, n[mine], first))
                content.setdefault(int(shard), []).append(key)
            before += int(n.sum())
        return [
            PackTask(tuple(shards[shard]), tuple(content[shard]), spec, seq_len, self._out,
                     f"{split}-{i:05d}.arrayrecord", self._work, i)
            for i, shard in enumerate(sorted(shards))
        ]

    def _source_infos(self, scanned: list[Scanned], selection: _Selection) -> Iterator[SourceInfo]:
        for i, source in enumerate(self._corpus.sources):
            mine = [j for j, unit in enumerate(self._corpus.units) if unit.source == i]
            hashes = hashlib.sha256()
            for j in mine:
                hashes.update(scanned[j].hashes[selection.keep[j]].tobytes())
            yield SourceInfo(
                source.name, source.version, source.packages, int(sum(selection.keep[j].sum() for j in mine)),
                int(sum(scanned[j].sizes[selection.keep[j]].sum() for j in mine)), hashes.hexdigest(),
            )


def _select(scanned: list[Scanned], heldout_fraction: float) -> _Selection:
    """Keeps the first of identical documents; holds out those whose hash is below the fraction.

    A corpus too small for that to hold out any gives its document of lowest hash; a lone document is cut in two.
    """
    hashes = np.concatenate([s.hashes for s in scanned]) if scanned else np.zeros((0, 2), np.uint64)
    keep = np.zeros(len(hashes), np.bool_)
    keep[np.unique(hashes.view("V16").reshape(-1), return_index=True)[1]] = True
    heldout = keep & (hashes[:, 0] < np.uint64(min(int(heldout_fraction * 2**64), 2**64 - 1)))
    kept = np.flatnonzero(keep)
    if len(kept) > 1 and not heldout.any():
        heldout[kept[np.argmin(hashes[kept, 0])]] = True
    if len(kept) == 1:
        heldout[:] = False
    require(len(kept) == 0 or len(kept) > heldout.sum(), f"heldout_fraction={heldout_fraction} holds out all "
            f"{len(kept)} documents: lower it or give more text")
    cuts = np.cumsum([len(s.hashes) for s in scanned])[:-1]
    return _Selection(np.split(keep, cuts), np.split(heldout, cuts), int(len(hashes) - len(kept)),
                      heldout_fraction if len(kept) == 1 else 0.0)


def _training_sample(scanned: list[Scanned], selection: _Selection) -> list[str]:
    """Pieces of kept training documents, in order, up to the byte limit."""
    pieces = [
        text
        for s, keep, heldout in zip(scanned, selection.keep, selection.heldout, strict=True)
        for document, text in s.sample
        if keep[document] and not heldout[document]
    ]
    total = sum(map(len, pieces))
    stride = max(1, -(-total // (2 * _SAMPLE_BYTES)))  # compressed inputs hold more text than their size told
    return pieces[::stride]


def _counts(split: str, encoded: list[Encoded], packed: list[Packed], seq_len: int) -> dict[str, Any]:
    """The fields of `Split`."""
    rows = sum(p.shard.rows for p in packed)
    return {
        "documents": sum(len(e.lengths[split]) for e in encoded),
        "tokens": sum(p.tokens for p in packed),
        "bytes": sum(e.bytes[split] for e in encoded),
        "rows": rows,
        "padding_fraction": 1 - sum(p.used for p in packed) / (rows * (seq_len + 1)) if rows else 0.0,
        "shards": tuple(p.shard for p in packed),
    }


def _skipped_words(scanned: list[Scanned]) -> str:
    skipped = sum((s.skipped for s in scanned), Counter())
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items())) or "no documents found"
