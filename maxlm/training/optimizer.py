"""Gradient transformations: clipping, AdamW, Muon."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from maxlm.config import OptimizerConfig, ScheduleConfig
from maxlm.training.schedule import make_schedule


def make_optimizer(config: OptimizerConfig, schedule: ScheduleConfig, num_steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then the named optimizer with decoupled weight decay on matrices."""
    adamw = _adamw(config, make_schedule(schedule, config.learning_rate, num_steps))
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if config.name == "adamw":
        return optax.chain(clip, adamw)
    raise AssertionError(config.name)


def _adamw(config: OptimizerConfig, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(
        _scale_by_adam(config),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate),
    )


def _scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1) with moments stored in the configured dtypes."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.dtype(config.mu_dtype))
    nu_dtype = jnp.dtype(config.nu_dtype)
    if nu_dtype == jnp.float32:
        return adam

    def cast(state: optax.ScaleByAdamState, dtype: jnp.dtype) -> optax.ScaleByAdamState:
        return state._replace(nu=jax.tree.map(lambda v: v.astype(dtype), state.nu))

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(grads, cast(state, jnp.float32), params)
        return updates, cast(state, nu_dtype)

    return optax.GradientTransformation(lambda params: cast(adam.init(params), nu_dtype), update)


def decayed(params: Any) -> Any:
    """True for weights that decay: matrices (the embedding included), not norm gains."""
    is_param = lambda leaf: isinstance(leaf, nnx.Param)  # noqa: E731
    return jax.tree.map(lambda p: jax.tree.map(lambda _: p.dims != ("norm",), p), params, is_leaf=is_param)
