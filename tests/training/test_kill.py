"""A run killed or stopped at any moment and started again ends with the same bytes and the same rows."""

import functools
import json
import random
import signal
import time

import jax
import pytest

from tests.training.runs import ONE_DEVICE, arguments, command, prepared, rows_of, start, timeless, write_config

STEPS = 40
SETTINGS = (f"train.num_steps={STEPS}", "checkpoint.every_steps=2", "eval.every_steps=5", "eval.num_batches=1",
            "logging.sample_prompt=")


def steps_done(run):
    """Logged steps so far; a kill may have cut the last line short."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def saving(run):
    return any(run.glob("checkpoints/*-tmp"))


def signalled(config, run, number, after_step, delay=0.0, inside_save=False):
    """A life of the run, sent `number` `delay` seconds after it logged `after_step`, or in the next save after that;
    (exit code, stderr)."""
    process = start(arguments(config, run, *SETTINGS), ONE_DEVICE)
    deadline = time.monotonic() + 100
    while steps_done(run) < after_step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    while inside_save and not saving(run) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(config file, digest, rows) of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder / "tiny.py", prepared(folder / "data"))
    code, _, error = command(arguments(config, folder / "run", *SETTINGS), ONE_DEVICE)
    assert code == 0, error
    return config, digest(folder / "run"), timeless(folder / "run")


def digest(run):
    code, out, error = command(["checkpoint", "digest", run], ONE_DEVICE)
    assert code == 0, error
    return out.split()[-1]


def check_ends_like(whole, run):
    config, expected, rows = whole
    code, _, error = command(arguments(config, run, *SETTINGS), ONE_DEVICE)
    assert code == 0, error
    assert (run / "DONE").exists()
    assert digest(run) == expected
    assert timeless(run) == rows


def test_killed_and_stopped_once_each(whole, tmp_path):
    draw = random.Random(0)
    run = tmp_path / "run"
    code, _ = signalled(whole[0], run, signal.SIGKILL, draw.randint(5, 15), draw.uniform(0, 0.1))
    assert code == -signal.SIGKILL and not (run / "DONE").exists()
    code, error = signalled(whole[0], run, signal.SIGTERM, draw.randint(20, 25), draw.uniform(0, 0.05))
    assert code == 0, error
    assert "SIGTERM: saving after this step" in error and "resumed from step" in error
    last = rows_of(run)[-1]
    assert last["preempted"] is True and last["step"] < STEPS
    assert (run / "checkpoints" / str(last["step"])).is_dir()
    check_ends_like(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_three_times(whole, tmp_path, seed):
    """Before there is a checkpoint, inside a save, and at a random moment."""
    draw = random.Random(seed)
    first, second = draw.randint(5, 15), draw.randint(20, STEPS - 10)
    lives = [dict(after_step=1), dict(after_step=first, inside_save=True),
             dict(after_step=second, delay=draw.uniform(0, 0.05))]
    for number, life in enumerate(lives):
        code, _ = signalled(whole[0], tmp_path, signal.SIGKILL, **life)
        assert code == -signal.SIGKILL
        assert saving(tmp_path) or number != 1, "the second kill must leave a save cut short"
    check_ends_like(whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_at_every_kind_of_step(whole, tmp_path, number):
    """Also where an evaluation is due (5, 10, ...), which the next start makes up for."""
    for after_step in (4, 9, 17):
        code, error = signalled(whole[0], tmp_path, number, after_step)
        assert code == 0 and number.name in error, error
        assert rows_of(tmp_path)[-1]["preempted"] is True
    check_ends_like(whole, tmp_path)


@pytest.mark.slow
def test_an_evaluation_owed_by_a_stop_is_made_up_for(tmp_path, monkeypatch):
    """Stopped exactly on an evaluating step, and on the last one."""
    from maxlm.overrides import apply_overrides, load_config
    from maxlm.resilience import StopRequest
    from maxlm.training.loop import train

    config = write_config(tmp_path / "tiny.py", prepared(tmp_path / "data"))
    settings = ("train.num_steps=10", "checkpoint.every_steps=4", "eval.every_steps=5", "logging.tensorboard=false")
    config = apply_overrides(load_config(config), settings)
    start_training = functools.partial(train, config, devices=jax.devices()[:1])
    assert start_training(tmp_path / "whole").evaluation.tokens > 0
    for stop_at in (5, 10):
        monkeypatch.setattr(StopRequest, "should_stop", lambda self, step, at=stop_at: step == at)
        outcome = start_training(tmp_path / "run")
        assert (outcome.step, outcome.preempted, outcome.evaluation) == (stop_at, True, None)
        assert rows_of(tmp_path / "run")[-1]["preempted"] is True and not (tmp_path / "run" / "DONE").exists()
    monkeypatch.undo()
    assert start_training(tmp_path / "run").evaluation.tokens > 0
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")
