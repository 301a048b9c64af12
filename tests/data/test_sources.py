"""Files, folders, archives, JSONL, Parquet and the named sources, with what is wrong in them."""

import bz2
import gzip
import json
import lzma
import sys
import tarfile
import zipfile
from collections import Counter

import pytest

from maxlm.data import sources
from maxlm.data.documents import read_documents
from maxlm.data.sources import discover
from maxlm.schema import ConfigError


def read(inputs, source=None, text_field="text"):
    """All texts in order, and the counts of what was left out."""
    skipped = Counter()
    corpus = discover([str(path) for path in inputs], source)
    texts = [
        data.decode()
        for unit in corpus.units
        for _, data in read_documents(unit, text_field, lambda reason: skipped.update([reason]))
    ]
    return texts, skipped


def test_folder_skips_and_counts_what_is_no_text(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name, content in {"b.txt": b"bee", "sub/a.py": "é\r\n".encode(), "latin.txt": b"caf\xe9", "x.bin": b"a\0b",
                          "empty.txt": b"", ".git/config": b"hidden", "z.md": b"zed"}.items():
        (tmp_path / name).write_bytes(content)
    texts, skipped = read([tmp_path])
    assert texts == ["bee", "zed", "é\r\n"]
    assert skipped == {"not UTF-8": 1, "binary": 1, "empty": 1}


@pytest.mark.parametrize(
    ("content", "words"), [(b"caf\xe9", "not UTF-8"), (b"a\0b", "binary"), (b"", "empty"), (None, "does not exist")]
)
def test_named_file_that_is_no_text_is_refused(tmp_path, content, words):
    path = tmp_path / "file.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read([path])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_compressed_files_and_archives(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("j1", "j2"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "one.txt").write_text("one")
    (tmp_path / "in" / "two.jsonl").write_text(lines)
    (tmp_path / "in" / "bad.bin").write_bytes(b"\0")
    with tarfile.open(tmp_path / "a.tar.xz", "w:xz") as archive:
        for name in ("one.txt", "two.jsonl", "bad.bin"):
            archive.add(tmp_path / "in" / name, name)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.write(tmp_path / "in" / "one.txt", "deep/one.txt")
        archive.writestr(".hidden/x.txt", "no")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"gz"))
    (tmp_path / "d.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (tmp_path / "e.txt.bz2").write_bytes(bz2.compress(b"bz"))
    import pyarrow

    with pyarrow.CompressedOutputStream(str(tmp_path / "f.jsonl.zst"), "zstd") as stream:
        stream.write(lines.encode())
    names = ["a.tar.xz", "b.zip", "c.txt.gz", "d.jsonl.xz", "e.txt.bz2", "f.jsonl.zst"]
    texts, skipped = read([tmp_path / name for name in names])
    assert texts == ["one", "j1", "j2", "one", "gz", "j1", "j2", "bz", "j1", "j2"]
    assert skipped == {"binary": 1}


@pytest.mark.parametrize("name", ["x.tar.gz", "x.zip", "x.gz", "x.xz", "x.parquet", "x.jsonl.zst"])
def test_broken_archive_is_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is not what its name says")
    with pytest.raises(ConfigError) as caught:
        read([tmp_path / name])
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("unit_bytes", [10, 37, 1 << 20])
def test_jsonl_reads_each_line_once_however_it_is_split(tmp_path, monkeypatch, unit_bytes):
    monkeypatch.setattr(sources, "_MIN_UNIT_BYTES", unit_bytes)
    wanted = [f"line {i} " + "é" * (i % 7) for i in range(50)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in wanted), encoding="utf-8")
    assert read([path])[0] == wanted
    assert len(discover([str(path)], None).units) == -(-path.stat().st_size // unit_bytes)


def test_jsonl_field_and_mistakes(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"body": "b"}\n\n{"body": ""}\n')
    assert read([path], text_field="body") == (["b"], {"empty": 1})
    with pytest.raises(ConfigError, match="--text-field"):
        read([path])
    path.write_text('{"text": "ok"}\nnot json\n')
    with pytest.raises(ConfigError, match=r"at byte 15 is not one JSON object a line"):
        read([path])
    assert read([tmp_path])[1] == {"not one JSON object a line": 1}
    path.write_text('{"text": "\\ud800"}\n')
    with pytest.raises(ConfigError, match="not UTF-8"):
        read([path])


def test_parquet(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(sources, "_MIN_UNIT_BYTES", 1)
    path = tmp_path / "x.parquet"
    wanted = [f"row {i}" for i in range(10)]
    pyarrow.parquet.write_table(pyarrow.table({"text": [*wanted, None], "n": range(11)}), path, row_group_size=3)
    assert len(discover([str(path)], None).units) == 4
    assert read([path]) == (wanted, {"empty": 1})
    with pytest.raises(ConfigError, match=r"without a column 'body' \(it has text, n"):
        read([path], text_field="body")


def test_stdlib_is_the_interpreters_own():
    corpus = discover([], "python-stdlib")
    ids = [id for unit in corpus.units for id, _ in unit.entries]
    assert "argparse.py" in ids and "json/decoder.py" in ids and ids == sorted(set(ids), key=ids.index)
    assert not any("site-packages" in id or "dist-packages" in id for id in ids)
    assert corpus.sources[0].version == ".".join(map(str, sys.version_info[:3]))
    assert sum(len(unit.entries) for unit in corpus.units) > 300


def test_installed_packages_names_versions():
    corpus = discover([], "installed-packages")
    assert corpus.sources[0].packages["numpy"]
    paths = [path for unit in corpus.units for _, path in unit.entries]
    assert any(path.endswith("numpy/__init__.py") for path in paths) and all(path.endswith(".py") for path in paths)


def test_nothing_or_unknown_source():
    with pytest.raises(ConfigError, match="nothing to prepare"):
        discover([], None)
    with pytest.raises(ConfigError, match="python-stdlib"):
        discover([], "python-stdlb")
