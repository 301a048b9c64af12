"""Sweeps as data: what a grid makes, and that a mistake in one is a line with its place."""

import json
import math

import pytest

from maxlm.config import ModelConfig, RunConfig, ScheduleConfig, TrainConfig, training_difference
from maxlm.flops import parameter_count, training_flops_per_token
from maxlm.overrides import load_config
from maxlm.scaling.cost import Device, cost, memory_bytes, too_large, wall_seconds
from maxlm.scaling.grid import (
    Sweep,
    dirichlet,
    flops_per_step,
    isoflop,
    load_sweep,
    mixtures,
    product,
    rate_by_batch,
    trials,
    trunk_and_branches,
    values,
    zipped,
)
from maxlm.scaling.sweep import check_branches
from maxlm.schema import ConfigError, from_dict, to_dict

BASE = RunConfig(model=ModelConfig(num_layers=2, hidden_dim=64, num_heads=4, num_kv_heads=4, head_dim=16, mlp_dim=128,
                                   vocab_size=264),
                 train=TrainConfig(num_steps=400, global_batch_size=8, seq_len=64),
                 schedule=ScheduleConfig(warmup_steps=10))
LAPTOP = Device("cpu", "cpu", 8 * 2**30, 1e11)


def test_product_and_zip():
    rates, seeds = values("optimizer.learning_rate", 1e-3, 2e-3), values("train.seed", 0, 1)
    assert [(p["optimizer.learning_rate"], p["train.seed"]) for p in product(rates, seeds)] == [
        (1e-3, 0), (1e-3, 1), (2e-3, 0), (2e-3, 1)]
    assert [(p["optimizer.learning_rate"], p["train.seed"]) for p in zipped(rates, seeds)] == [(1e-3, 0), (2e-3, 1)]
    made = trials(BASE, product(rates, seeds))
    assert made[1].name == "learning_rate=0.001-seed=1" and made[1].config.train.seed == 1
    with pytest.raises(ConfigError, match=r"both set train\.seed"):
        product(seeds, seeds)
    with pytest.raises(ConfigError, match="equally long"):
        zipped(rates, seeds[:1])


def test_tokens_of_an_isoflop_ladder_are_solved_from_the_real_flops():
    sizes = [{"model.hidden_dim": width, "model.head_dim": width // 4} for width in (32, 64, 128)]
    made = trials(BASE, isoflop(BASE, (1e11, 1e12), sizes, warmup_fraction=0.1))
    assert len(made) == 6 and len({trial.name for trial in made}) == 6
    for trial in made:
        train = trial.config.train
        flops = training_flops_per_token(trial.config.model, 64) * train.num_steps * 8 * 64
        assert flops == pytest.approx(trial.columns["budget"], rel=0.5 / train.num_steps)
        assert trial.config.schedule.warmup_steps == round(0.1 * train.num_steps)
    with pytest.raises(ConfigError, match="below 10000"):
        isoflop(BASE, (1e11,), sizes, fewest_steps=10_000)


def test_a_batch_size_keeps_the_tokens():
    made = trials(BASE, rate_by_batch(BASE, (1e-3, 4e-3), (4, 16)))
    assert [(t.config.train.global_batch_size, t.config.train.num_steps) for t in made] == [(4, 800), (16, 200)] * 2
    assert {t.config.schedule.warmup_steps for t in made} == {20, 5}
    assert made[0].name == "lr0.001-batch4"


def test_branches_leave_the_trunk_while_its_rate_is_constant():
    made = trials(BASE, trunk_and_branches(BASE, (100, 200, 400), decay_fraction=0.2))
    trunk, *branches = made
    assert trunk.config.train.num_steps == 320 and trunk.config.schedule.name == "constant"
    assert [b.from_step for b in branches] == [80, 160, 320]
    assert all(b.from_step % trunk.config.checkpoint.keep_every == 0 for b in branches)
    check_branches(Sweep(made))
    spent = [cost(trial, Sweep(made), LAPTOP).flops_spent for trial in made]
    whole = [cost(trial, Sweep(made), LAPTOP).flops for trial in made[1:]]
    assert sum(spent) == pytest.approx(spent[0] * (320 + 20 + 40 + 80) / 320) and sum(spent) < sum(whole)
    other = trials(BASE, [{**trunk_and_branches(BASE, (100,))[1], "train.seed": 1}])
    with pytest.raises(ConfigError, match=r"cannot branch off trunk: train\.seed: 0 -> 1"):
        check_branches(Sweep((trunk, *other)))


def test_a_decay_may_change_only_before_it_begins():
    constant, decayed = (trial.config for trial in trials(BASE, trunk_and_branches(BASE, (100,))))
    assert training_difference(constant, decayed, at_step=80) == []
    assert training_difference(constant, decayed) != []
    assert training_difference(decayed, constant, at_step=81) != []


def test_mixtures_have_a_column_a_folder():
    shares = dirichlet(20, (1.0, 2.0, 1.0), seed=3)
    assert shares == dirichlet(20, (1.0, 2.0, 1.0), seed=3)
    assert all(math.isclose(sum(draw), 1) for draw in shares)
    assert 0.4 < sum(draw[1] for draw in shares) / 20 < 0.6
    made = trials(BASE, mixtures({"web": "a", "code": "b"}, [(3, 1), (1, 0)]))
    assert made[0].columns == {"share_web": 0.75, "share_code": 0.25}
    assert [d.path for d in made[1].config.data.mixture] == ["a"] and made[1].columns["share_code"] == 0


def test_the_sweeps_of_this_repository(request):
    folder = request.config.rootpath / "configs" / "sweeps"
    assert len(load_sweep(folder / "isoflop_tiny.py").trials) == 12
    ladder = load_sweep(folder / "isoflop_h100.py")
    largest = max(trial.columns["budget"] for trial in ladder.trials)
    assert len(ladder.trials) == 26 and min(trial.config.train.num_steps for trial in ladder.trials) >= 700
    for target in (load_config(path) for path in folder.glob("isoflop_h100_target*.py")):
        assert flops_per_step(target) * target.train.num_steps == pytest.approx(4 * largest, rel=1e-3)


def test_a_saved_config_is_a_config_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(BASE)))
    assert load_config(tmp_path / "config.json") == BASE
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json:1: not JSON"):
        load_config(tmp_path / "config.json")


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match="did you mean"):
        trials(BASE, values("train.sed", 1))
    with pytest.raises(ConfigError, match=r"run head_dim=3: model\.head_dim=3 must be even"):
        trials(BASE, values("model.head_dim", 3))
    with pytest.raises(ConfigError, match="are called a"):
        Sweep(trials(BASE, [{"name": "a"}, {"name": "a"}]))
    with pytest.raises(ConfigError, match="branches off 'b', which is not"):
        Sweep(trials(BASE, [{"name": "a", "branch_of": "b", "from_step": 3}]))
    path = tmp_path / "sweep.py"
    path.write_text("from maxlm.scaling.grid import *\ndef sweep():\n    return Sweep(())\n")
    with pytest.raises(ConfigError, match=r"sweep\.py:3: this sweep has no runs"):
        load_sweep(path)
    path.write_text("def config():\n    pass\n")
    with pytest.raises(ConfigError, match=r"no function sweep\(\)"):
        load_sweep(path)


def test_memory_is_what_xla_allots_on_an_h200(request):
    """The record of a measured run has its config and the bytes of the compiled program."""
    results = request.config.rootpath / "benchmarks" / "results"
    record = json.loads((results / "llama3_2_1b_h200_bf16.json").read_text())
    estimate = memory_bytes(from_dict(RunConfig, record["config"]), reference_attention=False)
    assert estimate == pytest.approx(record["bytes_per_chip"], rel=0.1)
    table, gradients = record["config"], 4 * record["parameters"]  # which come when what layers keep goes, or stay
    scanned = {**table, "compute": {**table["compute"], "layer_unroll": 1}}
    pieces = {**table, "train": {**table["train"], "grad_accumulation": 2, "global_batch_size": 16}}
    for changed in (scanned, pieces):
        more = memory_bytes(from_dict(RunConfig, changed), reference_attention=False) - estimate
        assert more == pytest.approx(gradients, rel=0.01)
    optimizer = {**record["config"]["optimizer"], "mu_dtype": "float8", "nu_dtype": "float8"}
    small = from_dict(RunConfig, {**record["config"], "optimizer": optimizer})
    saved = estimate - memory_bytes(small, reference_attention=False)
    assert saved == pytest.approx(parameter_count(small.model).total * 2 * (4 - 1 - 1 / 128), rel=0.01)


def test_what_cannot_fit_is_found_and_branches_wait():
    made = trials(BASE, [{"name": "small"}, {"name": "large", "model.vocab_size": 2**27}])
    costs = {trial.name: cost(trial, Sweep(made), LAPTOP) for trial in made}
    (line,) = too_large(costs, LAPTOP, 1)
    assert "run large needs about" in line
    ladder = Sweep(trials(BASE, trunk_and_branches(BASE, (100, 200))), flops_per_second=1e10, startup_seconds=1)
    costs = {trial.name: cost(trial, ladder, LAPTOP) for trial in ladder.trials}
    longest = costs["trunk"].seconds + costs["steps200"].seconds
    assert wall_seconds(costs, ladder, 2) == pytest.approx(longest)
    assert wall_seconds(costs, ladder, 1) == pytest.approx(sum(row.seconds for row in costs.values()))
