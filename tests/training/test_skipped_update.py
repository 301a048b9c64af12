"""A step whose loss or gradient is not finite changes no bit of the state but its count, at no cost in memory."""

import jax
import numpy as np
import pytest

from maxlm.parallel.mesh import make_mesh
from maxlm.training.schedule import make_schedule
from maxlm.training.state import abstract_state, init_state
from maxlm.training.step import compile_step
from tests.training.tiny import VOCAB, host_batch, leaves, on, placed, tiny_config

RARE = VOCAB - 1  # the token whose embedding is not a number


def with_rare(batch, rare):
    """`batch` with every RARE token replaced, and one put back where `rare`."""
    tokens = np.where(batch["tokens"] == RARE, 0, batch["tokens"])
    if rare:
        tokens[5, 2] = RARE
    return batch | {"tokens": tokens}


def poisoned(config, mesh):
    """A fresh state in which the embedding of RARE is NaN."""
    state = init_state(config, mesh)
    values = leaves(state)
    table = next(a for a in values if a.shape == (VOCAB, config.model.hidden_dim))
    values = [a.copy() for a in values]
    next(a for a in values if (a == table).all() and a.shape == table.shape)[RARE] = np.nan
    return placed(values, abstract_state(config, mesh))


def bits(tree):
    return [a.tobytes() for a in leaves(tree)]


@pytest.mark.parametrize(("optimizer", "devices"), [
    (dict(name="adamw"), 1),
    pytest.param(dict(name="adamw", clip_norm=0.0, mu_dtype="float8", nu_dtype="bfloat16"), 4, marks=pytest.mark.slow),
    pytest.param(dict(name="muon"), 4, marks=pytest.mark.slow),
], ids=["adamw", "no clipping, float8 and bfloat16, four devices", "muon"])
def test_a_bad_step_keeps_every_bit_and_the_next_goes_on(optimizer, devices):
    config = tiny_config(optimizer=dict(weight_decay=0.0, **optimizer), mesh=dict(data=2 if devices > 1 else 1),
                         model=dict(num_layers=1, layer_pattern=["global"], tie_embeddings=False))
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        step = compile_step(config, mesh)
        state, first = step(poisoned(config, mesh), on(mesh, with_rare(host_batch(0), False)))
        before, count = (bits(state.params), bits(state.opt_state)), int(state.step)
        state, bad = step(state, on(mesh, with_rare(host_batch(1), True)))
        after = (bits(state.params), bits(state.opt_state))
        assert int(state.step) == count + 1
        state, good = step(state, on(mesh, with_rare(host_batch(1), False)))
    assert [int(m.skipped) for m in (first, bad, good)] == [0, 1, 0]
    assert np.isnan(float(bad.loss)) and not np.isfinite(float(bad.grad_norm))
    assert after == before
    assert np.isfinite(float(good.loss)) and bits(state.params) != before[0] and bits(state.opt_state) != before[1]
    schedule = make_schedule(config.schedule, 1e-2, 20)
    assert float(good.learning_rate) == pytest.approx(float(schedule(1))), "the second update, at the second rate"


@pytest.mark.slow
def test_the_skip_adds_no_copy_of_the_state(monkeypatch):
    """Against the same step without the selection: all of the state is donated still, and temporaries grow by far less
    than one of its three parts (parameters and two moments)."""
    config = tiny_config(model=dict(num_layers=1, layer_pattern=["global"], hidden_dim=64, mlp_dim=256))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(abstract_state(config, mesh)))

    def memory():
        with jax.set_mesh(mesh):
            return compile_step(config, mesh).memory_analysis()

    ours = memory()
    monkeypatch.setattr(jax.lax, "select", lambda good, new, old: new)
    without = memory()
    assert ours.alias_size_in_bytes == without.alias_size_in_bytes == size
    assert ours.temp_size_in_bytes - without.temp_size_in_bytes < 0.2 * size
