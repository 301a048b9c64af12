"""Causal attention by the Pallas splash kernel on TPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.kernels.attention.gathered import whole_rows
from maxlm.parallel.context import AXIS, row_order


def splash_attention(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, *, window, softcap, scale, interpret=False):
    """out_BTHK of causal attention inside segments. `interpret=True` runs the kernel's code on a CPU.

    Needs T in multiples of 128.
    """
    kernel = splash_kernel(*q_BTHK.shape[1:3], k_BSGK.shape[2], window=window, softcap=softcap, interpret=interpret)
    return _rows(kernel, q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, segment_ids_BT, scale)


def gathered_splash(kernel, q_BTHK, k_BTGK, v_BTGK, segment_ids_BT, *, scale):
    """`gathered.gathered_attention` by this device's part of a `splash_kernel` for all devices of `context`."""
    keys = (whole_rows(x) for x in (k_BTGK, v_BTGK))
    return _rows(kernel, q_BTHK, *keys, segment_ids_BT, whole_rows(segment_ids_BT), scale)


def laid_out_kernel(q_BTHK, k_BTGK, *, window, softcap, interpret=False):
    """(`splash_kernel` for whole rows of these, split over the devices of `context`, its specs for a `shard_map`)."""
    mesh, (_, _, heads_axis, _) = jax.sharding.get_abstract_mesh(), jax.typeof(q_BTHK).sharding.spec
    parts = 1 if heads_axis is None else mesh.shape[heads_axis]
    kernel = splash_kernel(q_BTHK.shape[1], q_BTHK.shape[2] // parts, k_BTGK.shape[2] // parts, window=window,
                           softcap=softcap, ways=mesh.shape[AXIS], interpret=interpret)
    specs = kernel.manual_sharding_spec(NamedSharding(mesh, P(None, AXIS)))
    return jax.tree.map(jax.sharding.reshard, kernel, specs), specs


def splash_kernel(length: int, heads: int, kv_heads: int, *, window, softcap, ways=1, interpret=False):
    """The kernel for rows of `length` tokens whose queries stand in the order of `ways` devices (parallel/context.py);
    its `manual_sharding_spec` says how to give each its part."""
    shape = (length, length)
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    mask.q_sequence = row_order(length, ways) if ways > 1 else mask.q_sequence
    make = splash.make_splash_mqa if kv_heads == 1 else splash.make_splash_mha
    return make(
        splash.MultiHeadMask([mask] * heads), block_sizes=_block_sizes(length, ways), head_shards=1, q_seq_shards=ways,
        attn_logits_soft_cap=softcap or None, residual_checkpoint_name="attention", interpret=interpret,
    )


def _rows(kernel, q_BTHK, k_BSGK, v_BSGK, segments_BT, segments_BS, scale):
    q_BHTK, k_BGSK, v_BGSK = (jnp.transpose(x, (0, 2, 1, 3)) for x in (q_BTHK, k_BSGK, v_BSGK))
    q_BHTK = q_BHTK * jnp.asarray(scale, q_BHTK.dtype)  # splash has no scale of its own

    def row(q_HTK, k_GSK, v_GSK, segments_T, segments_S):
        if k_GSK.shape[0] == 1:
            k_GSK, v_GSK = k_GSK[0], v_GSK[0]
        return kernel(q_HTK, k_GSK, v_GSK, segment_ids=splash.SegmentIds(segments_T, segments_S))

    return jnp.transpose(jax.vmap(row)(q_BHTK, k_BGSK, v_BGSK, segments_BT, segments_BS), (0, 2, 1, 3))


def _block_sizes(length: int, ways: int) -> splash.BlockSizes:
    """The largest blocks up to 1024 that divide the row, and of queries the chunks that it is cut into; keys enter the
    matrix unit 512 at a time. The backward pass is one kernel: it computes the probabilities once for all three
    gradients."""
    chunk = length if ways == 1 else length // (2 * ways)
    keys, queries = (next(size for size in (1024, 512, 256, 128) if n % size == 0) for n in (length, chunk))
    return splash.BlockSizes(
        block_q=queries, block_kv=keys, block_kv_compute=min(keys, 512),
        block_q_dkv=queries, block_kv_dkv=keys, block_kv_dkv_compute=min(keys, 512), use_fused_bwd_kernel=True,
    )
