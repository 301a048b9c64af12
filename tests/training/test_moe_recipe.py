"""configs/moe_tiny.py: how even its experts' load is with the bias and without, and what the committed record says."""

import json

import jax
import numpy as np
import pytest

from maxlm.data.folders import datasets_of
from maxlm.data.loader import TrainingData
from maxlm.overrides import apply_overrides, load_config
from maxlm.parallel.mesh import make_mesh
from maxlm.training.evaluate import to_device
from maxlm.training.state import init_state
from maxlm.training.step import compile_step

FIFTH, WINDOW, STEPS = 40, 10, 60  # of the recipe's 200 steps: its load only becomes more even after
BOUND = 1.3


def largest_loads(config, folder) -> list[float]:
    """Steps FIFTH to STEPS, by WINDOW as in the recipe's rows: the largest load over the mean, worst layer."""
    mesh, length = make_mesh(config.mesh, jax.devices()[:1]), config.train.seq_len
    data = TrainingData(datasets_of(config.data, length, folder), seq_len=length,
                        global_batch_size=config.train.global_batch_size, seed=config.train.seed)
    with jax.set_mesh(mesh):
        step, state, chosen = compile_step(config, mesh), init_state(config, mesh), []
        for index in range(STEPS):
            state, metrics = step(state, to_device(data.batch(index), mesh))
            chosen.append(metrics.load.chosen_E)
    windows_wLE = np.asarray(chosen[FIFTH:]).reshape(-1, WINDOW, *chosen[0].shape).sum(axis=1)
    return (windows_wLE.max(axis=2) / windows_wLE.mean(axis=2)).max(axis=1).tolist()


@pytest.mark.slow
def test_the_bias_alone_balances_the_recipe_after_a_fifth_of_it(request, tmp_path):
    recipe = load_config(str(request.config.rootpath / "configs" / "moe_tiny.py"))
    assert recipe.train.num_steps == 5 * FIFTH and recipe.logging.every_steps == WINDOW
    assert recipe.model.moe.balance_loss == 0 < recipe.model.moe.bias_rate
    assert max(largest_loads(recipe, tmp_path)) < BOUND
    assert min(largest_loads(apply_overrides(recipe, ["model.moe.bias_rate=0.0"]), tmp_path)) > BOUND  # the twin


def test_the_record_has_the_recipe_ahead_of_its_dense_twin_and_balanced(request):
    root = request.config.rootpath
    moe, dense = json.loads((root / "benchmarks" / "results" / "moe_vs_dense_cpu.json").read_text())["results"]
    steps = load_config(str(root / "configs" / "moe_tiny.py")).train.num_steps
    assert (moe["kind"], dense["kind"]) == ("moe", "dense")
    assert abs(moe["flops_per_token"] / dense["flops_per_token"] - 1) < 0.01
    assert {run["eval_loss"][-1][0] for kind in (moe, dense) for run in kind["runs"]} == {steps}
    made, twins = ({(run["learning_rate"], run["seed"]): run["eval_loss"][-1][1] for run in kind["runs"]}
                   for kind in (moe, dense))
    assert made.keys() == twins.keys() and {len(set(part)) > 1 for part in zip(*made, strict=True)} == {True}
    assert all(made[run] < twins[run] - 0.02 for run in made)  # on the same batches, which a seed orders
    assert min(made[run] for run in made if run[1] == 0) < min(twins[run] for run in made if run[1] == 0) - 0.02
    assert all(run["largest_after_a_fifth"] < BOUND for run in moe["runs"])
