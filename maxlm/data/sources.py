"""Where text comes from: named sources, files, folders and archives, found and split into units of work.

A unit is what one worker reads in one go: some plain files, a byte range of a JSONL file, row groups of a Parquet
file, or one compressed file. Units, and documents inside them, have one fixed order. documents.py reads them.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from maxlm.schema import ConfigError, require

NAMED_SOURCES = ("python-stdlib", "installed-packages")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
_MIN_UNIT_BYTES, _MAX_UNIT_BYTES = 4 << 20, 256 << 20


@dataclass(frozen=True)
class Unit:
    """Work for one reader. `entries` are (document id, path); `start` and `stop` are bytes or row groups.

    explicit: the user named this very file, so what cannot be used in it is an error and not skipped.
    """

    kind: str  # 'files', 'jsonl', 'parquet', 'compressed', 'archive'
    source: int  # index into Corpus.sources
    entries: tuple[tuple[str, str], ...]
    start: int = 0
    stop: int = 0
    explicit: bool = False


@dataclass
class Source:
    """What the manifest says about one input: its name, version, and the versions of packages read."""

    name: str
    version: str | None = None
    packages: dict[str, str] = field(default_factory=dict)


@dataclass
class Corpus:
    """Everything to read. `fingerprint` changes when a file appears, disappears, or changes size or time."""

    sources: list[Source]
    units: list[Unit]
    fingerprint: str
    total_bytes: int


@dataclass(frozen=True)
class _File:
    id: str
    path: str
    size: int
    mtime_ns: int
    source: int
    explicit: bool


def discover(inputs: Sequence[str], source: str | None) -> Corpus:
    """Finds every file of `inputs` (files, folders, archives) and of the named `source`, reading none of them
    but the footers of Parquet files. Raises ConfigError for a missing, unreadable or empty input."""
    require(bool(inputs) or source is not None, "nothing to prepare: give files or folders, or --source "
            + " or --source ".join(NAMED_SOURCES))
    sources: list[Source] = []
    files: list[_File] = []
    if source is not None:
        described, found = _named_source(source)
        sources.append(described)
        files += [_stat(id, path, 0, False) for id, path in found]
    for given in inputs:
        sources.append(Source(given))
        files += _given(given, len(sources) - 1)
    require(bool(files), f"no files in {', '.join(s.name for s in sources)}")
    fingerprint = hashlib.sha256()
    for f in files:
        fingerprint.update(f"{f.id}\0{f.size}\0{f.mtime_ns}\n".encode("utf-8", "surrogateescape"))
    total = sum(f.size for f in files)
    return Corpus(sources, list(_units(files, total)), fingerprint.hexdigest(), total)


def _stat(id: str, path: str, source: int, explicit: bool) -> _File:
    try:
        info = os.stat(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    return _File(id, path, info.st_size, info.st_mtime_ns, source, explicit)


def _given(given: str, source: int) -> list[_File]:
    require(os.path.exists(given), f"{given} does not exist: give a file, a folder or an archive of text")
    if not os.path.isdir(given):
        require(os.path.isfile(given), f"{given} is neither a file nor a folder")
        require(os.access(given, os.R_OK), f"{given} cannot be read: Permission denied")
        require(os.path.getsize(given) > 0, f"{given} is empty: there is nothing to prepare in it")
        return [_stat(os.path.basename(given), given, source, True)]
    return [_stat(os.path.relpath(path, given), path, source, False) for path in _walk(given)]


def _walk(folder: str, skip: tuple[str, ...] = (), suffix: str = "") -> Iterator[str]:
    """Regular files below `folder` in name order, hidden files and folders left out."""

    def refuse(error: OSError) -> None:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(parent, name)
            if name.startswith(".") or not name.endswith(suffix) or not os.path.exists(path):
                continue
            if stat.S_ISREG(os.stat(path).st_mode):
                yield path


def _named_source(name: str) -> tuple[Source, list[tuple[str, str]]]:
    require(name in NAMED_SOURCES, f"unknown data source {name!r}: choose one of {', '.join(NAMED_SOURCES)}")
    if name == "python-stdlib":
        # The base interpreter's folder, whatever virtual environment runs this.
        root = sysconfig.get_path("stdlib")
        paths = _walk(root, ("site-packages", "dist-packages", "__pycache__"), ".py")
        version = ".".join(map(str, sys.version_info[:3]))
        return Source(name, version), [(os.path.relpath(path, root), path) for path in paths]
    import importlib.metadata

    packages: dict[str, str] = {}
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        package = distribution.metadata["Name"]
        if not package or package in packages:
            continue  # a second copy further down sys.path is not what would be imported
        packages[package] = distribution.version
        for file in distribution.files or ():
            path = os.path.realpath(distribution.locate_file(file))
            if file.name.endswith(".py") and os.path.isfile(path):
                found[f"{package}/{file.as_posix()}"] = path
    return Source(name, None, dict(sorted(packages.items()))), sorted(found.items())


def _units(files: Sequence[_File], total_bytes: int) -> Iterator[Unit]:
    """Units of about equal size, in the order of `files`; their cut depends on the files alone."""
    target = min(max(total_bytes // 1024, _MIN_UNIT_BYTES), _MAX_UNIT_BYTES)
    plain: list[_File] = []
    plain_bytes = 0

    def flush() -> Iterator[Unit]:
        if plain:
            entries = tuple((f.id, f.path) for f in plain)
            yield Unit("files", plain[0].source, entries, explicit=plain[0].explicit)
            plain.clear()

    for f in files:
        kind = kind_of(f.path)
        if kind != "files" or (plain and (plain[0].source != f.source or plain_bytes >= target)):
            yield from flush()
            plain_bytes = 0
        entry = ((f.id, f.path),)
        if kind == "files":
            plain.append(f)
            plain_bytes += f.size
        elif kind == "jsonl":
            for start in range(0, f.size, target):
                yield Unit(kind, f.source, entry, start, min(start + target, f.size), f.explicit)
        elif kind == "parquet":
            for start, stop in _row_groups(f, target):
                yield Unit(kind, f.source, entry, start, stop, f.explicit)
        else:
            yield Unit(kind, f.source, entry, explicit=f.explicit)
    yield from flush()


def kind_of(path: str) -> str:
    """How a file is read, by its name."""
    name = path.lower()
    if name.endswith(ARCHIVES):
        return "archive"
    if name.endswith(COMPRESSED):
        return "compressed"
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "files"


def open_parquet(path: str) -> Any:
    """A `pyarrow.parquet.ParquetFile`. Raises ConfigError when it is not one."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _row_groups(f: _File, target: int) -> Iterator[tuple[int, int]]:
    metadata = open_parquet(f.path).metadata
    start = size = 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= target or group == metadata.num_row_groups - 1:
            yield start, group + 1
            start, size = group + 1, 0
