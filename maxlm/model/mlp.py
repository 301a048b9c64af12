"""The feed-forward sublayer: gated (SwiGLU, GeGLU; Shazeer 2020, arXiv:2002.05202) or plain GELU."""

from __future__ import annotations

import functools

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.config import ModelConfig
from maxlm.model.parameter import matrix
from maxlm.model.parametrization import multipliers
from maxlm.numerics import Numerics

ACTIVATIONS = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu, "gelu": jax.nn.gelu}


class MLP(nnx.Module):
    """x [B, T, D] -> [B, T, D], through `hidden` units."""

    def __init__(self, config: ModelConfig, hidden: int, rngs: nnx.Rngs):
        width, scale = config.hidden_dim, multipliers(config)
        # Gate and up are apart: side by side in one matrix, their gradients would be put together from halves that
        # each read everything (1.3 against 0.7 ms a layer of llama3_2_1b on an H200).
        into = functools.partial(matrix, shape=(width, hidden), dims=("embed", "mlp"), contracted=(0,), produced=(1,),
                                 std=config.init_std / scale.matrix_init)
        self.gate = None if config.activation == "gelu" else into(rngs)
        self.up = into(rngs)
        self.down = matrix(rngs, (hidden, width), ("mlp", "embed"), config.init_std / scale.residual_init,
                           contracted=(0,), produced=(1,))
        self.activation = config.activation

    def __call__(self, x_BTD: jax.Array, numerics: Numerics) -> jax.Array:
        def into(weight: nnx.Param) -> jax.Array:
            return checkpoint_name(product("BTD,DF->BTF", x_BTD, weight, ("batch", "length", "mlp")), "mlp_up")

        activate, product = ACTIVATIONS[self.activation], numerics.mlp.einsum
        up_BTF = into(self.up)
        h_BTF = activate(up_BTF) if self.gate is None else gated(activate, into(self.gate), up_BTF)
        return checkpoint_name(product("BTF,FD->BTD", h_BTF, self.down, ("batch", "stream", None)), "product")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(activate, gate: jax.Array, up: jax.Array) -> jax.Array:
    """activate(gate) * up. The backward pass keeps gate and up alone and computes the activation again."""
    return activate(gate) * up


def _gated_forward(activate, gate, up):
    return activate(gate) * up, (gate, up)


def _gated_backward(activate, kept, dh):
    # The barrier keeps the compiler from storing the forward pass's activation instead of computing it again.
    gate, up, dh = jax.lax.optimization_barrier((*kept, dh))
    activated, pull = jax.vjp(activate, gate)
    return *pull(dh * up), dh * activated


gated.defvjp(_gated_forward, _gated_backward)
