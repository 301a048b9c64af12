"""The feed-forward sublayer: gated (SwiGLU, GeGLU; Shazeer 2020, arXiv:2002.05202) or plain GELU."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.config import ModelConfig
from maxlm.model.parameter import matrix
from maxlm.parallel.sharding import einsum, use

ACTIVATIONS = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu, "gelu": jax.nn.gelu}


class MLP(nnx.Module):
    """x [B, T, D] -> [B, T, D]. Gate and up are one matrix, so that one product reads x once."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, hidden = config.hidden_dim, config.mlp_dim
        parts = 1 if config.activation == "gelu" else 2
        self.up = matrix(
            rngs, (width, parts, hidden), ("embed", None, "mlp"), config.init_std, contracted=(0,), produced=(2,)
        )
        depth_scaled = config.init_std / math.sqrt(2 * config.num_layers)  # GPT-2, section 2.3
        self.down = matrix(rngs, (hidden, width), ("mlp", "embed"), depth_scaled, contracted=(0,), produced=(1,))
        self.activation = config.activation
        self.dtype = dtype

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        h_BTPF = einsum("BTD,DPF->BTPF", x_BTD, use(self.up, self.dtype), ("batch", None, None, "mlp"))
        h_BTPF = checkpoint_name(h_BTPF, "mlp_up")
        activate = ACTIVATIONS[self.activation]
        parts = jnp.split(h_BTPF, h_BTPF.shape[2], axis=2)  # split's gradient is one concatenation, indexing's is not
        h_BTPF = activate(parts[0]) if len(parts) == 1 else activate(parts[0]) * parts[1]
        h_BTF = jnp.squeeze(h_BTPF, axis=2)
        return einsum("BTF,FD->BTD", h_BTF, use(self.down, self.dtype), ("batch", None, None))
