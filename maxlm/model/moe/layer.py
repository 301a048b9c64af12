"""The sparse feed-forward sublayer: a router, and experts of which each token takes a few.

What is local to a device happens in one `shard_map`. The router is whole everywhere; experts are split over the mesh
axis `expert` (exchange.py brings tokens to them) and their hidden units over `tensor`.

Dims: B batch, T length, D width, N = B*T tokens of this device, E experts, R rows, F hidden units of an expert.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from maxlm.config import ModelConfig
from maxlm.kernels.grouped_matmul import (
    GROUP_MULTIPLE,
    collect,
    collected_product,
    grouped_swiglu,
    has_swiglu,
    spread,
    spread_products,
)
from maxlm.model.mlp import ACTIVATIONS, MLP
from maxlm.model.moe.exchange import EXCHANGES, Room, stay
from maxlm.model.moe.load import Load, measure_load
from maxlm.model.moe.plan import by_row
from maxlm.model.moe.router import choose, router_logits
from maxlm.model.parameter import matrix
from maxlm.numerics import Fp8, Numerics
from maxlm.parallel.context import balanced_order
from maxlm.parallel.sharding import (
    ACTIVATION,
    COMPUTE,
    STORAGE,
    free_axes,
    has_mesh,
    scattered_tokens,
    spec,
    split_over,
    use,
    use_apart,
    whole_length,
)

MATRICES = ("gate", "up", "down")  # of each expert
INTO, OUT = ("experts", "expert_embed", "mlp"), ("experts", "mlp", "expert_embed")  # their dims


class MoE(nnx.Module):
    """x [B, T, D] -> ([B, T, D], Load). kernel: of `choose_grouped_matmul`; exchange: of EXCHANGES."""

    def __init__(self, config: ModelConfig, kernel: str, exchange: str, rngs: nnx.Rngs):
        moe, E, D, F = config.moe, config.num_experts, config.hidden_dim, config.expert_dim
        self.router = matrix(rngs, (D, E), ("embed", None), config.init_std)
        self.selection_bias = nnx.Param(jnp.zeros(E), dims=("norm",), contracted=()) if moe.bias_rate else None
        into = functools.partial(matrix, rngs, (E, D, F), INTO, config.init_std, contracted=(1,), produced=(2,))
        self.gate, self.up = into(), into()
        self.down = matrix(rngs, (E, F, D), OUT,
                           config.init_std / math.sqrt(2 * config.num_layers), contracted=(1,), produced=(2,))
        bias = lambda dims, *shape: (  # noqa: E731
            nnx.Param(jnp.zeros(shape), dims=dims, contracted=()) if moe.expert_bias else None
        )
        self.gate_bias, self.up_bias = bias(("experts", "mlp"), E, F), bias(("experts", "mlp"), E, F)
        self.down_bias = bias(("experts", "expert_embed"), E, D)
        self.shared = MLP(config, moe.shared_experts * F, rngs) if moe.shared_experts else None
        self.config, self.kernel, self.exchange = config, kernel, exchange

    def __call__(self, x_BTD: jax.Array, segment_ids_BT: jax.Array, numerics: Numerics,
                 key: jax.Array | None) -> tuple[jax.Array, Load]:
        """key: for the jitter; None (evaluation) leaves it out."""
        weights, layouts, stored = self._weights(numerics)
        whole_BTD = whole_length(x_BTD)
        inputs = (whole_BTD, self._jittered(whole_BTD, key), segment_ids_BT)
        local = functools.partial(_local, config=self.config, numerics=numerics, kernel=self.kernel,
                                  exchange=self.exchange)
        if has_mesh():
            rows, out = (spec(("batch", length, None), ACTIVATION) for length in ("length", "stream"))
            out_BTD, load = jax.shard_map(
                lambda inputs, weights: local(
                    *inputs, _varying(weights, layouts, stored, split_over(inputs[0])), sharded=True),
                in_specs=((rows, rows, P(*rows[:2])), layouts), out_specs=(out, P()), axis_names=free_axes(),
            )(inputs, weights)
        else:
            out_BTD, load = local(*inputs, weights, sharded=False)
        # Nothing between the exchange and this depends on the other: a scheduler may run them side by side.
        return out_BTD if self.shared is None else out_BTD + self.shared(x_BTD, numerics), load

    def _weights(self, numerics: Numerics) -> tuple[dict[str, jax.Array], dict[str, P], tuple[str, ...]]:
        """(weights, their layouts, names of those laid out as stored): 8-bit products quantise before they gather."""
        stored = MATRICES if isinstance(numerics.experts, Fp8) else ()
        weights, layouts = {}, {}
        for name in ("router", "selection_bias", *MATRICES, "gate_bias", "up_bias", "down_bias"):
            weight = getattr(self, name)
            if weight is not None:
                dtype = jnp.float32 if name in ("router", "selection_bias") else numerics.dtype
                cast = use_apart if name in MATRICES else use
                weights[name] = weight[...] if name in stored else cast(weight, dtype)
                layouts[name] = spec(weight.dims, STORAGE if name in stored else COMPUTE)
        return weights, layouts, stored

    def _jittered(self, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
        jitter = self.config.moe.jitter
        if not jitter or key is None:
            return x_BTD
        layout = {"out_sharding": spec(("batch", "length", None), ACTIVATION)} if has_mesh() else {}
        draw_BTD = jax.random.uniform(key, x_BTD.shape, jnp.float32, 1 - jitter, 1 + jitter, **layout)
        return x_BTD.astype(jnp.float32) * balanced_order(draw_BTD)  # each token's draw is the same on any mesh


def _local(x_BTD, router_BTD, segment_ids_BT, weights, *, config, numerics, kernel, exchange, sharded):
    """One device's tokens (router_BTD: as the router sees them), and the load of all."""
    (B, T, D), moe = x_BTD.shape, config.moe
    x_ND, real_N = x_BTD.reshape(B * T, D), segment_ids_BT.reshape(-1) > 0
    logits_NE = router_logits(router_BTD.reshape(B * T, D), weights["router"])
    choice = choose(logits_NE, weights.get("selection_bias"), config)
    routed = (x_ND, choice.expert_NK, choice.weight_NK)
    if sharded:  # from here on each part of `tensor` does something else with a token
        routed = tuple(jax.lax.pcast(a, "tensor", to="varying") for a in routed)
    serve = functools.partial(_experts, weights=weights, config=config, numerics=numerics.experts, kernel=kernel,
                              sharded=sharded)
    apart = sharded and jax.lax.axis_size("expert") > 1
    out_ND, lost = (EXCHANGES[exchange] if apart else stay)(
        *routed, serve, Room(moe.capacity_factor, moe.buffer_factor, GROUP_MULTIPLE[kernel]), config.num_experts,
        numerics.fp8_exchange)
    out_BTD = out_ND.reshape(B, T, D)
    if sharded:
        out_BTD = scattered_tokens(out_BTD)
        lost = jax.lax.pmean(lost, "tensor")
    return checkpoint_name(out_BTD, "product"), measure_load(choice, logits_NE, real_N, lost, T, config, sharded)


def _varying(weights: dict[str, jax.Array], layouts: dict[str, P], stored: tuple[str, ...],
             batch: tuple[str, ...]) -> dict[str, jax.Array]:
    """The weights as values that may differ on every device that sees other tokens, or (those of the experts) other
    hidden units, so that their gradients are summed over them here; but `stored` ones, whose products do that."""

    def one(name):
        if name in stored:
            return weights[name]
        split = batch if name in ("router", "selection_bias") else (*batch, "tensor")
        return jax.lax.pcast(weights[name], tuple(a for a in split if a not in layouts[name]), to="varying")

    return {name: one(name) for name in weights}


def _experts(x_ND, weight_NK, plan, *, weights, config, numerics, kernel, sharded):
    """Each token through its experts, times their weights, summed: [N, D]. Where `tensor` splits the experts, this
    device's part."""
    layout = lambda dims: dims if sharded else None  # noqa: E731
    weight_R, bias = by_row(weight_NK, plan), _expert_bias(plan, weights, x_ND.dtype)
    if config.activation == "swiglu" and "gate_bias" not in weights and has_swiglu(numerics, kernel):
        out_RD = grouped_swiglu(spread(x_ND, plan), tuple(weights[name] for name in MATRICES), weight_R, plan.sizes_E,
                                kernel)
        return collect(out_RD, plan)
    into = spread_products(numerics, kernel, layout(INTO), x_ND, plan, (weights["gate"], weights["up"]))
    gate_RF, up_RF = (checkpoint_name(out_RF + bias(name), "mlp_up") for out_RF, name in zip(
        into, ("gate_bias", "up_bias"), strict=True))
    h_RF = _weighted(ACTIVATIONS[config.activation], gate_RF, up_RF, weight_R)
    out_ND = collected_product(numerics, kernel, layout(OUT), h_RF, plan, weights["down"])
    if "down_bias" not in weights:
        return out_ND
    whole = not sharded or jax.lax.axis_index("tensor") == 0  # the parts are summed over `tensor`
    return out_ND + collect(jnp.where(whole, bias("down_bias") * weight_R[:, None].astype(x_ND.dtype), 0), plan)


def _expert_bias(plan, weights, dtype):
    """A function name -> [R, F]: each row's bias; 0 where the experts have none."""
    if "gate_bias" not in weights:
        return lambda name: jnp.zeros((1, 1), dtype)
    expert_R = jnp.sum(jnp.arange(plan.choice_R.size, dtype=jnp.int32)[:, None] >= jnp.cumsum(plan.sizes_E)[None],
                       axis=1)
    of_E = (expert_R[:, None] == jnp.arange(plan.sizes_E.size)[None]).astype(dtype)
    return lambda name: of_E @ weights[name]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(activate, gate_RF, up_RF, weight_R):
    """activate(gate) * up * weight: the weight before the last product is the weight after it, on half the numbers.
    The backward pass keeps the three and computes the rest again. Without model/mlp.py's barrier: what `_served` (in
    exchange.py) makes again, this among it, has one, and so one pass over gate and up makes result and gradients
    (0.83 instead of 1.08 ms for OLMoE's rows on an H200)."""
    return (activate(gate_RF) * up_RF * weight_R[:, None].astype(up_RF.dtype)).astype(up_RF.dtype)


def _weighted_forward(activate, gate_RF, up_RF, weight_R):
    return _weighted(activate, gate_RF, up_RF, weight_R), (gate_RF, up_RF, weight_R)


def _weighted_backward(activate, kept, dh_RF):
    gate_RF, up_RF, weight_R = kept
    activated_RF, pull = jax.vjp(activate, gate_RF)
    weight_R1 = weight_R[:, None].astype(dh_RF.dtype)
    dweight_R = jnp.sum((activated_RF * up_RF).astype(jnp.float32) * dh_RF.astype(jnp.float32), axis=1)
    return *pull(dh_RF * weight_R1 * up_RF), dh_RF * weight_R1 * activated_RF, dweight_R.astype(weight_R.dtype)


_weighted.defvjp(_weighted_forward, _weighted_backward)
