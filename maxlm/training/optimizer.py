"""Gradient transformations: clipping, AdamW, Muon."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import optax
import optax.contrib
from flax import nnx

from maxlm.config import OptimizerConfig, ScheduleConfig
from maxlm.model.parametrization import Multipliers
from maxlm.parallel.sharding import has_mesh
from maxlm.training.moments import Rounding, stored_in
from maxlm.training.schedule import make_schedule

UNSCALED = Multipliers()


def make_optimizer(config: OptimizerConfig, schedule: ScheduleConfig, num_steps: int, *,
                   peak: jax.Array | None = None, scale: Multipliers = UNSCALED,
                   seed: jax.Array | int = 0) -> optax.GradientTransformation:
    """Global-norm clipping, then the named optimizer with decoupled weight decay on matrices.

    peak: in place of the config's learning rate, such as a traced value. scale: the model's parametrization (AdamW).
    seed: of the stochastic rounding of moments.
    """
    learning_rate = make_schedule(schedule, config.learning_rate if peak is None else peak, num_steps)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adam = _scale_by_adam(config, seed)
    if (scale.matrix_rate, scale.layer_eps, scale.table_eps) != (1.0, 1.0, 1.0):
        adam = _parametrized(adam, scale)
    adamw = _finish(adam, config, learning_rate)
    if config.name == "adamw":
        return optax.chain(clip, adamw)
    muon = _finish(_scale_by_muon(config, seed), config, learning_rate)
    return optax.chain(clip, optax.partition({"adamw": adamw, "muon": muon}, _labels))


def updates_made(opt_state: Any) -> jax.Array:
    """How many updates an optimizer's state has made, int32: what its learning rate is a function of. Skipped updates
    are not among them."""
    is_schedule = lambda state: isinstance(state, optax.ScaleByScheduleState)  # noqa: E731
    return next(filter(is_schedule, jax.tree.leaves(opt_state, is_leaf=is_schedule))).count


def _finish(direction: optax.GradientTransformation, config: OptimizerConfig,
            learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """A direction, decoupled weight decay, and the learning rate on both."""
    return optax.chain(
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate),
    )


def _scale_by_adam(config: OptimizerConfig, seed: jax.Array | int) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1), in float32; moments stored as configured (moments.py)."""
    return stored_in(optax.scale_by_adam(config.b1, config.b2, config.eps), _roundings(config), seed)


def _roundings(config: OptimizerConfig) -> dict[str, Rounding]:
    return {name: Rounding(dtype, name == "mu", config.stochastic_rounding)
            for name, dtype in (("mu", config.mu_dtype), ("nu", config.nu_dtype))}


def _parametrized(adam: optax.GradientTransformation, scale: Multipliers) -> optax.GradientTransformation:
    """Adam whose eps and rate are those of `scale`. Gradients over s before Adam are eps times s inside it; the rate
    multiplies Adam's direction and not the decay that is added to it after, whose product with the rate stays."""

    def divided(p: nnx.Param, g: jax.Array) -> jax.Array:
        return g / (scale.layer_eps if g.ndim > len(p.dims) else scale.table_eps)  # layers are stacked

    def slowed(p: nnx.Param, u: jax.Array) -> jax.Array:
        return u * scale.matrix_rate if p.contracted else u

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(_of_params(divided, grads), state, params)
        return _of_params(slowed, updates), state

    return optax.GradientTransformation(adam.init, update)


def _scale_by_muon(config: OptimizerConfig, seed: jax.Array | int) -> optax.GradientTransformation:
    """Orthogonalised Nesterov momentum (Optax's Muon). The matrix products of its Newton-Schulz iteration run over
    whole matrices, so under a mesh XLA chooses their layout and the result comes back in the storage layout."""
    muon = optax.contrib.scale_by_muon(beta=config.muon_momentum, weight_dimension_numbers=_matrices)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if not has_mesh():
            updates, state = muon.update(grads, state, params)
        else:
            layouts = jax.tree.map(lambda a: jax.typeof(a).sharding, (grads, state))
            updates, state = jax.sharding.auto_axes(muon.update, out_sharding=layouts)(grads, state, params)
        return jax.tree.map(_like_adam, updates, _matrices(updates)), state

    whole = optax.GradientTransformation(muon.init, update)
    return stored_in(whole, {"mu": _roundings(config)["mu"]}, seed)


def _like_adam(update: jax.Array, matrix: optax.contrib.MuonDimensionNumbers) -> jax.Array:
    """An orthogonal [m, n] update has root mean square 1/sqrt(max(m, n)); AdamW's is about 0.2."""
    size = lambda axes: math.prod(update.shape[axis] for axis in axes)  # noqa: E731
    return 0.2 * math.sqrt(max(size(matrix.reduction_axis), size(matrix.output_axis))) * update


def _is_param(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Param)


def _labels(params: Any) -> Any:
    """'muon' for the layers' matrices, 'adamw' for embeddings, head and norms. Same structure as `params`."""
    return _of_params(lambda p, _: "muon" if p.contracted else "adamw", params)


def _matrices(params: Any) -> Any:
    """How each of the layers' weights is a (batch of) matrix: its declaration, counted from the last dim, because
    stacked layers lead. Same structure as `params`."""

    def view(p: nnx.Param, a: jax.Array) -> optax.contrib.MuonDimensionNumbers:
        leading = a.ndim - len(p.dims)
        place = lambda dims: tuple(leading + dim for dim in dims)  # noqa: E731
        return optax.contrib.MuonDimensionNumbers(place(p.contracted), place(p.produced))

    return _of_params(view, params)


def _of_params(function: Callable[[nnx.Param, jax.Array], Any], params: Any) -> Any:
    """`function(parameter, its array)` for every parameter, in the structure of `params`."""
    return jax.tree.map(lambda p: jax.tree.map(lambda a: function(p, a), p), params, is_leaf=_is_param)


def decayed(params: Any) -> Any:
    """True for weights that decay: matrices (the embedding included), not norm gains."""
    return _of_params(lambda p, _: p.dims != ("norm",), params)
