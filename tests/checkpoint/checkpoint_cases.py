"""A small training-like state, its placement on meshes, and comparison to the last bit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maxlm.checkpoint import named_leaves


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.q_proj = nnx.Param(jax.random.normal(rngs.params(), (16, 8)))
        self.scale = nnx.Param(jax.random.normal(rngs.params(), (16,)).astype(jnp.bfloat16))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers_0 = Layer(rngs)
        self.layers_1 = Layer(rngs)


optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mu_dtype=jnp.bfloat16))


def make_state(seed=0):
    params = Model(nnx.Rngs(seed))
    state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(seed)}
    return jax.tree.map(lambda x: x + jnp.asarray(0.1, x.dtype), state)


def mesh(**axes):
    devices = jax.devices()[: math.prod(axes.values())]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Explicit,) * len(axes),
                         devices=devices)


def sharding(mesh, leaf):
    """Matrices: rows over the mesh's first axis, columns over its last; everything else replicated."""
    names = mesh.axis_names
    spec = PartitionSpec(names[0], names[-1] if len(names) > 1 else None) if leaf.ndim == 2 else PartitionSpec()
    return NamedSharding(mesh, spec)


def place(mesh, tree):
    return jax.tree.map(lambda x: jax.device_put(x, sharding(mesh, x)), tree)


def abstract(mesh, tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(mesh, x)), tree)


def raw(tree):
    """Name -> (dtype, shape, bytes): equal exactly where every bit is."""
    return {n: (str(x.dtype), x.shape, np.asarray(x).tobytes()) for n, x in named_leaves(tree).items()}
