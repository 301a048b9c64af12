"""Causal attention by the Pallas splash kernel on TPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash


def splash_attention(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, *, window, softcap, scale, interpret=False):
    """out_BTHK of causal attention inside segments. `interpret=True` runs the kernel's code on a CPU.

    Needs T in multiples of 128.
    """
    T, H = q_BTHK.shape[1:3]
    G = k_BSGK.shape[2]
    mask = splash.CausalMask((T, T)) if window is None else splash.LocalMask((T, T), (window - 1, 0), 0)
    sizes = _block_sizes(T)
    make = splash.make_splash_mqa_single_device if G == 1 else splash.make_splash_mha_single_device
    kernel = make(
        splash.MultiHeadMask([mask] * H), block_sizes=sizes,
        attn_logits_soft_cap=softcap or None, residual_checkpoint_name="attention", interpret=interpret,
    )
    q_BHTK, k_BGSK, v_BGSK = (jnp.transpose(x, (0, 2, 1, 3)) for x in (q_BTHK, k_BSGK, v_BSGK))
    q_BHTK = q_BHTK * jnp.asarray(scale, q_BHTK.dtype)  # splash has no scale of its own

    def row(q_HTK, k_GSK, v_GSK, segments_T):
        if G == 1:
            k_GSK, v_GSK = k_GSK[0], v_GSK[0]
        return kernel(q_HTK, k_GSK, v_GSK, segment_ids=splash.SegmentIds(segments_T, segments_T))

    return jnp.transpose(jax.vmap(row)(q_BHTK, k_BGSK, v_BGSK, segment_ids_BT), (0, 2, 1, 3))


def _block_sizes(T: int) -> splash.BlockSizes:
    """The largest blocks up to 1024 that divide T; keys enter the matrix unit 512 at a time. The backward pass is
    one kernel: it computes the probabilities once for all three gradients."""
    block = next(size for size in (1024, 512, 256, 128) if T % size == 0)
    compute = min(block, 512)
    return splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=compute,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=compute, use_fused_bwd_kernel=True,
    )
