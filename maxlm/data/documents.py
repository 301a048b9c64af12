"""Reads the documents of a unit (sources.py) as UTF-8 bytes, and says why it leaves one out."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from maxlm.data.sources import COMPRESSED, Unit, kind_of, open_parquet
from maxlm.schema import ConfigError

_BROKEN = (OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError, zipfile.BadZipFile, RuntimeError)


def unusable(data: bytes) -> str:
    """Why a file's content is no document ('empty', 'binary', 'not UTF-8'), or ''."""
    if not data:
        return "empty"
    if b"\0" in data:
        return "binary"
    try:
        data.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    return ""


def read_documents(unit: Unit, text_field: str, skip: Callable[[str], None]) -> Iterator[tuple[str, bytes]]:
    """Yields (id, UTF-8 bytes) of every usable document of `unit`, in its fixed order.

    Calls `skip(reason)` for each document left out. Raises ConfigError for a file that cannot be read, and for an
    unusable document where the user named its file.
    """
    readers = {"files": _plain_files, "jsonl": _jsonl_range, "parquet": _parquet, "archive": _archive,
               "compressed": _compressed}
    for id, data, reason in readers[unit.kind](unit, text_field):
        if not reason:
            yield id, data
        elif unit.explicit and unit.kind != "archive" and reason != "empty":
            raise ConfigError(f"{id} is {reason}: give UTF-8 text, JSONL, Parquet or an archive of these")
        else:
            skip(reason)


_Found = Iterator[tuple[str, bytes, str]]  # id, data, why it is unusable


def _plain_files(unit: Unit, text_field: str) -> _Found:
    del text_field
    for id, path in unit.entries:
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        yield (path if unit.explicit else id), data, unusable(data)


def _jsonl_range(unit: Unit, text_field: str) -> _Found:
    """The lines that start inside [start, stop): a line across the end belongs to the range it starts in."""
    [(_, path)] = unit.entries
    try:
        with open(path, "rb") as file:
            if unit.start > 0:
                file.seek(unit.start - 1)
                file.readline()
            yield from _json_lines(file, path, text_field, file.tell(), unit.stop)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _json_lines(file: Any, name: str, text_field: str, position: int = 0, stop: float = float("inf")) -> _Found:
    while position < stop and (line := file.readline()):
        id = f"{name} at byte {position}"
        position += len(line)
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:  # bad JSON, and bytes that are not UTF-8
            yield id, b"", "not one JSON object a line"
            continue
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            yield id, b"", f"without text in the field {text_field!r} (--text-field names another)"
            continue
        yield id, *_from_text(record[text_field])


def _from_text(text: str) -> tuple[bytes, str]:
    try:
        data = text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
        return b"", "not UTF-8"
    return data, unusable(data)


def _parquet(unit: Unit, text_field: str) -> _Found:
    [(_, path)] = unit.entries
    file = open_parquet(path)
    if text_field not in file.schema_arrow.names:
        columns = ", ".join(file.schema_arrow.names)
        yield path, b"", f"without a column {text_field!r} (it has {columns}; see --text-field)"
        return
    for group in range(unit.start, unit.stop):
        for row, text in enumerate(file.read_row_group(group, columns=[text_field]).column(0).to_pylist()):
            id = f"{path} group {group} row {row}"
            if isinstance(text, str):
                yield id, *_from_text(text)
            else:
                yield id, b"", "empty" if text is None else f"without text in the column {text_field!r}"


def _compressed(unit: Unit, text_field: str) -> _Found:
    [(id, path)] = unit.entries
    try:
        with _decompress(path) as stream:
            yield from _member(path if unit.explicit else id, _inner_name(path), stream, text_field)
    except _BROKEN as error:
        raise ConfigError(f"{path} cannot be decompressed: {error}") from None


def _inner_name(path: str) -> str:
    return next(path[: -len(suffix)] for suffix in COMPRESSED if path.lower().endswith(suffix))


def _decompress(path: str) -> Any:
    name = path.lower()
    if name.endswith(".gz"):
        return gzip.open(path, "rb")
    if name.endswith(".xz"):
        return lzma.open(path, "rb")
    if name.endswith(".bz2"):
        return bz2.open(path, "rb")
    import io

    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path), "zstd"))


def _member(id: str, name: str, stream: BinaryIO, text_field: str) -> _Found:
    if kind_of(name) == "jsonl":
        yield from _json_lines(stream, id, text_field)
    else:
        data = stream.read()
        yield id, data, unusable(data)


def _archive(unit: Unit, text_field: str) -> _Found:
    """Regular members in the archive's order; hidden ones are left out, as in a folder."""
    [(_, path)] = unit.entries
    try:
        if path.lower().endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if not info.is_dir() and not _hidden(info.filename):
                        with archive.open(info) as stream:
                            yield from _member(info.filename, info.filename, stream, text_field)
        else:
            with tarfile.open(path, "r|*") as archive:
                for member in archive:
                    stream = archive.extractfile(member) if member.isreg() and not _hidden(member.name) else None
                    if stream is not None:
                        yield from _member(member.name, member.name, stream, text_field)
    except _BROKEN as error:
        raise ConfigError(f"{path} is not a readable archive: {error}") from None


def _hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in os.path.normpath(name).split("/"))
