"""`prepare`: the split, duplicates, exact counts, restart after kill -9, and refusals."""

import gzip
import hashlib
import lzma
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_corpus import document, prepare_quietly, word_tokenizer, write_folder

from maxlm.config import DataConfig, DatasetConfig
from maxlm.data import sources, tasks
from maxlm.data.loader import HeldoutData, TrainingData
from maxlm.data.manifest import load_manifest
from maxlm.data.prepare import ensure_source
from maxlm.data.tokenizer import load_tokenizer
from maxlm.data.workers import WorkerError, run_tasks
from maxlm.schema import ConfigError


def texts_of(folder, tokenizer, seq_len=64):
    """(training, held-out) documents, read back from the rows; for rows that hold whole documents."""
    train = TrainingData([DatasetConfig(str(folder))], seq_len=seq_len, global_batch_size=1, seed=0)
    held = HeldoutData([DatasetConfig(str(folder))], seq_len=seq_len, global_batch_size=1)
    batches = [train.batch(i) for i in range(train.rows)], [held.batch(i) for i in range(held.num_batches)]
    return [
        sorted(
            tokenizer.decode(batch["tokens"][0][batch["segment_ids"][0] == segment])
            for batch in split
            for segment in range(1, batch["segment_ids"].max() + 1)
        )
        for split in batches
    ]


@pytest.mark.parametrize("spec", ["bytes", "bpe:400"])
def test_text_comes_back_whole_and_split_by_its_hash(tmp_path, spec):
    texts = write_folder(tmp_path / "text", 60)
    manifest = prepare_quietly([tmp_path / "text"], tmp_path / "out", tokenizer=spec, seq_len=2048)
    tokenizer = load_tokenizer("bytes" if spec == "bytes" else str(tmp_path / "out"))
    train, heldout = texts_of(tmp_path / "out", tokenizer, 2048)
    held = {t for t in texts if int.from_bytes(hashlib.sha256(t.encode()).digest()[:8], "little") < 0.2 * 2**64}
    assert heldout == sorted(held) and train == sorted(set(texts) - held)
    assert manifest.train.bytes == sum(len(t.encode()) for t in train)
    assert manifest.heldout.documents == len(held)
    joined = "".join(sorted(held, key=texts.index)).encode()
    assert manifest.heldout.compressed_bytes == manifest.heldout.bytes == len(joined)
    assert manifest.heldout.gzip9_bits_per_byte == 8 * len(gzip.compress(joined, 9)) / len(joined)
    assert manifest.heldout.xz9_bits_per_byte == 8 * len(lzma.compress(joined, preset=9)) / len(joined)
    assert f"{len(held)} documents" in manifest.summary()


def test_split_is_stable_when_files_are_added(tmp_path):
    write_folder(tmp_path / "text", 40)
    prepare_quietly([tmp_path / "text"], tmp_path / "a", seq_len=2048)
    write_folder(tmp_path / "text", 40, first=40)
    prepare_quietly([tmp_path / "text"], tmp_path / "b", seq_len=2048)
    tokenizer = load_tokenizer("bytes")
    for before, after in zip(texts_of(tmp_path / "a", tokenizer, 2048), texts_of(tmp_path / "b", tokenizer, 2048),
                             strict=True):
        assert set(before) < set(after)


def test_exact_duplicates_are_dropped(tmp_path):
    texts = write_folder(tmp_path / "text", 30)
    (tmp_path / "more.jsonl").write_text("")
    write_folder(tmp_path / "again", 35)
    manifest = prepare_quietly([tmp_path / "text", tmp_path / "again"], tmp_path / "out")
    assert manifest.duplicates == 30 == len(texts)
    assert [source.documents for source in manifest.sources] == [30, 5]
    assert manifest.train.documents + manifest.heldout.documents == 35


def test_rows_do_not_depend_on_units_or_workers(tmp_path, monkeypatch):
    write_folder(tmp_path / "text", 60)
    one = prepare_quietly([tmp_path / "text"], tmp_path / "one", tokenizer="bpe:300", shard_rows=30)
    monkeypatch.setattr(sources, "_MIN_UNIT_BYTES", 1500)
    many = prepare_quietly([tmp_path / "text"], tmp_path / "many", tokenizer="bpe:300", shard_rows=30, workers=2)
    assert one.digest == many.digest and one.train == many.train and len(one.train.shards) > 2
    other = prepare_quietly([tmp_path / "text"], tmp_path / "other", tokenizer="bpe:300", seq_len=32)
    assert other.digest != one.digest


def test_single_document_is_cut_at_a_line(tmp_path):
    text = "".join(document(i) for i in range(30))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    manifest = prepare_quietly([tmp_path / "book.txt"], tmp_path / "out", heldout_fraction=0.1)
    assert manifest.train.bytes + manifest.heldout.bytes == len(text.encode())
    assert 0.05 < manifest.heldout.bytes / len(text.encode()) <= 0.1
    train, heldout = texts_of(tmp_path / "out", load_tokenizer("bytes"))
    assert text.endswith("".join(c for c in heldout if c.startswith("#"))[:5]) or manifest.heldout.rows > 1


def test_two_documents_give_one_to_the_heldout_split(tmp_path):
    write_folder(tmp_path / "text", 2)
    manifest = prepare_quietly([tmp_path / "text"], tmp_path / "out", heldout_fraction=1e-9)
    assert (manifest.train.documents, manifest.heldout.documents) == (1, 1)


def test_complete_folder_returns_at_once(tmp_path, monkeypatch):
    write_folder(tmp_path / "text", 20)
    first = prepare_quietly([tmp_path / "text"], tmp_path / "out")
    monkeypatch.setattr(tasks, "read_documents", None)
    assert prepare_quietly([tmp_path / "text"], tmp_path / "out") == first == load_manifest(str(tmp_path / "out"))
    assert not (tmp_path / "out" / ".work").exists()


def test_folder_of_another_command_is_refused(tmp_path):
    write_folder(tmp_path / "text", 20)
    prepare_quietly([tmp_path / "text"], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"seq_len 64 \(asked: 32\)"):
        prepare_quietly([tmp_path / "text"], tmp_path / "out", seq_len=32)
    write_folder(tmp_path / "text", 1, first=99)
    with pytest.raises(ConfigError, match="added, removed or changed"):
        prepare_quietly([tmp_path / "text"], tmp_path / "out")
    with pytest.raises(ConfigError, match="not empty"):
        prepare_quietly([tmp_path / "out"], tmp_path / "text")


KILLED = """
import os, signal, sys
from maxlm.data import sources, tasks
from maxlm.data.prepare import prepare
sources._MIN_UNIT_BYTES = 1500
phase, survived, text, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
work = getattr(tasks, phase)
def dies(task):
    global survived
    if survived == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    survived -= 1
    return work(task)
setattr(tasks, phase, dies)
prepare([text], out=out, tokenizer="bpe:300", seq_len=64, heldout_fraction=0.2, workers=1, shard_rows=30)
"""


def killed_run(phase, survived, text, out):
    root = Path(__file__).resolve().parents[2]
    child = subprocess.run([sys.executable, "-c", KILLED, phase, str(survived), str(text), str(out)],
                           cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert not (out / "manifest.json").exists() and (out / ".work").exists()


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(sources, "_MIN_UNIT_BYTES", 1500)


@pytest.mark.parametrize(("phase", "survived"), [("_encode", 2), ("_pack", 1)])
def test_killed_run_continues_to_the_same_bytes(tmp_path, monkeypatch, small_units, phase, survived):
    write_folder(tmp_path / "text", 60)
    settings = {"tokenizer": "bpe:300", "shard_rows": 30}
    ran = []
    work = getattr(tasks, phase)
    monkeypatch.setattr(tasks, phase, lambda task: ran.append(task.name) or work(task))
    wanted = prepare_quietly([tmp_path / "text"], tmp_path / "wanted", **settings)
    wanted_names = list(ran)
    out = tmp_path / "out"
    killed_run(phase, survived, tmp_path / "text", out)
    with pytest.raises(ConfigError, match="run `maxlm data prepare"):
        load_manifest(str(out))
    with pytest.raises(ConfigError, match="asked"):
        prepare_quietly([tmp_path / "text"], out, seq_len=32)
    ran.clear()
    assert prepare_quietly([tmp_path / "text"], out, **settings) == wanted
    assert len(wanted_names) > survived + 1 and ran == wanted_names[survived:]


def test_what_a_killed_run_left_is_not_used_for_changed_text(tmp_path, small_units):
    write_folder(tmp_path / "text", 60)
    settings = {"tokenizer": "bpe:300", "shard_rows": 30}
    killed_run("_pack", 3, tmp_path / "text", tmp_path / "out")
    before = prepare_quietly([tmp_path / "text"], tmp_path / "before", **settings)
    for path in sorted((tmp_path / "text").iterdir())[:8]:  # as long as before, and the same token counts or not
        path.write_text(path.read_text().replace("alpha", "delta").replace("beta", "teba"))
    wanted = prepare_quietly([tmp_path / "text"], tmp_path / "wanted", **settings)
    assert prepare_quietly([tmp_path / "text"], tmp_path / "out", **settings) == wanted != before


def test_folder_that_cannot_be_made(tmp_path):
    write_folder(tmp_path / "text", 3)
    with pytest.raises(ConfigError, match="cannot prepare into .*Not a directory"):
        prepare_quietly([tmp_path / "text"], tmp_path / "text" / "0000.txt" / "out")


def test_two_processes_in_one_folder(tmp_path):
    import fcntl

    write_folder(tmp_path / "text", 3)
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            prepare_quietly([tmp_path / "text"], tmp_path / "out")


def test_nothing_usable(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "x.bin").write_bytes(b"\0")
    with pytest.raises(ConfigError, match="nothing usable in .*1 binary"):
        prepare_quietly([tmp_path / "text"], tmp_path / "out")


def test_tokenizer_that_is_not_byte_level_counts_all_bytes(tmp_path):
    word_tokenizer().save(str(tmp_path / "words.json"))
    texts = write_folder(tmp_path / "text", 20)
    manifest = prepare_quietly([tmp_path / "text"], tmp_path / "out", tokenizer=str(tmp_path / "words.json"))
    assert manifest.train.bytes + manifest.heldout.bytes == sum(len(t.encode()) for t in texts)
    held = HeldoutData([DatasetConfig(str(tmp_path / "out"))], seq_len=64, global_batch_size=2)
    assert sum(int(held.batch(i)["bytes"].sum()) for i in range(held.num_batches)) == manifest.heldout.bytes


def test_ensure_source_prepares_once(tmp_path):
    write_folder(tmp_path / "text", 20)
    data = DataConfig(source=str(tmp_path / "text"), heldout_fraction=0.2)
    path = ensure_source(data, 64, str(tmp_path / "out"))
    first = load_manifest(path)
    write_folder(tmp_path / "text", 5, first=20)  # a run goes on with the data it began with
    assert ensure_source(data, 64, str(tmp_path / "out")) == path and load_manifest(path) == first
    with pytest.raises(ConfigError, match="seq_len"):
        ensure_source(data, 128, str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"data\.source"):
        ensure_source(DataConfig(source="python-stdlb"), 64, str(tmp_path / "other"))


def test_workers_run_everything_and_report_death():
    assert dict(run_tasks(math.factorial, range(8), 2)) == {i: math.factorial(i) for i in range(8)}
    with pytest.raises(WorkerError, match="ended unexpectedly"):
        list(run_tasks(os._exit, [1, 1], 2))
    with pytest.raises(WorkerError, match="negative"):
        list(run_tasks(math.factorial, [3, -1], 2))
    with pytest.raises(OSError, match="No such file"):
        list(run_tasks(os.stat, ["nowhere", "nowhere either"], 2))


def test_no_part_of_preparing_imports_jax(tmp_path):
    """Nor does a worker: it runs the same modules."""
    write_folder(tmp_path / "text", 5)
    root = Path(__file__).resolve().parents[2]
    code = ("import sys; from maxlm.data.prepare import prepare; prepare([sys.argv[1]], out=sys.argv[2], "
            "tokenizer='bpe:300', seq_len=16); assert not {'jax', 'grain', 'flax'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "text"), str(tmp_path / "out")], cwd=root,
                   env=os.environ | {"PYTHONPATH": str(root)}, check=True, capture_output=True)
    assert np.isfinite(load_manifest(str(tmp_path / "out")).train.tokens)
