"""What the layers keep for their backward pass, counted in the trace, by remat policy."""

import pytest

from maxlm.planning import analytic
from maxlm.planning.work import share_of
from tests.training.tiny import LENGTH, ROWS, loops_of_gradient, tiny_config

LAYERS = 4
SIZES = dict(num_layers=LAYERS, layer_pattern=["global"], hidden_dim=32, num_heads=4, num_kv_heads=2, head_dim=16,
             mlp_dim=80)


def kept_numbers(config):
    """Numbers a token that the loop over layers keeps of one layer."""
    loops = loops_of_gradient(config, 1, LAYERS)
    kept = [sum(a.size for a in given if a.shape[:2] == (LAYERS, ROWS)) for given in loops]
    return max(kept) / LAYERS / ROWS / LENGTH


@pytest.mark.parametrize("policy", ["full", "names", "dots"])
def test_a_layer_keeps_what_the_plan_counts(policy):
    config = tiny_config(model=SIZES, remat=dict(policy=policy), compute=dict(attention="reference"))
    kept = kept_numbers(config)
    share = share_of(config, dict.fromkeys(("data", "stage", "fsdp", "expert", "context", "tensor"), 1))
    counted = {other: analytic._kept_numbers(tiny_config(model=SIZES, remat=dict(policy=other)), False, share)
               for other in ("full", "names", "dots")}
    assert kept == counted[policy]
    assert counted["full"] < counted["names"] < counted["dots"], "equal ones would say nothing"
