"""A tiny decoder with weights far from their small initial values, for the tests of this folder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config import ModelConfig
from maxlm.model import Transformer, make_transformer
from maxlm.schema import from_dict

DEFAULTS = dict(num_layers=2, hidden_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24, vocab_size=48,
                init_std=0.3)


def tiny_model(seed: int = 0, **fields) -> Transformer:
    """Norm gains are random too, so that a norm left out or applied twice is seen."""
    config = from_dict(ModelConfig, DEFAULTS | {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()})
    model = make_transformer(config, jax.random.key(seed))
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a if (np.asarray(a) != 1).any() else jnp.asarray(
        draw.uniform(0.5, 1.5, a.shape), jnp.float32), model)


def tokens_of(rows: int, length: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(100 + seed), (rows, length), 0, DEFAULTS["vocab_size"])


@jax.jit
def packed(model: Transformer, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> np.ndarray:
    return model(tokens, positions, segments)


def hidden(model: Transformer, tokens_BT: jax.Array, offset: int = 0) -> np.ndarray:
    """Final hidden states of rows that hold one document each, at positions offset.. ."""
    positions = jnp.broadcast_to(offset + jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return np.asarray(packed(model, tokens_BT, positions, jnp.ones_like(tokens_BT)))


def furthest(a, b) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())
