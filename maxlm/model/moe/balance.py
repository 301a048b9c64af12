"""Equal load without a loss: the selection bias of each router moves a fixed step against its experts' load.

DeepSeek-V3 (arXiv:2412.19437, section 2.1.2; Wang et al., arXiv:2408.15664, algorithm 1). No gradient is involved.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.model.transformer import Transformer


def balanced(model: Transformer, chosen_LE: jax.Array, good: jax.Array) -> Transformer:
    """The model with its selection biases moved by `bias_rate`, up for experts below the mean load and down above it;
    unchanged where it has none or `good` is False. chosen_LE: of the sparse layers, as `Load` has it: counts, so that
    an expert with just the mean stays where it is however the batch was cut up."""
    rate, places = model.config.moe.bias_rate, len(model.config.layer_pattern)
    if not rate:
        return model
    move_LE = jnp.where(good, rate * jnp.sign(jnp.mean(chosen_LE, axis=1, keepdims=True) - chosen_LE), 0.0)

    def moved(path, leaf):
        if not isinstance(leaf, nnx.Param) or "selection_bias" not in jax.tree_util.keystr(path):
            return leaf
        place = int(path[0].name.removeprefix("layers_"))
        return leaf.replace(leaf[...] + move_LE[place::places])

    return jax.tree_util.tree_map_with_path(moved, model, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
