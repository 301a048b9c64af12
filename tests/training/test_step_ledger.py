"""The ledger of real runs: the same whatever the mesh and however often the run was stopped."""

import dataclasses
import itertools
import shutil

import jax
import pytest

from maxlm.checkpoint import read_meta
from maxlm.overrides import apply_overrides, load_config
from maxlm.resilience import RunStopped, StopRequest, read_ledger
from maxlm.training import loop, step_ledger
from maxlm.training import step as step_module
from maxlm.training.loop import train
from tests.training.runs import STEPS, prepared, write_config

SETTINGS = ("logging.tensorboard=false", "eval.every_steps=0", "resilience.digest_every_steps=3")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    return apply_overrides(load_config(write_config(folder / "tiny.py", prepared(folder / "data"))), SETTINGS)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The run directory of a run that nothing stops, on one device."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(config, run, devices=jax.devices()[:1])
    return run


def steps_of(run, *names):
    return [{name: step.get(name) for name in ("step", "index", *names)} for step in read_ledger(run).steps()]


def flip_a_bit_before_step(step, monkeypatch, at_call):
    """Before its call number `at_call` (from 1), the compiled step gets a state with one bit of a parameter flipped."""
    calls = itertools.count(1)

    def compiled(*arguments):
        real = step_module.compile_step(*arguments)

        def call(state, batch):
            if next(calls) == at_call:
                assert int(state.step) == step - 1
                gains = state.params.final_norm.gain
                flipped = jax.lax.bitcast_convert_type(gains[...], "uint32").at[3].add(1 << 20)
                gains[...] = jax.lax.bitcast_convert_type(flipped, "float32")
            return real(state, batch)

        call.as_text = real.as_text
        return call

    monkeypatch.setattr(loop, "compile_step", compiled)


def stopped_at(step, monkeypatch, config, run, **options):
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "should_stop", lambda self, now: now == step)
        assert train(config, run, **options).preempted


def test_each_step_has_its_line(whole):
    steps = read_ledger(whole).steps()
    assert [(s["step"], s["index"]) for s in steps] == [(n, n - 1) for n in range(1, STEPS + 1)]
    assert len({s["batch"] for s in steps}) == STEPS
    # every second step is saved, and every third is digested besides
    assert [s["step"] for s in steps if "params" in s] == [2, 3, 4, 6]
    assert {s["step"] for s in steps if "optimizer" in s} == {2, 3, 4, 6}
    saved = read_meta(whole / "checkpoints", 4)["ledger"]
    assert (saved["params"], saved["optimizer"]) == (steps[3]["params"], steps[3]["optimizer"])


def test_stopped_and_resumed_it_says_the_same(config, whole, tmp_path, monkeypatch, capsys):
    stopped_at(3, monkeypatch, config, tmp_path, devices=jax.devices()[:1])
    train(config, tmp_path, devices=jax.devices()[:1])
    names = ("batch", "loss", "grad_norm", "lineage")
    assert steps_of(tmp_path, *names) == steps_of(whole, *names)
    assert read_ledger(tmp_path).steps()[-1]["params"] == read_ledger(whole).steps()[-1]["params"]
    assert "made again" not in capsys.readouterr().err


def test_another_mesh_sees_the_same_batches_and_starts_a_lineage(config, whole, tmp_path, monkeypatch, capsys):
    stopped_at(2, monkeypatch, config, tmp_path, devices=jax.devices()[:1])
    other = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=2))
    train(other, tmp_path, devices=jax.devices()[:2])
    assert steps_of(tmp_path, "batch") == steps_of(whole, "batch")
    first, *_, last = read_ledger(tmp_path).steps()
    assert first["lineage"] != last["lineage"] and last["environment"]["mesh"] == {"data": 2}
    starts = [r for r in read_ledger(tmp_path).records if r["kind"] == "start"]
    assert [s["step"] for s in starts] == [0, 2]
    assert starts[1]["params"] == read_ledger(whole).steps()[1]["params"], "a digest does not depend on the mesh"


def test_a_bit_flipped_in_memory_shows_when_the_step_is_made_again(config, whole, tmp_path, monkeypatch, capsys):
    """Killed after step 6 and before its save, a run goes on from the checkpoint of step 4."""
    for _ in range(2):
        shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "checkpoints" / "6")
        train(config, tmp_path, devices=jax.devices()[:1])
        assert "made again" not in capsys.readouterr().err
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    flip_a_bit_before_step(6, monkeypatch, at_call=2)
    train(config, tmp_path, devices=jax.devices()[:1])
    assert "step 6 was made again and gave another" in capsys.readouterr().err
    (found,) = [r for r in read_ledger(tmp_path).records if r["kind"] == "nondeterminism"]
    assert found["step"] == 6 and "batch" not in found["now"] and "params" in found["now"]


def test_a_checkpoint_that_holds_other_values_stops_the_run(config, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    monkeypatch.setattr(step_ledger, "tree_digest", lambda tree: jax.numpy.full(2, 7, "uint32"))
    with pytest.raises(RunStopped, match="checkpoint of step 4 does not hold what was saved"):
        train(config, tmp_path, devices=jax.devices()[:1])
