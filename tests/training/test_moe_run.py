"""A run with experts: its figures, its plot, a buffer that is too small, and its checkpoint on other meshes."""

import jax
import numpy as np
import pytest
from runs import command, prepared, rows_of, write_config

from maxlm.checkpoint import restore_state
from maxlm.config import MeshConfig
from maxlm.overrides import apply_overrides, load_config
from maxlm.parallel.mesh import make_mesh
from maxlm.training.state import abstract_state

EXPERTS = ("model.num_experts=8", "model.experts_per_token=2", "model.expert_dim=16", "model.moe.scores=sigmoid",
           "model.moe.bias_rate=0.01", "model.moe.buffer_factor=0.3", "logging.tensorboard=false",
           "train.num_steps=4", "logging.every_steps=2")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(config, run directory, stderr) of a run on expert=4 and context=2, whose buffers are far too small for an
    untrained router."""
    folder = tmp_path_factory.mktemp("moe")
    path = write_config(folder / "tiny.py", prepared(folder / "data"))
    words = [word for o in (*EXPERTS, "mesh.expert=4", "mesh.context=2") for word in ("--set", o)]
    code, _, error = command(["train", path, "--run-dir", folder / "run", *words])
    assert code == 0, error
    return apply_overrides(load_config(str(path)), list(EXPERTS)), folder / "run", error


def test_the_figures_of_a_run(made):
    _, run, _ = made
    rows = [row for row in rows_of(run) if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        load = np.asarray(row["experts"]["load"])
        assert load.shape == (1, 8) and np.isclose(load.mean(), 1, atol=1e-3)
        assert np.isclose(row["load_max_over_mean"], load.max(), atol=1e-3)
        assert row["dead_experts"] == (load == 0).sum() and 0 < row["load_entropy"] <= 1
        assert set(row["experts"]) == {"load", "max_over_mean", "entropy", "dead", "dropped", "balance_loss", "z_loss",
                                       "logit_rms"}
        assert row["balance_loss"] > 0 and row["router_z_loss"] > 0 and row["router_logit_rms"] > 0
    assert (run / "expert_load.png").stat().st_size > 5000


def test_a_buffer_that_is_full_says_so_and_counts(made):
    _, run, error = made
    rows = [row for row in rows_of(run) if "loss" in row]
    lost = [row["experts"]["dropped"][0] for row in rows]
    assert error.count("found no room and were left out: raise model.moe.buffer_factor") == 1
    assert lost[0] > 0 and rows[-1]["dropped_choices"] == sum(lost) < 4 * 8 * 32 * 2
    assert all(np.isfinite(row["loss"]) for row in rows)


@pytest.mark.parametrize(("expert", "context"), [(1, 1), (2, 4), (8, 1)])
def test_a_checkpoint_restores_elsewhere(made, expert, context):
    config, run, _ = made
    whole = restore_state(run / "checkpoints", 4, abstract_state(config, make_mesh(MeshConfig(), jax.devices()[:1])))
    bias = np.asarray(whole.params.layers_0.mlp.selection_bias[...])
    assert (np.abs(bias) > 0).any()
    like = abstract_state(config, make_mesh(MeshConfig(expert=expert, context=context)))
    there = restore_state(run / "checkpoints", 4, like)
    assert there.params.layers_0.mlp.gate[...].sharding.spec[1] == "expert"
    for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(whole), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
