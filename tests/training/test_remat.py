"""What the layers keep for their backward pass, counted in the trace, by remat policy."""

import jax
import pytest

from maxlm.parallel.mesh import make_mesh
from maxlm.planning import analytic
from maxlm.planning.work import share_of
from maxlm.training.loss import summed_loss
from maxlm.training.state import abstract_state
from maxlm.training.step import abstract_batch
from tests.training.tiny import LENGTH, ROWS, tiny_config

LAYERS = 4
SIZES = dict(num_layers=LAYERS, layer_pattern=["global"], hidden_dim=32, num_heads=4, num_kv_heads=2, head_dim=16,
             mlp_dim=80)


def kept_numbers(config):
    """Numbers a token that the loop over layers keeps of one layer."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])

    def loops(jaxpr):
        for equation in jaxpr.eqns:
            inner = [getattr(p, "jaxpr", p) for p in equation.params.values()]
            yield from (found for p in inner if hasattr(p, "eqns") for found in loops(p))
            if equation.primitive.name == "scan" and equation.params["length"] == LAYERS:
                yield sum(v.aval.size for v in equation.outvars if v.aval.shape[:2] == (LAYERS, ROWS))

    def loss(params, batch):
        return summed_loss(params, batch, z_loss=0.0, chunks=1)[0].loss

    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss)).trace(abstract_state(config, mesh).params, abstract_batch(config, mesh))
    return max(loops(traced.jaxpr.jaxpr)) / LAYERS / ROWS / LENGTH


@pytest.mark.parametrize("policy", ["full", "names", "dots"])
def test_a_layer_keeps_what_the_plan_counts(policy):
    config = tiny_config(model=SIZES, remat=dict(policy=policy), compute=dict(attention="reference"))
    kept = kept_numbers(config)
    share = share_of(config, dict.fromkeys(("data", "stage", "fsdp", "expert", "context", "tensor"), 1))
    counted = {other: analytic._kept_numbers(tiny_config(model=SIZES, remat=dict(policy=other)), False, share)
               for other in ("full", "names", "dots")}
    assert kept == counted[policy]
    assert counted["full"] < counted["names"] < counted["dots"], "equal ones would say nothing"
