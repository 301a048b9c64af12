"""The schema: every mistake is refused in one line with its field, and a config survives JSON."""

import dataclasses
import json
import pathlib
import re

import pytest

from maxlm import config as c
from maxlm.flops import parameter_count
from maxlm.overrides import apply_overrides, load_config
from maxlm.schema import ConfigError, flatten, from_dict, to_dict

RECIPES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
UNUSUAL = c.RunConfig(
    model=c.ModelConfig(layer_pattern=("local", "global"), rope=c.RopeConfig(theta=5e5, scaling="yarn", factor=4.0)),
    data=c.DataConfig(mixture=(c.DatasetConfig("a", 2.0), c.DatasetConfig("b"))),
    mesh=c.MeshConfig(data=2, fsdp=4),
    compute=c.ComputeConfig(layer_unroll="all", loss_chunks=4),
)


@pytest.mark.parametrize("config", [c.RunConfig(), UNUSUAL])
def test_json_gives_back_an_equal_config(config):
    again = from_dict(c.RunConfig, json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert flatten(again) == flatten(config)
    assert again != dataclasses.replace(config, train=c.TrainConfig(seed=1))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: c.ModelConfig(num_layers="4"), "model.num_layers='4' must be an integer"),
        (lambda: c.ModelConfig(num_layers=4.0), "model.num_layers=4.0 must be an integer"),
        (lambda: c.ModelConfig(num_layers=True), "model.num_layers=True must be an integer"),
        (lambda: c.ModelConfig(num_layers=0), "model.num_layers=0 must be greater than 0"),
        (lambda: c.ModelConfig(num_kv_heads=5), "must be a multiple of model.num_kv_heads=5"),
        (lambda: c.ModelConfig(head_dim=63), "model.head_dim=63 must be even"),
        (lambda: c.ModelConfig(activation="relu"), "one of 'swiglu', 'geglu', 'gelu'"),
        (lambda: c.ModelConfig(layer_pattern=()), "model.layer_pattern must name at least one"),
        (lambda: c.ModelConfig(layer_pattern=("local",) * 5), "must be a multiple of the 5 layers"),
        (lambda: c.ModelConfig(layer_pattern=["global"]), "model.layer_pattern=['global'] must be a list"),
        (lambda: c.ModelConfig(num_experts=8), "model.experts_per_token=0 must be greater than 0"),
        (lambda: c.RopeConfig(low_freq_factor=4.0), "must be below high_freq_factor"),
        (lambda: c.DataConfig(path="a", source="b"), "keep one of path, source, mixture"),
        (lambda: c.DataConfig(heldout_fraction=1.0), "data.heldout_fraction=1.0 must be between 0 and 1"),
        (lambda: c.TrainConfig(grad_accumulation=5), "must be a multiple of train.grad_accumulation=5"),
        (lambda: c.OptimizerConfig(learning_rate=float("nan")), "optimizer.learning_rate=nan must be a number"),
        (lambda: c.OptimizerConfig(b2=1.0), "optimizer.b2=1.0 must be in [0, 1)"),
        (lambda: c.ScheduleConfig(name="wsd"), "schedule.decay_steps must be set"),
        (lambda: c.MeshConfig(fsdp=-1), "mesh.fsdp=-1 must be 1 or more"),
        (lambda: c.CheckpointConfig(every_steps=0), "checkpoint.every_steps=0 must be greater than 0"),
        (lambda: c.RunConfig(model=None), "model=None must be ModelConfig"),
        (lambda: c.RunConfig(train=c.TrainConfig(num_steps=50)), "more than train.num_steps=50"),
        (lambda: from_dict(c.RunConfig, {"model": {"num_layer": 3}}), "did you mean 'model.num_layers'?"),
        (lambda: from_dict(c.RunConfig, {"modle": {}}), "did you mean 'model'?"),
        (lambda: from_dict(c.RunConfig, {"model": 3}), "must be a table of fields, not int"),
        (lambda: from_dict(c.RunConfig, []), "config must be a table of fields, not list"),
    ],
)
def test_a_mistake_is_refused_in_one_line(build, message):
    with pytest.raises(ConfigError) as error:
        build()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.RunConfig().model.num_layers = 3


@pytest.mark.parametrize(
    "key, value, changes_training",
    [
        ("model.num_layers", "6", True),
        ("model.rope.theta", "1e6", True),
        ("train.seed", "1", True),
        ("train.global_batch_size", "64", True),
        ("train.grad_accumulation", "2", True),
        ("optimizer.learning_rate", "1e-3", True),
        ("data.source", "python-stdlib", True),
        ("precision.recipe", "float32", True),
        ("train.num_steps", "2000", False),
        ("mesh.fsdp", "8", False),
        ("compute.layer_unroll", "all", False),
        ("remat.policy", "full", False),
        ("checkpoint.every_steps", "7", False),
        ("logging.every_steps", "1", False),
        ("eval.num_batches", "3", False),
        ("data.path", "elsewhere", False),
    ],
)
def test_what_may_change_when_a_run_resumes(key, value, changes_training):
    saved = c.RunConfig()
    difference = c.training_difference(saved, apply_overrides(saved, [f"{key}={value}"]))
    assert bool(difference) == changes_training
    assert all(key in line and " -> " in line for line in difference)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_how_to_run_it(path):
    built = load_config(path)
    assert from_dict(c.RunConfig, json.loads(json.dumps(to_dict(built)))) == built
    said = path.read_text(encoding="utf-8").split('"""')[1]
    assert f"maxlm train configs/{path.name} --run-dir " in said
    assert "Hardware: " in said and "Reaches: " in said


@pytest.mark.parametrize(
    "name, parameters",
    [("llama3_2_1b", 1_235_814_400), ("llama3_8b", 8_030_261_248), ("llama3_70b", 70_553_706_496),
     ("gpt2_124m", 123_587_328)],
)
def test_recipes_have_the_sizes_that_they_state(name, parameters):
    path = next(path for path in RECIPES if path.stem == name)
    assert parameter_count(load_config(path).model).total == parameters
    assert f"{parameters:,}" in path.read_text() or name == "gpt2_124m"


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem.startswith("llama3")], ids=lambda p: p.stem)
def test_the_meshes_in_a_recipe_fit_its_model_and_batch(path):
    """Every `--set` line of a docstring is accepted, and divides the heads and the batch."""
    said = path.read_text(encoding="utf-8").split('"""')[1]
    lines = [re.findall(r"--set (\S+)", line) for line in said.splitlines() if "data.path" not in line]
    assert any(lines)
    for overrides in lines:
        config = apply_overrides(load_config(path), overrides)
        rows = config.mesh.data * (1 if config.mesh.fsdp == "rest" else config.mesh.fsdp)
        assert config.train.global_batch_size % (rows * config.train.grad_accumulation) == 0
        assert config.model.num_kv_heads % config.mesh.tensor == 0
