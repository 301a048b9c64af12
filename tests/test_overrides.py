"""Config files and `--set`: what is accepted, and the one line that each mistake gets."""

import pytest

from maxlm.config import DatasetConfig, ModelConfig, RunConfig
from maxlm.overrides import apply_overrides, load_config
from maxlm.schema import ConfigError


@pytest.mark.parametrize(
    "override, read, value",
    [
        ("model.num_layers=4", lambda c: c.model.num_layers, 4),
        ("model.vocab_size=50_304", lambda c: c.model.vocab_size, 50304),
        ("optimizer.learning_rate=3e-4", lambda c: c.optimizer.learning_rate, 3e-4),
        ("optimizer.clip_norm=1", lambda c: c.optimizer.clip_norm, 1.0),
        ("model.tie_embeddings=False", lambda c: c.model.tie_embeddings, False),
        ("model.rope.theta=500000", lambda c: c.model.rope.theta, 500_000.0),
        ("model.rope.scaling=llama3", lambda c: c.model.rope.scaling, "llama3"),
        ("mesh.fsdp=rest", lambda c: c.mesh.fsdp, "rest"),
        ("mesh.fsdp=8", lambda c: c.mesh.fsdp, 8),
        ("compute.layer_unroll=all", lambda c: c.compute.layer_unroll, "all"),
        ("data.path=a=b c", lambda c: c.data.path, "a=b c"),
        ("data.path=none", lambda c: c.data.path, None),
        ("logging.sample_prompt= def f", lambda c: c.logging.sample_prompt, " def f"),
        ('model.layer_pattern=["local","global"]', lambda c: c.model.layer_pattern, ("local", "global")),
        (
            'data.mixture=[{"path": "a", "weight": 2}, {"path": "b"}]',
            lambda c: c.data.mixture,
            (DatasetConfig("a", 2), DatasetConfig("b")),
        ),
    ],
)
def test_a_value_is_read_by_the_type_of_its_field(override, read, value):
    got = read(apply_overrides(RunConfig(), [override]))
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.num_layers=4.0", "model.num_layers='4.0' must be an integer"),
        ("model.num_layers=", "model.num_layers='' must be an integer"),
        ("model.num_layers=true", "must be an integer"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate='fast' must be a number"),
        ("optimizer.learning_rate=nan", "must be a number"),
        ("optimizer.learning_rate=inf", "must be a number"),
        ("optimizer.name=adam", "must be one of 'adamw', 'muon'"),
        ("model.tie_embeddings=yes", "must be true or false"),
        ("mesh.fsdp=all", "must be an integer or 'rest'"),
        ("mesh.fsdp=-1", "must be 1 or more"),
        ("model.num_layer=4", "did you mean 'model.num_layers'?"),
        ("modle.num_layers=4", "did you mean 'model.num_layers'?"),
        ("model.learning_rate=1", "did you mean 'optimizer.learning_rate'?"),
        ("model.num_layers.x=4", "unknown config key 'model.num_layers.x'"),
        ("model=4", "model is a section: set its fields one by one (model.num_layers, "),
        ("model.rope=4", "(model.rope.theta, "),
        ("model.layer_pattern=local,global", "must be a JSON list"),
        ('model.layer_pattern={"a": 1}', "must be a JSON list, not dict"),
        ('model.layer_pattern=["lokal"]', "one of 'global', 'local'"),
        ("data.mixture.weight=2", "data.mixture is a list: give the whole of it as JSON"),
        ('data.mixture=[{"weight": 2}]', 'data.mixture: {"weight": 2} lacks path'),
        ('data.mixture=[{"path": "a", "wieght": 2}]', "did you mean 'data.mixture.weight'?"),
        ("data.mixture=[3]", "data.mixture"),
        ("model.num_layers", "must have the form section.field=value"),
        ("=4", "must have the form section.field=value"),
    ],
)
def test_a_mistake_gets_one_line_naming_the_field(override, message):
    with pytest.raises(ConfigError) as error:
        apply_overrides(RunConfig(), [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_fields_that_depend_on_each_other_change_together():
    changed = apply_overrides(RunConfig(), ["model.num_heads=15", "model.num_kv_heads=5"])
    assert (changed.model.num_heads, changed.model.num_kv_heads) == (15, 5)
    with pytest.raises(ConfigError, match="must be a multiple of model.num_kv_heads"):
        apply_overrides(RunConfig(), ["model.num_heads=15"])


def test_the_last_of_two_values_counts_and_the_rest_is_untouched():
    base = RunConfig(model=ModelConfig(layer_pattern=("local", "global"), num_layers=6))
    changed = apply_overrides(base, ["model.num_layers=4", "model.num_layers=8"])
    assert changed.model.num_layers == 8
    assert apply_overrides(changed, ["model.num_layers=6"]) == base
    assert apply_overrides(base, []) == base


GOOD = "from maxlm.config import *\n\ndef config():\n    return RunConfig(train=TrainConfig(seed=7))\n"


def test_a_config_file_is_executed(tmp_path):
    (tmp_path / "base.py").write_text(GOOD)
    variant = tmp_path / "variant.py"
    variant.write_text(
        "import dataclasses\nfrom pathlib import Path\nfrom maxlm.overrides import load_config\n\n"
        "def config():\n    base = load_config(Path(__file__).with_name('base.py'))\n"
        "    return dataclasses.replace(base, train=dataclasses.replace(base.train, num_steps=200))\n"
    )
    loaded = load_config(str(variant))
    assert (loaded.train.seed, loaded.train.num_steps) == (7, 200)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.py", "variant.py"], "loading leaves nothing behind"


@pytest.mark.parametrize(
    "source, message",
    [
        (b"", "no function config()"),
        (b"config = 3\n", "no function config()"),
        (b"def config():\n    return 3\n", "config() must return a RunConfig, not int"),
        (b"def config(:\n", "bad.py:1: invalid syntax"),
        (b"x = 1\n\x00\n", "bad.py"),
        (b"\xff\xfe\x00", "is not a Python file"),
        (b"import no_such_module\n", "bad.py:1: ModuleNotFoundError: No module named 'no_such_module'"),
        (b"def config(a):\n    return a\n", "bad.py: TypeError: config() missing 1 required"),
        (
            GOOD.replace("seed=7", "sede=7").encode(),
            "bad.py:4: TypeError: TrainConfig.__init__() got an unexpected keyword argument 'sede'; "
            "did you mean 'seed'?",
        ),
        (GOOD.replace("seed=7", "seed=-7").encode(), "bad.py:4: train.seed=-7 must be 0 or greater"),
    ],
)
def test_a_bad_config_file_gets_one_line_with_file_and_line(tmp_path, source, message):
    path = tmp_path / "bad.py"
    path.write_bytes(source)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_config_file_names_the_near_ones(tmp_path):
    (tmp_path / "llama3_8b.py").write_text(GOOD)
    for wrong in ("llama_8b.py", "llama3_8b"):
        with pytest.raises(ConfigError, match=r"did you mean .*llama3_8b\.py\?"):
            load_config(tmp_path / wrong)
    with pytest.raises(ConfigError, match="holds llama3_8b.py"):
        load_config(tmp_path / "zzz.py")
    with pytest.raises(ConfigError, match="there is no folder"):
        load_config(tmp_path / "absent" / "x.py")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
