"""What waits in the host's memory comes back as it was."""

import jax
import pytest

from maxlm.checkpoint import Checkpointer
from maxlm.parallel import memory
from maxlm.parallel.mesh import make_mesh
from maxlm.schema import ConfigError
from maxlm.training.digest import hex_digest, tree_digest
from maxlm.training.state import abstract_state, init_state, kernels_of
from tests.training.tiny import furthest, leaves, run_steps, tiny_config

SMALL = dict(num_layers=2, layer_pattern=["global"])
OFFLOADED = dict(compute=dict(offload_optimizer=True))


def settings(**sections):
    return tiny_config(**{"model": SMALL, "mesh": dict(fsdp=2), **sections})


@pytest.fixture(scope="module")
def kept_on_device():
    return run_steps(settings(), devices=2, steps=3)


@pytest.mark.parametrize("how", [
    OFFLOADED,
    dict(remat=dict(policy="names_offload")),
    pytest.param(dict(remat=dict(policy="full_offload"), compute=dict(layer_unroll="all")), marks=pytest.mark.slow),
    pytest.param(dict(optimizer=dict(name="muon"), **OFFLOADED), marks=pytest.mark.slow),
    pytest.param(dict(remat=dict(policy="full_offload"), mesh=dict(stage=2)), marks=pytest.mark.slow),
], ids=str)
def test_the_same_is_trained(how, kept_on_device):
    expected = kept_on_device
    if "optimizer" in how:
        expected = run_steps(settings(optimizer=how["optimizer"]), devices=2, steps=3)
    run = run_steps(settings(**how), devices=2, steps=3, start=expected.first)
    assert furthest(run.last, expected.last) < 1e-5


def test_the_state_is_where_it_is_said_to_be(tmp_path):
    """And a checkpoint, which restores onto a run that keeps it on the device, and the digest do not care."""
    config, plain = settings(**OFFLOADED), settings()
    mesh = make_mesh(config.mesh, jax.devices()[:2])
    with jax.set_mesh(mesh):
        state = init_state(config, mesh)
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
        assert kinds == {memory.HOST}
        assert all(leaf.sharding.memory_kind != memory.HOST for leaf in jax.tree.leaves(state.params))
        with Checkpointer(tmp_path, keep_last=1) as checkpointer:
            checkpointer.save(1, state, {})
            restored = [checkpointer.restore(1, abstract_state(c, mesh)) for c in (config, plain)]
        digests = {hex_digest(jax.jit(tree_digest)(each.opt_state)) for each in (state, *restored)}
    assert len(digests) == 1
    moments = [[leaf for leaf in jax.tree.leaves(each.opt_state) if leaf.ndim] for each in restored]
    assert [each[0].sharding.memory_kind == memory.HOST for each in moments] == [True, False]
    assert all((a == b).all() for each in restored for a, b in zip(leaves(each), leaves(state), strict=True))


@pytest.mark.parametrize("how", [OFFLOADED, dict(remat=dict(policy="full_offload"))], ids=str)
def test_a_device_that_cannot_is_refused_in_a_line(how, monkeypatch):
    monkeypatch.setattr(memory, "HOST", "memory of another kind")
    with pytest.raises(ConfigError, match="cannot read its host's memory: set .*'(none|full)'$"):
        kernels_of(settings(**how), jax.devices()[0])
