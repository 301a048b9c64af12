"""Logical dims to mesh axes, in two layouts: how weights are stored, and how they are used.

Fully sharded data parallelism (ZeRO-3, arXiv:1910.02054) is the difference between the two: a weight is stored
split over `fsdp` (and `expert` and `context`) and used gathered. The gather is the `reshard` in `use`, made on the cast
weight, so that it moves bfloat16; its transpose scatters the gradient. Tensor parallelism (Megatron, arXiv:1909.08053)
is in both layouts, and so is expert parallelism for the experts' own weights. Pipeline parallelism (pipeline.py) splits
the dim that stacks the layers, and the batch wherever it is not in the pipeline.

Activations have two layouts as well. Rows are split over BATCH, and the tokens of a row over `context` (context.py).
Where `tensor` splits heads or hidden units, each of its devices has all of these tokens; between sublayers, on the
residual stream, where it would split nothing, it splits the tokens once more ('stream'; Korthikanti et al. 2022,
arXiv:2205.05198, section 4.2.2). A product gathers what comes from the stream (`whole_length`) and scatters what it
adds to it, so that norms, residuals and what is kept for the backward pass are split over all devices.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# The axes that split the rows of a batch; inside the pipeline, those behind `stage`.
BATCH = ("stage", "data", "fsdp", "expert")
TOKENS = (*BATCH, "context")  # the axes that split its tokens
STREAM = ("context", "tensor")  # the axes that split a row's tokens on the residual stream
# The axes that split what every token multiplies; an expert's weights have `expert` apart. `context` is one of them:
# its devices would otherwise hold equal copies, and a sum of gradients that is left scattered moves no more.
SHARD = ("fsdp", "expert", "context")
REPLICAS = ("stage", "data")  # the axes of TOKENS that do not
STORAGE = {"layers": "stage", "embed": SHARD, "expert_embed": ("fsdp", "context"), "experts": "expert",
           "vocab": "tensor", "kv_heads": "tensor", "heads": "tensor", "mlp": "tensor"}
COMPUTE = {**STORAGE, "embed": None, "expert_embed": None}
ACTIVATION = {"batch": BATCH, "length": "context", "stream": STREAM, "kv_heads": "tensor", "heads": "tensor",
              "mlp": "tensor"}

Dims = tuple[str | None, ...]


def spec(dims: Dims, rules: dict[str, Any], ndim: int | None = None) -> P:
    """The PartitionSpec of logical `dims`; a stacked array has leading dims beyond them, which stay whole. Axes that a
    `shard_map` around has made its own are left out."""
    leading = () if ndim is None else (None,) * (ndim - len(dims))
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return P(*leading, *(_without(manual, rules.get(dim)) for dim in dims))


def _without(manual: tuple[str, ...], axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    if isinstance(axes, tuple):
        return tuple(axis for axis in axes if axis not in manual)
    return None if axes in manual else axes


def split_over(rows: jax.Array) -> tuple[str, ...]:
    """Inside a `shard_map`: the axes of TOKENS over which rows of it are split; without `stage` inside the pipeline."""
    return tuple(axis for axis in TOKENS if axis in jax.typeof(rows).manual_axis_type.varying)


def free_axes() -> frozenset[str]:
    """The axes that a `shard_map` here can make its own; without `stage` inside the pipeline."""
    mesh = jax.sharding.get_abstract_mesh()
    return frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)


def has_mesh() -> bool:
    """Whether a mesh is installed (`jax.set_mesh`); without one every array lives whole on one device."""
    return not jax.sharding.get_abstract_mesh().empty


def use(param: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    """A weight cast to `dtype` and laid out for use: gathered over `fsdp`, still split over `tensor`."""
    value = param[...].astype(dtype)
    return jax.sharding.reshard(value, spec(param.dims, COMPUTE)) if has_mesh() else value


def use_apart(param: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    """`use` for an operand of a kernel: XLA for GPUs casts a stack of layers at once where it can (its slice-sinker),
    and copies each layer out of the result for the backward pass's kernels. A product with a 1 that it does not see
    through keeps the layers apart. Not in a pipeline, whose ticks would keep it (model/transformer.py)."""
    staged = has_mesh() and jax.sharding.get_abstract_mesh().shape["stage"] > 1
    if staged or param[...].dtype == dtype:
        return use(param, dtype)
    value = _cast_apart(param[...], dtype)
    return jax.sharding.reshard(value, spec(param.dims, COMPUTE)) if has_mesh() else value


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _cast_apart(value: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return (value * jax.lax.optimization_barrier(jnp.ones((), value.dtype))).astype(dtype)


_cast_apart.defvjp(lambda value, dtype: (_cast_apart(value, dtype), None),
                   lambda dtype, _, gradient: (gradient.astype(jnp.float32),))


def shard_count() -> int:
    """Inside a `shard_map`: over how many devices `embed` is split in storage."""
    return math.prod(jax.lax.axis_size(axis) for axis in SHARD)


def unstack(x: jax.Array) -> list[jax.Array]:
    """The slices of the leading dim. One split, whose gradient is one concatenation; indexing's is a sum of paddings,
    which XLA does not always see through."""
    return [jnp.squeeze(part, axis=0) for part in jnp.split(x, x.shape[0], axis=0)]


def constrain(x: jax.Array, dims: Dims) -> jax.Array:
    """An activation laid out by its logical `dims`."""
    return jax.sharding.reshard(x, spec(dims, ACTIVATION)) if has_mesh() else x


def whole_length(x: jax.Array) -> jax.Array:
    """x [B, T, ...] of the residual stream with all tokens of a `context` part on each device of `tensor`."""
    if not has_mesh():
        return x
    return jax.sharding.reshard(x, P(*spec(("batch", "length"), ACTIVATION), *jax.typeof(x).sharding.spec[2:]))


def gathered_tokens(x_BTD: jax.Array) -> jax.Array:
    """`whole_length` inside a `shard_map`, where x is this device's part of the stream."""
    if jax.lax.axis_size("tensor") == 1:  # the CPU backend copies even for a gather of one
        return x_BTD
    return jax.lax.all_gather(x_BTD, "tensor", axis=1, tiled=True)


def scattered_tokens(x_BTD: jax.Array) -> jax.Array:
    """Inside a `shard_map`: the sum over `tensor`, of which each device gets its part of the stream."""
    if jax.lax.axis_size("tensor") == 1:
        return x_BTD
    return jax.lax.psum_scatter(x_BTD, "tensor", scatter_dimension=1, tiled=True)


def stored(tree: Any, mesh: Mesh) -> Any:
    """The storage NamedSharding of every array in `tree` (a module, its gradients, an optimizer state): from the
    logical dims of each nnx.Param, replicated for arrays that are not in one. Same structure as `tree`."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, nnx.Param):
            return jax.tree.map(lambda a: NamedSharding(mesh, _stored(leaf, a.ndim, mesh)), leaf)
        return NamedSharding(mesh, P())

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


def _stored(param: nnx.Param, ndim: int, mesh: Mesh) -> P:
    dims = param.dims
    if ndim > len(dims) and param.get_metadata("staged", False) and mesh.shape[STORAGE["layers"]] > 1:
        dims = ("layers", *dims)
    return spec(dims, STORAGE, ndim)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the batch axes and their tokens over `context`: [B, T]."""
    return NamedSharding(mesh, P(BATCH, "context"))
