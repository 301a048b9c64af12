"""`maxlm compile`: the real compiler for slices that are not there, and for the fake devices that are."""

import json
import os

import pytest

from maxlm.cli import main
from maxlm.config import RunConfig
from maxlm.planning import report
from maxlm.planning.compiled import compile_for, identity
from maxlm.planning.topology import find_target
from maxlm.schema import ConfigError, from_dict

CONTRACT = {"fits", "bytes_per_chip", "hbm_bytes", "flops_per_step", "collective_bytes", "step_seconds_estimate",
            "tokens_per_second_per_chip_estimate", "mfu_estimate", "compile_seconds"}
SHAPE = {
    "model": dict(num_layers=16, hidden_dim=512, num_heads=8, num_kv_heads=4, head_dim=64, mlp_dim=1024,
                  vocab_size=4096),
    "train": dict(num_steps=10, global_batch_size=8, seq_len=512, grad_accumulation=2),
    "schedule": dict(warmup_steps=1), "remat": {"policy": "full"},
}
SPARSE = SHAPE | {
    "model": SHAPE["model"] | dict(num_experts=8, experts_per_token=2, expert_dim=256, moe={"buffer_factor": 2.0}),
    "mesh": {"expert": 4},
}


def config_of(table):
    return from_dict(RunConfig, table)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(SHAPE))
    return path


@pytest.mark.parametrize(("name", "slices", "told"), [
    ("v5q:2x2", 1, "did you mean 'v5p'; known: v4, v5e, v5p, v6e, 7x, local, gpu"),
    ("v5p:2x2", 1, "a slice of v5p has 3 sizes, such as v5p:4x4x8"),
    ("v5e:0x4", 1, "must be like v5e:16x16"),
    ("v5e:2x2", 0, "--slices=0 must be 1 or more"),
    ("local", 2, "--slices=2 is for TPU slices"),
])
def test_a_topology_that_is_none_is_told(name, slices, told):
    with pytest.raises(ConfigError, match=told):
        find_target(name, slices)


def test_identity_changes_with_what_decides():
    config, target = config_of(SHAPE), find_target("v5e:2x2")
    names = {identity(config, target, False), identity(config_of(SPARSE), target, False),
             identity(config, find_target("v5e:2x4"), False), identity(config, find_target("v5e:2x2", 2), False),
             identity(config, target, True)}
    assert len(names) == 5 and identity(config_of(SHAPE), target, False) in names


@pytest.mark.slow
def test_what_is_known_before_machine_code_is_what_the_program_takes():
    """The compile that stops early says of memory what the finished program does."""
    config, target = config_of(SHAPE), find_target("v5e:2x2")
    early, whole = (compile_for(config, target, codegen=codegen) for codegen in (False, True))
    memory = whole.facts["memory"]
    assert early.memory == whole.memory
    assert early.memory["arguments"] == pytest.approx(memory["argument"], rel=1e-3)
    assert early.memory["temporaries"] == pytest.approx(memory["temp"], rel=1e-3)
    assert memory["generated_code"] > 0 and early.hlo == whole.hlo


@pytest.mark.slow
def test_a_step_with_experts_is_read(recipe):
    """Whose `Compiled.as_text()` fails in libtpu 0.0.52."""
    record = report.compile_report(config_of(SPARSE), find_target("v5e:2x2"))
    rows = 8 // 2 // 4 * 512 * 2  # of a device and microbatch, one a choice
    trips = 2 * 16 * 2 * (2 + 1)  # microbatches, layers, there and back; forward, again for the gradients, and these
    expected = trips * rows * 512 * 2 * 3 / 4
    assert record["collective_bytes"]["expert"]["ragged-all-to-all"] == pytest.approx(expected, rel=0.35)


@pytest.mark.slow
def test_the_verb_prints_and_writes_and_remembers(recipe, tmp_path, capfd):
    arguments = ["compile", str(recipe), "--topology", "v5e:2x2", "--json", str(tmp_path / "r.json")]
    assert main(arguments) == 0
    told = capfd.readouterr()
    assert "fits" in told.out and "all-gather" in told.out and told.err == "", "libtpu's warnings are silenced"
    record = json.loads((tmp_path / "r.json").read_text())
    assert record.keys() >= CONTRACT and record["fits"] is True and record["cached"] is False
    layers = 16 * (512 * (8 + 8) * 64 + 512 * 512 + 3 * 512 * 1024)
    gathered = 2 * 2 * layers * 2 * 3 / 4  # two microbatches, forward and again for the gradients, 2 bytes, ring of 4
    assert record["collective_bytes"]["fsdp"]["all-gather"] == pytest.approx(gathered, rel=0.25)
    assert record["executed_flops_per_device"] * 4 == pytest.approx(record["flops_per_step"] * 4 / 3, rel=0.15)
    assert 0 < record["mfu_estimate"] < 1
    assert main(arguments) == 0
    again = json.loads((tmp_path / "r.json").read_text())
    assert again["cached"] is True and again["bytes_per_chip"] == record["bytes_per_chip"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "devices"), [
    ("v4:2x2x1", 4), ("7x:2x2x1", 8), pytest.param("v6e:2x2", 4, marks=pytest.mark.exhaustive)])
def test_the_other_chips(recipe, name, devices):
    """v4's two cores are one device, as they run; TPU7x's chiplets are two. Rates are a chip's, bytes a chip's too."""
    small = SHAPE | {"model": SHAPE["model"] | {"num_layers": 2}, "train": SHAPE["train"] | {"global_batch_size": 16}}
    record = report.compile_report(config_of(small), find_target(name))
    assert (record["devices"], record["chips"], record["fits"]) == (devices, 4, True)
    parameters = 4096 * 512 + 2 * (512 * (8 + 8) * 64 + 512 * 512 + 3 * 512 * 1024)
    assert record["bytes_by_kind"]["parameters"] == pytest.approx(4 * parameters / 4, rel=0.01)
    assert 0 < record["mfu_estimate"] < 1


@pytest.mark.slow
def test_what_does_not_fit_is_an_answer(recipe, tmp_path, capfd):
    large = ["--set", "train.global_batch_size=4096", "--set", "train.seq_len=2048", "--set", "remat.policy=none",
             "--set", "train.grad_accumulation=1"]
    assert main(["compile", str(recipe), "--topology", "v5e:2x2", "--json", str(tmp_path / "r.json"), *large]) == 0
    assert "DOES NOT FIT" in capfd.readouterr().out
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["fits"] is False and record["bytes_per_chip"] > 10 * record["hbm_bytes"]


@pytest.mark.slow
def test_what_is_attached_is_compiled_too(recipe, tmp_path, capfd):
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    small = ["--set", "train.global_batch_size=16", "--set", "model.num_layers=2", "--set", "train.seq_len=64",
             "--set", "compute.attention=reference"]
    assert main(["compile", str(recipe), "--topology", "local", "--json", str(tmp_path / "r.json"), *small]) == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["chips"] == 8 and record["fits"] is None and record["mfu_estimate"] is None
    assert record["collective_bytes"]["fsdp"]["all-gather"] > 0
    assert main(["compile", str(recipe), "--topology", "gpu", *small]) == 2
    assert "--topology=gpu: the devices attached here are cpu" in capfd.readouterr().err


@pytest.mark.slow
def test_a_mesh_that_does_not_suit_the_slice_is_one_line(recipe, capfd):
    assert main(["compile", str(recipe), "--topology", "v5e:2x2", "--set", "mesh.tensor=3"]) == 2
    told = capfd.readouterr().err
    assert told.startswith("maxlm: mesh.tensor = 3 does not divide the 4 devices")
    assert len(told.splitlines()) == 1


@pytest.mark.slow
def test_two_slices_meet_over_data_alone(recipe):
    config = config_of(SHAPE | {"mesh": {"data": 2}, "train": SHAPE["train"] | {"global_batch_size": 16}})
    record = report.compile_report(config, find_target("v5e:2x2", 2))
    assert record["chips"] == 8 and record["roofline"]["dcn_seconds"] > 0
    assert set(record["collective_bytes"]) <= {"fsdp", "data", "data+fsdp"}
    assert record["collective_bytes"]["data"]["all-reduce"] > 1e6
