"""Checksums of a checkpoint's files: written before it becomes visible, compared before it is trusted.

    DIR/STEP/manifest.json    {"format", "files": {path: [bytes, [crc32 of each 16 MiB block]]}, "crc32": of the files}

CRC-32 rather than SHA-256: it guards against damage, not against an adversary, and zlib computes it three times as fast
as SHA-256 (docs/RESILIENCE.md has the figures), so that a restore may check every byte it relies on and still run near
the speed of a plain read. Random damage passes a block unseen once in 2^32 times, damage within 32 neighbouring bits
never. Blocks let several threads and several processes share a large file, and say where it is damaged.

Reads and writes with the standard library alone.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from maxlm.checkpoint.layout import COMMIT_FILE, FORMAT, META_FILE, META_ITEM, CheckpointError, IntegrityError

MANIFEST_FILE = "manifest.json"
BLOCK_BYTES = 1 << 24
ALL, NO_ARRAYS = (0, 1), (0, 0)  # shares of the blocks, for `damage`
_WRITTEN_LATER = (COMMIT_FILE, "_CHECKPOINT_METADATA")  # by Orbax, while committing: must be there, and not be empty
_PART_PREFIX = "manifest.part."  # what one process wrote; process 0 folds them into the manifest


def write_part(item: Path, name: str, process: int) -> None:
    """Records what process `process` alone wrote into `item`, the folder that will be STEP/`name`.

    `write_manifest` takes it in. So each host reads back what it wrote itself, from its own page cache, and process 0
    need not read everything.
    """
    sums = _checksums(item, _files(item / f"ocdbt.process_{process}", item))
    _write(item.parent / f"{_PART_PREFIX}{process}", {f"{name}/{file}": entry for file, entry in sums.items()})


def write_manifest(folder: Path) -> None:
    """Records every file of the checkpoint being written at `folder`. Process 0 calls it when all others are done."""
    files: dict[str, Any] = {}
    for part in sorted(folder.glob(_PART_PREFIX + "*")):
        files |= json.loads(part.read_text(encoding="utf-8"))["files"]
        part.unlink()
    rest = [name for name in _files(folder, folder) if name not in files and name not in _WRITTEN_LATER]
    _write(folder / MANIFEST_FILE, files | _checksums(folder, rest))


def damage(path: Path, share: tuple[int, int] = ALL) -> str | None:
    """What is wrong with the complete or half-written checkpoint at `path`, in a few words; None if nothing is.

    share: (i, n) reads only every nth block of the arrays from the ith on, NO_ARRAYS none of them; the n shares
    together read everything. Sizes, names and the metadata are checked by every share. Raises CheckpointError where the
    files may not be read, or are of another format.
    """
    return looked_at(path, lambda: _damage(path, share))


def _damage(path: Path, share: tuple[int, int]) -> str | None:
    files = read_manifest(path)
    for name in (*_WRITTEN_LATER, *files):
        if not (path / name).is_file():
            return f"{name} is missing"
        found = (path / name).stat().st_size
        if not found and name in _WRITTEN_LATER:
            return f"{name} is empty"
        if name in files and found != files[name][0]:
            return f"{name} has {found} bytes instead of {files[name][0]}"
    return _first_damaged_block(path, files, share)


def looked_at(path: Path, look: Callable[[], str | None]) -> str | None:
    """What `look` finds wrong with the checkpoint at `path`, or what keeps it from looking. Raises CheckpointError
    where that is a matter of permissions."""
    try:
        return look()
    except IntegrityError as error:
        return str(error)
    except FileNotFoundError as error:
        return f"{error.filename} vanished while it was read"
    except PermissionError as error:
        raise CheckpointError(f"{error.filename} may not be read: make it readable for this user") from error
    except OSError as error:
        return f"{error.filename or path}: {error.strerror or error}"  # what a failing disk says


def read_manifest(path: Path) -> dict[str, tuple[int, list[int]]]:
    """{file: (bytes, checksums of its blocks)} of the checkpoint at `path`.

    Raises IntegrityError where it is missing or damaged, CheckpointError for a checkpoint of a maxlm that wrote none.
    """
    try:
        document = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        files = document["files"]
        if document["format"] != FORMAT or document["crc32"] != _crc_of(files):
            raise ValueError
        return {name: (size, sums) for name, (size, sums) in files.items()}
    except FileNotFoundError:
        _refuse_older_format(path)
        raise IntegrityError(f"{MANIFEST_FILE} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise IntegrityError(f"{MANIFEST_FILE} is damaged") from None


def sealed(body: dict[str, Any]) -> bytes:
    """`body` as JSON, with its own checksum in it."""
    return json.dumps({**body, "crc32": _crc_of(body)}).encode()


def unsealed(data: bytes) -> dict[str, Any] | None:
    """What `sealed` made `data` of; None where it was altered since."""
    try:
        body = json.loads(data)
        return body if body.pop("crc32") == _crc_of(body) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _refuse_older_format(path: Path) -> None:
    try:
        found = json.loads((path / META_ITEM / META_FILE).read_text(encoding="utf-8"))["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if isinstance(found, int) and found < FORMAT:
        raise CheckpointError(f"{path} is of format {found}, this maxlm reads {FORMAT}: use the maxlm that wrote it")


def blocks(files: Mapping[str, tuple[int, list[int]]], share: tuple[int, int]) -> list[tuple[str, int]]:
    """(file, number) of the blocks of `share`."""
    every = [(name, number) for name, (_, sums) in files.items() for number in range(len(sums))]
    return every[share[0] :: share[1]] if share[1] else []


def differs(name: str, number: int, size: int) -> str:
    first = number * BLOCK_BYTES
    return f"{name} differs from its checksum between bytes {first} and {min(first + BLOCK_BYTES, size) - 1}"


def _first_damaged_block(path: Path, files: dict[str, tuple[int, list[int]]], share: tuple[int, int]) -> str | None:
    def look(block: tuple[str, int]) -> str | None:
        name, number = block
        size, sums = files[name]
        return None if _crc_of_block(path / name, number) == sums[number] else differs(name, number, size)

    always = [block for block in blocks(files, ALL) if block[0].startswith(META_ITEM + "/")]
    return next((found for found in _in_threads(look, always + blocks(files, share)) if found), None)


def _checksums(folder: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    sizes = {name: (folder / name).stat().st_size for name in names}
    blocks = [(name, number) for name in names for number in range(-(-sizes[name] // BLOCK_BYTES))]
    sums: dict[str, list[int]] = {name: [] for name in names}
    computed = _in_threads(lambda block: _crc_of_block(folder / block[0], block[1]), blocks)
    for (name, _), crc in zip(blocks, computed, strict=True):
        sums[name].append(crc)
    return {name: [sizes[name], sums[name]] for name in names}


def _in_threads(function: Any, items: Sequence[Any]) -> Iterable[Any]:
    """`map` in as many threads as there are cores, none for a single item; zlib and reads let go of the GIL."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(len(items), os.cpu_count() or 1, 16)) as pool:
        return list(pool.map(function, items))


def _crc_of_block(path: Path, number: int) -> int:
    crc, offset = 0, number * BLOCK_BYTES
    end, piece = offset + BLOCK_BYTES, 1 << 20  # pieces that stay in the cache between the read and the checksum
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while offset < end and (data := os.pread(descriptor, min(piece, end - offset), offset)):
            crc, offset = zlib.crc32(data, crc), offset + len(data)
    finally:
        os.close(descriptor)
    return crc


def _files(folder: Path, relative_to: Path) -> list[str]:
    return sorted(
        str(Path(inner, name).relative_to(relative_to)) for inner, _, names in os.walk(folder) for name in names
    )


def _crc_of(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _write(path: Path, files: dict[str, Any]) -> None:
    document = {"format": FORMAT, "files": files, "crc32": _crc_of(files)}
    path.write_text(json.dumps(document, sort_keys=True) + "\n", encoding="utf-8")
