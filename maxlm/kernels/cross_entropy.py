"""The output head and its cross-entropy in one operation that never holds the logits of a whole batch.

The sequence is cut into chunks. Each chunk's logits are made once, and its loss and gradients are taken from them at
once, so the backward pass has nothing left to do but scale (the idea of Liger's fused linear cross-entropy,
arXiv:2410.10989, section 3.3, with the weight gradient accumulated in float32). Everything local to a device is
inside one `shard_map`: the head is gathered over `fsdp` in the compute dtype, its vocabulary stays split over
`tensor` (along which the residual stream is gathered), and its gradient is summed over the mesh once, straight into the
storage layout.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from maxlm.parallel.sharding import (
    BATCH,
    REPLICAS,
    SHARD,
    STORAGE,
    STREAM,
    TOKENS,
    gathered_tokens,
    has_mesh,
    scattered_tokens,
    shard_count,
)

MAX_LOGITS_BYTES = 2**31  # float32 logits of one chunk on one device


class CrossEntropy(NamedTuple):
    """Sums over every position that has a target, float32 scalars: `loss` (differentiable, z-loss included) and
    `nll`, its cross-entropy part in nats (not differentiable)."""

    loss: jax.Array
    nll: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def linear_cross_entropy(x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, z_loss: float = 0.0,
                         softcap: float = 0.0, chunks: int | str = "auto") -> CrossEntropy:
    """Cross-entropy of softmax(x w^T) against `targets_BT` (-1: no loss), plus z_loss * logsumexp^2.

    x_BTD sets the compute dtype; w_VD is the float32 weight in its storage layout. `softcap` c turns logits z into
    c tanh(z / c). `chunks` pieces of the T that a device has; 'auto' takes the fewest that keep a chunk's logits under
    2 GiB a device.
    """
    return _sharded(x_BTD, w_VD, targets_BT, z_loss, softcap, chunks, gradients=False)


def _forward(x, w, targets, z_loss, softcap, chunks):
    (loss, nll), dx, dw = _sharded(x, w, targets, z_loss, softcap, chunks, gradients=True)
    return CrossEntropy(loss, nll), (dx, dw)


def _backward(z_loss, softcap, chunks, gradients, cotangent):
    dx, dw = gradients
    return cotangent.loss.astype(dx.dtype) * dx, cotangent.loss * dw, None


linear_cross_entropy.defvjp(_forward, _backward)


def _sharded(x, w, targets, z_loss, softcap, chunks, *, gradients: bool):
    local = functools.partial(_local, z_loss=z_loss, softcap=softcap, chunks=chunks, gradients=gradients)
    if not has_mesh():
        return local(x, w, targets, sharded=False)
    batch, weight = P(BATCH, STREAM, None), P(STORAGE["vocab"], STORAGE["embed"])
    sums = CrossEntropy(P(), P())
    return jax.shard_map(
        functools.partial(local, sharded=True),
        in_specs=(batch, weight, P(BATCH, "context")),
        out_specs=(sums, batch, weight) if gradients else sums,
    )(x, w, targets)


def _local(x_BTD, w_VD, targets_BT, *, z_loss, softcap, chunks, gradients, sharded):
    """One device's rows: sums over the mesh, this device's rows of dx, its shard of dw."""
    x_BTD = gathered_tokens(x_BTD) if sharded else x_BTD
    batch, length, width = x_BTD.shape
    w_VD = w_VD.astype(x_BTD.dtype)
    split = sharded and shard_count() > 1
    if split:
        w_VD = jax.lax.all_gather(w_VD, SHARD, axis=1, tiled=True)
    first = jax.lax.axis_index("tensor") * w_VD.shape[0] if sharded else 0
    count = num_chunks(batch, length, w_VD.shape[0]) if chunks == "auto" else chunks
    assert length % count == 0, f"{count} chunks do not divide sequence length {length}"
    chunk = functools.partial(
        _chunk, w_VD=w_VD, first=first, z_loss=z_loss, softcap=softcap, gradients=gradients,
        over_vocab="tensor" if sharded else None,
    )
    if count == 1:
        sums, dx_BTD, dw_VD = chunk(x_BTD, targets_BT)
    else:
        pieces = lambda a: jnp.moveaxis(a.reshape(batch, count, length // count, *a.shape[2:]), 1, 0)  # noqa: E731

        def body(carry, piece):
            sums, dx, dw = chunk(*piece)
            return jax.tree.map(jnp.add, carry, (sums, dw)), dx

        zero, dw_VD = jnp.zeros((), jnp.float32), jnp.zeros(w_VD.shape, jnp.float32) if gradients else None
        if sharded:  # shard_map's types ask over which axes a sum will differ from device to device
            zero, dw_VD = jax.lax.pcast(zero, TOKENS, to="varying"), _differs(dw_VD)
        start = (CrossEntropy(zero, zero), dw_VD)
        (sums, dw_VD), dx_CBTD = jax.lax.scan(body, start, (pieces(x_BTD), pieces(targets_BT)))
        dx_BTD = jnp.moveaxis(dx_CBTD, 0, 1).reshape(x_BTD.shape) if gradients else None
    if sharded:
        sums = jax.lax.psum(sums, TOKENS)
    if not gradients:
        return sums
    if sharded:
        dx_BTD = scattered_tokens(dx_BTD)
        if split:
            dw_VD = jax.lax.psum_scatter(dw_VD, SHARD, scatter_dimension=1, tiled=True)
        dw_VD = jax.lax.psum(dw_VD, REPLICAS if split else TOKENS)
    return sums, dx_BTD, dw_VD


def _chunk(x_BTD, targets_BT, *, w_VD, first, z_loss, softcap, gradients, over_vocab):
    """Loss sums, dx (compute dtype) and dw (float32) of one chunk of the sequence."""
    scores = jax.lax.dot_general(x_BTD, w_VD, (((2,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    logits = softcap * jnp.tanh(scores / softcap) if softcap else scores
    peak_BT, mass_BT, gold_BT = jax.lax.platform_dependent(
        logits, targets_BT - first, cuda=functools.partial(one_pass, over=over_vocab),
        default=functools.partial(two_passes, over=over_vocab))
    lse_BT = peak_BT + jnp.log(mass_BT)
    exp_BTV, hit_BTV = jnp.exp(logits - peak_BT[..., None]), _hits(logits, targets_BT - first)
    counts_BT = targets_BT >= 0
    nll = jnp.sum(jnp.where(counts_BT, lse_BT - gold_BT, 0.0))
    loss = nll + z_loss * jnp.sum(jnp.where(counts_BT, jnp.square(lse_BT), 0.0)) if z_loss else nll
    if not gradients:
        return CrossEntropy(loss, nll), None, None
    pull_BT = jnp.where(counts_BT, (1.0 + 2.0 * z_loss * lse_BT) / mass_BT, 0.0)
    dlogits = exp_BTV * pull_BT[..., None] - jnp.where(hit_BTV, 1.0, 0.0)
    dscores = dlogits * (1.0 - jnp.square(logits / softcap)) if softcap else dlogits
    dscores = dscores.astype(x_BTD.dtype)
    dx_BTD = jax.lax.dot_general(dscores, w_VD, (((2,), (0,)), ((), ())), preferred_element_type=x_BTD.dtype)
    # x first: where a backend must transpose an operand, x is the small one.
    # Rows are flattened first: the CPU backend cannot transpose a bfloat16 product that contracts two dims.
    x_ND, dscores_NV = x_BTD.reshape(-1, x_BTD.shape[-1]), dscores.reshape(-1, w_VD.shape[0])
    dw_DV = jax.lax.dot_general(x_ND, dscores_NV, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    # Row-major by order: left alone, XLA's CPU compiler keeps the transpose and copies the weight and its moments.
    # It would put the transpose into the product, too, which then takes twice as long.
    dw_DV = jax.lax.platform_dependent(dw_DV, cpu=jax.lax.optimization_barrier, default=lambda dw_DV: dw_DV)
    dw_VD = with_layout_constraint(dw_DV.T, Layout(major_to_minor=(0, 1)))
    return CrossEntropy(loss, nll), dx_BTD, dw_VD


def two_passes(logits_BTV: jax.Array, targets_BT: jax.Array, over: str | None):
    """[B, T] each: the largest logit, the sum of exponentials relative to it, and the target's logit, 0 where there is
    none. over: the mesh axis along which more of the vocabulary lies; targets count from this part's first."""
    total = (lambda a: jax.lax.psum(a, over)) if over else (lambda a: a)
    peak_BT = jnp.max(logits_BTV, axis=-1)
    peak_BT = jax.lax.pmax(peak_BT, over) if over else peak_BT
    mass_BT = total(jnp.sum(jnp.exp(logits_BTV - peak_BT[..., None]), axis=-1))
    return peak_BT, mass_BT, total(jnp.sum(jnp.where(_hits(logits_BTV, targets_BT), logits_BTV, 0.0), axis=-1))


def one_pass(logits_BTV: jax.Array, targets_BT: jax.Array, over: str | None):
    """`two_passes` in one, for GPUs: a sum goes over to a larger logit when it meets one (Milakov and Gimelshein 2018,
    arXiv:1805.02867, section 3), so the logits are read once. CPUs take ten times as long for it (docs/LOG.md)."""
    def join(one, other):
        (a, mass_a), (b, mass_b) = one, other
        shrink = jnp.exp(jnp.where(a == b, 0.0, -jnp.abs(a - b)))  # equal infinities have no difference
        return jnp.maximum(a, b), jnp.where(a >= b, mass_a + mass_b * shrink, mass_a * shrink + mass_b)

    V = logits_BTV.shape[-1]
    nothing = jnp.float32(-jnp.inf), jnp.float32(0.0)
    peak_BT, mass_BT = jax.lax.reduce((logits_BTV, jnp.ones_like(logits_BTV)), nothing, join, (logits_BTV.ndim - 1,))
    gold_BT = jnp.take_along_axis(logits_BTV, jnp.clip(targets_BT, 0, V - 1)[..., None], axis=-1)[..., 0]
    gold_BT = jnp.where((targets_BT >= 0) & (targets_BT < V), gold_BT, 0.0)
    if not over:
        return peak_BT, mass_BT, gold_BT
    highest_BT = jax.lax.pmax(peak_BT, over)
    mass_BT, gold_BT = jax.lax.psum((mass_BT * jnp.exp(peak_BT - highest_BT), gold_BT), over)
    return highest_BT, mass_BT, gold_BT


def _hits(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2) == targets_BT[..., None]


def num_chunks(batch: int, length: int, vocab: int) -> int:
    """The fewest chunks of the sequence whose float32 logits stay under MAX_LOGITS_BYTES on one device."""
    row_bytes = 4 * batch * vocab
    fits = (n for n in range(1, length) if length % n == 0 and row_bytes * (length // n) <= MAX_LOGITS_BYTES)
    return next(fits, length)


def _differs(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else jax.lax.pcast(x, (*TOKENS, "tensor"), to="varying")
