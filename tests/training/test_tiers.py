"""A run with a local tier and its checkpoints elsewhere: the newest over both is used, and the end is the same."""

import json
import shutil

import pytest

from maxlm.checkpoint import CheckpointError, latest_step, redirect
from maxlm.cli import main
from maxlm.config import CheckpointConfig
from maxlm.schema import ConfigError
from tests.checkpoint.fake_store import FakeStore
from tests.training.runs import prepared, timeless, train, write_config


def digest(run, capsys):
    capsys.readouterr()
    assert main(["checkpoint", "digest", str(run)]) == 0
    return capsys.readouterr().out.split()[-1]


def test_a_run_goes_on_from_its_local_checkpoints(tmp_path, capsys):
    config = write_config(tmp_path / "tiny.py", prepared(tmp_path / "data"))
    tiers = ("checkpoint.every_steps=5", f"checkpoint.path={tmp_path / 'durable'}",
             f"checkpoint.local_path={tmp_path / 'local'}", "checkpoint.local_every_steps=2")
    assert train(config, tmp_path / "run", *tiers) == 0
    whole = digest(tmp_path / "run", capsys), timeless(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "durable").iterdir()) == ["5", "6", "run_name"]
    assert sorted(p.name for p in (tmp_path / "local").glob("*/process_0/*")) == ["2", "4"]
    for lost, resumed in (("6", "5"), ("5", "4")):
        shutil.rmtree(tmp_path / "durable" / "6")
        shutil.rmtree(tmp_path / "durable" / lost, ignore_errors=True)
        assert train(config, tmp_path / "run", *tiers) == 0
        assert f"resumed from step {resumed}" in capsys.readouterr().err
        assert (digest(tmp_path / "run", capsys), timeless(tmp_path / "run")) == whole
    moved = tmp_path / "moved"
    (tmp_path / "durable").rename(moved)
    assert train(config, tmp_path / "run", *tiers, f"checkpoint.path={moved}") == 0  # trained to its end already
    assert digest(tmp_path / "run", capsys) == whole[0]


@pytest.mark.slow
def test_a_run_in_an_object_store(tmp_path, capsys, monkeypatch):
    """The same end as in a folder, also after damage; and every command works on it."""
    config = write_config(tmp_path / "tiny.py", prepared(tmp_path / "data"))
    assert train(config, tmp_path / "folder") == 0
    whole = digest(tmp_path / "folder", capsys), timeless(tmp_path / "folder")
    run, url = tmp_path / "run", "gs://bucket/runs/tiny"
    with FakeStore("bucket") as store:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", store.url)
        assert train(config, run, f"checkpoint.path={url}") == 0
        assert (digest(run, capsys), timeless(run)) == whole
        store.objects.pop(next(key for key in store.objects if "/6." in key and key.endswith("/process_0/00000")))
        assert main(["checkpoint", "verify", str(run)]) == 3
        assert "process_0/00000 is missing" in capsys.readouterr().out
        assert train(config, run, f"checkpoint.path={url}", "checkpoint.keep_last=5") == 0
        said = capsys.readouterr().err
        assert "checkpoint 6 is damaged (process_0/00000 is missing): set aside as 6." in said
        assert "resumed from step 4" in said and (digest(run, capsys), timeless(run)) == whole
        for place in (str(run), str(run / "checkpoints"), url):
            assert main(["checkpoint", "verify", place]) == 0
            assert main(["checkpoint", "list", place]) == 0
            assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["4", "6", "step", "4", "6"]
        evaluations = []
        for folder in (tmp_path / "folder", run):
            assert main(["eval", "--run-dir", str(folder)]) == 0
            evaluations.append(capsys.readouterr().out)
        assert evaluations[0] == evaluations[1]
        assert main(["generate", "--run-dir", str(run), "--tokens", "4", "--prompt", "the "]) == 0
        assert main(["replay", "--run-dir", str(run), "--step", "5"]) == 0
        assert '"from_checkpoint": 4' in capsys.readouterr().out
        assert main(["status", "--run-dir", str(run), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["checkpoint"] == 6


def test_checkpoints_move_between_a_folder_and_a_url(tmp_path):
    """RUN_DIR/checkpoints follows checkpoint.path, and is never replaced where it holds checkpoints itself."""
    checkpoints, url = tmp_path / "run/checkpoints", f"file://{tmp_path}/objects"
    redirect(checkpoints, url)
    assert checkpoints.read_text() == url + "\n" and latest_step(checkpoints) is None
    redirect(checkpoints, str(tmp_path / "durable"))
    assert checkpoints.is_symlink()
    redirect(checkpoints, url)
    redirect(checkpoints, url)
    assert checkpoints.read_text() == url + "\n"
    checkpoints.unlink()
    (checkpoints / "3").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has checkpoints of its own"):
        redirect(checkpoints, url)


def test_checkpoints_of_its_own_are_not_hidden(tmp_path, capsys):
    config = write_config(tmp_path / "tiny.py", prepared(tmp_path / "data"))
    (tmp_path / "run/checkpoints/3").mkdir(parents=True)
    assert train(config, tmp_path / "run", f"checkpoint.path={tmp_path / 'durable'}") == 2
    assert "has checkpoints of its own: move what is in it" in capsys.readouterr().err


@pytest.mark.parametrize(("fields", "message"), [
    ({"path": "memory://bucket/run"}, "checkpoint.path='memory://bucket/run' must be a folder, gs://BUCKET/RUN"),
    ({"path": "gs://bucket"}, "checkpoint.path='gs://bucket' must be a folder, gs://BUCKET/RUN"),
    ({"local_path": "gs://b/r"}, "checkpoint.local_path='gs://b/r' is a URL: give a folder on each host"),
    ({"local_path": "/dev/shm/x"}, "checkpoint.local_path and checkpoint.local_every_steps go together"),
    ({"local_every_steps": 5}, "checkpoint.local_path and checkpoint.local_every_steps go together"),
    ({"local_keep_last": 1}, "checkpoint.local_keep_last=1 must be 2 or more"),
])
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(ConfigError, match=message):
        CheckpointConfig(**fields)
