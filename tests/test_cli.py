"""Mistakes at the command line: one clear line that names the fix, exit code 2, nothing lost or half-written."""

import json
import pathlib
import shutil
import subprocess

import pytest

import maxlm.cli
from maxlm.cli import main
from maxlm.parallel import distributed
from maxlm.resilience import RunLock
from tests.training.disks import full_disk, read_only
from tests.training.runs import prepared, rows_of, train, write_config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return write_config(folder / "tiny.py", prepared(folder / "data"))


@pytest.fixture(scope="module")
def finished(made):
    run = made.parent / "run"
    assert train(made, run, "logging.sample_prompt=") == 0
    return run


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != ".lock"}


def refused(capsys, code, *words, expected=2):
    """The last call ended with `expected` and one line that holds `words`."""
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(PROGRESS)]
    assert code == expected, lines
    assert len(lines) == 1 and lines[0].startswith("maxlm: "), lines
    for word in words:
        assert word in lines[0], lines[0]


PROGRESS = ("attention: ", "step ", "resumed from ")


def command(*words):
    """`maxlm WORDS`, also where argparse itself exits."""
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code


# The config file and the overrides


def test_a_missing_config_file_names_the_nearest(made, tmp_path, capsys):
    code = train(made.with_name("tinny.py"), tmp_path / "run")
    refused(capsys, code, "no config file", "did you mean", "tiny.py")
    assert not (tmp_path / "run").exists()


def test_a_syntax_error_names_file_and_line(tmp_path, capsys):
    (tmp_path / "bad.py").write_text("def config():\n    return RunConfig(\n")
    code = train(tmp_path / "bad.py", tmp_path / "run")
    refused(capsys, code, "bad.py:2", "'(' was never closed")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("override", "words"), [
    ("model.num_layer=4", ["unknown config key 'model.num_layer'", "did you mean 'model.num_layers'?"]),
    ("model.num_layers=four", ["model.num_layers='four' must be an integer"]),
    ("precision.recipe=fp7", ["precision.recipe='fp7' must be one of 'float32'"]),
    ("train.global_batch_size=12",
     ["= 12 is not a multiple of mesh.data * mesh.fsdp * mesh.expert = 8", "multiple of 8"]),
    ("mesh.tensor=3", ["3 does not divide the 8 devices"]),
    ("mesh.stage=2", ["model.num_layers = 1 is not a multiple of mesh.stage"]),
    ("train.seq_len=64", ["train.seq_len=64", "--seq-len 32", "set train.seq_len=32"]),
    ("train.global_batch_size=4096", ["shorter than one batch", "lower it"]),
    ("model.vocab_size=256", ["model.vocab_size=256 is smaller", "257 tokens: set model.vocab_size=257"]),
    ("data.path=none", ["data.path is not set", "maxlm data prepare"]),
])
def test_a_wrong_value(made, tmp_path, capsys, override, words):
    refused(capsys, train(made, tmp_path / "run", override), *words)
    assert contents(tmp_path) == {}, "nothing is written, but a lock"


@pytest.mark.parametrize("words", [["trian"], [], ["train"], ["train", "x.py"], ["data"], ["eval"]])
def test_an_unknown_verb_or_a_missing_argument(words, capsys):
    assert command(*words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "--help" in lines[0], lines


# The data


def test_a_missing_data_folder(made, tmp_path, capsys):
    code = train(made, tmp_path / "run", f"data.path={tmp_path / 'nowhere'}")
    refused(capsys, code, "nowhere", "does not exist: make it with `maxlm data prepare`")


@pytest.mark.parametrize(("name", "content", "words"), [
    ("empty.txt", b"", ["is empty"]),
    ("binary.txt", bytes(range(256)) * 40, ["is binary: give UTF-8 text"]),
    ("latin.txt", "café au lait\n".encode("latin-1") * 50, ["is not UTF-8: give UTF-8 text"]),
])
def test_input_that_is_not_text(tmp_path, capsys, name, content, words):
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    code = command("data", "prepare", tmp_path / name, "--out", out, "--tokenizer", "bytes", "--seq-len", 32)
    refused(capsys, code, name, *words)
    assert not (out / "manifest.json").exists()


@pytest.mark.parametrize(("change", "words"), [
    (dict(inputs=["nowhere.txt"]), ["nowhere.txt"]),
    (dict(tokenizer="bpe:3"), ["'bpe:3'", "from 257"]),
    (dict(tokenizer="no.json"), ["'no.json' is not 'bytes', 'bpe:SIZE' or a tokenizer.json"]),
    (dict(seq_len=0), ["--seq-len 0 must be 1 or more"]),
    (dict(inputs=[]), ["nothing to prepare: give files or folders, or --source"]),
], ids=str)
def test_prepare_told_something_impossible(made, tmp_path, capsys, change, words):
    settings = dict(inputs=[made.parent / "data-text"], tokenizer="bytes", seq_len=32) | change
    code = command("data", "prepare", *settings["inputs"], "--out", tmp_path / "out",
                   "--tokenizer", settings["tokenizer"], "--seq-len", settings["seq_len"])
    refused(capsys, code, *words)
    assert not (tmp_path / "out" / "manifest.json").exists()


def damage_manifest(data):
    text = (data / "manifest.json").read_text()
    (data / "manifest.json").write_text(text[: len(text) // 2])


def edit_manifest(data):
    (data / "manifest.json").write_text((data / "manifest.json").read_text().replace('"eot_id": 256', '"eot_id": 255'))


def truncate_shard(data):
    shard = next(data.glob("train-*.arrayrecord"))
    shard.write_bytes(shard.read_bytes()[:-10])


def lose_shard(data):
    next(data.glob("train-*.arrayrecord")).unlink()


@pytest.mark.parametrize(("damage", "words"), [
    (damage_manifest, ["manifest.json is corrupted", "prepare` again"]),
    (edit_manifest, ["manifest.json is corrupted (its digest", "prepare` again"]),
    (truncate_shard, ["arrayrecord has", "its manifest says", "prepare` again"]),
    (lose_shard, ["arrayrecord is missing", "again"]),
])
def test_damaged_data(made, tmp_path, capsys, damage, words):
    shutil.copytree(made.parent / "data", tmp_path / "data")
    damage(tmp_path / "data")
    refused(capsys, train(made, tmp_path / "run", f"data.path={tmp_path / 'data'}"), *words)
    assert contents(tmp_path / "run") == {}


# The run directory


def test_a_full_disk_during_a_checkpoint(made, finished, tmp_path, capfd):
    with full_disk(tmp_path / "disk", free=220_000) as (run, words, make_room):
        code = train(made, run, "checkpoint.every_steps=1", "checkpoint.keep_last=9")
        refused(capfd, code, str(run), *words)
        saved = {p.name for p in (run / "checkpoints").iterdir()}
        assert "6" not in saved and all(name.isdigit() or name.endswith("-tmp") for name in saved)
        make_room()
        assert train(made, run, "checkpoint.every_steps=1", "checkpoint.keep_last=9") == 0
        assert ("resumed from" in capfd.readouterr().err) == any(name.isdigit() for name in saved)
        assert [row["step"] for row in rows_of(run) if "loss" in row] == [1, 2, 3, 4, 5, 6]
        assert command("checkpoint", "digest", run) == command("checkpoint", "digest", finished) == 0
        mine, expected = capfd.readouterr().out.split()
        assert mine == expected


def test_a_read_only_run_directory(made, finished, tmp_path, capfd):
    shutil.copytree(finished, tmp_path / "run")
    before = contents(tmp_path / "run")
    with read_only(tmp_path) as folder:
        refused(capfd, train(made, folder / "new"), "cannot be used (", "choose a folder that you can write")
        refused(capfd, train(made, folder / "run", "train.num_steps=8"), "cannot be used (", "that you can write")
    assert contents(tmp_path / "run") == before


def test_a_run_directory_that_is_a_file(made, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    refused(capsys, train(made, tmp_path / "run"), str(tmp_path / "run"), "choose a folder")
    assert (tmp_path / "run").read_text() == "mine"


def test_two_processes_in_one_run_directory(made, tmp_path, capsys):
    with RunLock(tmp_path / "run"):
        refused(capsys, train(made, tmp_path / "run"), "is in use by process", "another --run-dir")


# The other verbs


@pytest.mark.parametrize("verb", [["eval"], ["generate", "--prompt", "a"]])
def test_what_is_no_run(finished, tmp_path, capsys, verb):
    refused(capsys, command(*verb, "--run-dir", tmp_path / "nowhere"), "no such folder", "`maxlm train` wrote")
    refused(capsys, command(*verb, "--run-dir", tmp_path), "no complete checkpoint in", "train first")
    refused(capsys, command(*verb, "--run-dir", finished, "--step", 5), "no complete checkpoint of step 5", "4, 6")


@pytest.mark.parametrize("option", [("--tokens", 0), ("--temperature", -1), ("--top-k", -1), ("--top-p", 0)])
def test_sampling_out_of_range(finished, capsys, option):
    refused(capsys, command("generate", "--run-dir", finished, "--prompt", "a", *option), f"{option[0]}={option[1]}")


@pytest.mark.parametrize("verb", ["list", "digest"])
def test_checkpoints_of_nothing(tmp_path, capsys, verb):
    refused(capsys, command("checkpoint", verb, tmp_path / "nowhere"), "no such folder")


def test_bench_that_could_not_write_its_record(made, tmp_path, capfd):
    """Found out before the minutes of measuring."""
    refused(capfd, command("bench", made, "--json", tmp_path / "no" / "x.json"), "--json", "make it first")
    refused(capfd, command("bench", made, "--json", tmp_path), "--json", "cannot be written")
    with read_only(tmp_path) as folder:
        refused(capfd, command("bench", made, "--json", folder / "x.json"), "cannot be written")
    refused(capfd, command("bench", made, "--documents", 99), "--documents=99 must be from 1 to train.seq_len=32")
    refused(capfd, command("bench", made, "--steps", 0), "--steps")


def test_bench_writes_one_record(made, tmp_path, capfd):
    code = command("bench", made, "--json", tmp_path / "x.json", "--steps", 2, "--warmup", 1, "--documents", 3)
    out = capfd.readouterr().out
    assert code == 0
    record = json.loads((tmp_path / "x.json").read_text())
    assert json.loads(out) == record and record["recipe"] == "tiny" and record["mfu"] is None


# What is nobody's mistake but the machine's


class OutOfMemory(RuntimeError):
    pass


@pytest.mark.parametrize(("error", "words", "expected"), [
    (OutOfMemory("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore"),
     ["out of device memory", "train.global_batch_size", "remat.policy='full'", "mesh.fsdp"], 2),
    (KeyboardInterrupt(), ["interrupted", "same command"], 130),
    (OSError(28, "No space left on device", "/x/y"), ["/x/y: No space left on device"], 2),
], ids=["memory", "interrupt", "disk"])
def test_errors_from_below_are_one_line(made, tmp_path, capsys, monkeypatch, error, words, expected):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("maxlm.training.loop.train", fail)
    refused(capsys, train(made, tmp_path / "run"), *words, expected=expected)


def test_a_dead_data_worker_is_one_line(tmp_path, capsys, monkeypatch):
    from maxlm.data.workers import WorkerError

    def fail(*_, **__):
        raise WorkerError("Traceback (most recent call last):\n  File ...\nKeyError: 'x'\n")

    monkeypatch.setattr("maxlm.data.prepare.prepare", fail)
    code = command("data", "prepare", tmp_path, "--out", tmp_path, "--tokenizer", "bytes", "--seq-len", 8)
    refused(capsys, code, "KeyError: 'x'")


def test_an_error_of_ours_keeps_its_traceback(made, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("maxlm.training.loop.train", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train(made, tmp_path / "run")


def test_ctrl_c_during_prepare(tmp_path):
    """The real signal, in a process of its own: one line, 130, and the same command finishes."""
    import signal
    import sys

    out = tmp_path / "out"
    words = ["data", "prepare", "--source", "python-stdlib", "--out", str(out), "--tokenizer", "bytes",
             "--seq-len", "128"]
    package = str(pathlib.Path(maxlm.cli.__file__).parents[1])
    # Started in the background of a script, the tests themselves, and so their children, ignore the signal.
    command = ("import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
               "sys.argv[0] = 'maxlm'; runpy.run_module('maxlm', run_name='__main__')")
    process = subprocess.Popen([sys.executable, "-P", "-c", command, *words], stderr=subprocess.PIPE, text=True,
                               env=dict(PYTHONPATH=package, PATH="/usr/bin:/bin"))
    while not (out / ".work").exists() and process.poll() is None:
        pass_time()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.strip().splitlines()[-1] == "maxlm: interrupted; nothing is lost, the same command starts again"
    assert "Traceback" not in error and not (out / "manifest.json").exists()


def pass_time():
    import time

    time.sleep(0.02)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_a_lost_peer_is_for_the_orchestrator_to_restart(monkeypatch, capsys, tmp_path, kind):
    """JAX raises what gloo says as one or the other, by the place in the program (found by scripts/chaos.py)."""
    def fail(arguments):
        raise kind("UNKNOWN: Gloo AllGather failed: Connection closed by peer [10.77.0.2]:41709")

    monkeypatch.setattr(maxlm.cli, "_eval", fail)
    with pytest.raises(kind):  # one process has no peers
        main(["eval", "--run-dir", str(tmp_path)])
    monkeypatch.setattr(distributed, "_initialized", lambda: True)
    assert main(["eval", "--run-dir", str(tmp_path)]) == 75
    assert "another process of this run is gone" in capsys.readouterr().err
    assert distributed.exit_code_of(kind("Gloo AllGather failed")) == 75
