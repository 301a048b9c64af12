"""Causal attention by cuDNN on NVIDIA GPUs (`jax.nn.dot_product_attention`), packed documents included."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cudnn_attention(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, *, window, scale, kernel="cudnn"):
    """out_BTHK of causal attention inside segments. `kernel='xla'` runs the same logic without cuDNN.

    A batch whose rows are one document each takes the plain causal kernel; any other adds the mask of
    documents as a bias, which costs B*T*T values. The choice is made on the device, per shard.
    """
    sizes = None if window is None else (window - 1, 0)
    plain = {"scale": scale, "is_causal": True, "local_window_size": sizes, "implementation": kernel}

    def whole_rows():
        return jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, **plain)

    def packed_rows():
        same_B1TS = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
        return jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, mask=same_B1TS, **plain)

    # Padding behind a single document needs no mask: causality hides it.
    one_each = jnp.all((segment_ids_BT == segment_ids_BT[:, :1]) | (segment_ids_BT == 0))
    return jax.lax.cond(one_each, whole_rows, packed_rows)
