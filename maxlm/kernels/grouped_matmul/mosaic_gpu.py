"""The grouped product on Hopper GPUs, differentiable, of the kernels in hopper.py.

Each product is jitted by itself so that equal ones are one kernel: calls that are lowered one by one count as
different, and each is compiled.
"""

from __future__ import annotations

import functools

import jax

from maxlm.kernels.grouped_matmul.hopper import grouped_product, grouped_weights

product = functools.partial(jax.jit, static_argnames="b_last")(grouped_product)
weights_gradient = functools.partial(jax.jit, static_argnames="rows_last")(grouped_weights)


@jax.custom_vjp
def mosaic_gpu_matmul(x_RD: jax.Array, weights: tuple[jax.Array, ...], sizes_E: jax.Array) -> tuple[jax.Array, ...]:
    """`grouped_matmul` in bfloat16 or float16; D and F are multiples of 128. The gradient to x is one sum over all
    weights, which never exists by parts."""
    return tuple(product(((x_RD, w_EDF),), sizes_E, b_last=False) for w_EDF in weights)


def _backward(kept, gradients):
    x_RD, weights, sizes_E = kept
    dx_RD = product(tuple(zip(gradients, weights, strict=True)), sizes_E, b_last=True)
    return dx_RD, tuple(weights_gradient(x_RD, g_RF, sizes_E, rows_last=False) for g_RF in gradients), None


mosaic_gpu_matmul.defvjp(lambda x, weights, sizes: (mosaic_gpu_matmul(x, weights, sizes), (x, weights, sizes)),
                         _backward)
