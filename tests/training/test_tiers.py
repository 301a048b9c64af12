"""A run with a local tier and its checkpoints elsewhere: the newest over both is used, and the end is the same."""

import shutil

import pytest

from maxlm.cli import main
from maxlm.config import CheckpointConfig
from maxlm.schema import ConfigError
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


def test_checkpoints_of_its_own_are_not_hidden(tmp_path, capsys):
    config = write_config(tmp_path / "tiny.py", prepared(tmp_path / "data"))
    (tmp_path / "run/checkpoints/3").mkdir(parents=True)
    assert train(config, tmp_path / "run", f"checkpoint.path={tmp_path / 'durable'}") == 2
    assert "has checkpoints of its own: move what is in it" in capsys.readouterr().err


@pytest.mark.parametrize(("fields", "message"), [
    ({"path": "gs://bucket/run"}, "checkpoint.path='gs://bucket/run' is a URL.*mount the bucket"),
    ({"local_path": "/dev/shm/x"}, "checkpoint.local_path and checkpoint.local_every_steps go together"),
    ({"local_every_steps": 5}, "checkpoint.local_path and checkpoint.local_every_steps go together"),
    ({"local_keep_last": 1}, "checkpoint.local_keep_last=1 must be 2 or more"),
])
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(ConfigError, match=message):
        CheckpointConfig(**fields)
