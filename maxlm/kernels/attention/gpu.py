"""Causal attention by cuDNN on NVIDIA GPUs, packed documents included.

One of three calls is chosen on the device, by what the batch holds: a document a row takes the plain causal call;
packed rows take the ragged call, whose cost is that of the documents; rows packed with more documents than the
ragged call was compiled for take the plain call with a bias that masks them apart. cuDNN's backward passes add in an
order that varies; `deterministic` takes gpu_backward.py's for them.
"""

from __future__ import annotations

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxlm.kernels.attention.cudnn_call import Call, ragged

# Documents a row, averaged over the rows of a call, that the ragged call is compiled for. Its grid and its
# statistics grow with it.
SEGMENTS = 16
# Bytes that a ragged backward call may work in: it takes two float32 copies of q as if every document filled a row
# (17.2 GB for 8 rows of 4096 and 32 heads of 128; docs/LOG.md, 2026-11-26). Beyond, rows are taken in parts, one row at
# the least. A part with more than `SEGMENTS` documents a row takes the call with a bias for the whole backward pass.
WORKSPACE = 2**32


def cudnn_attention(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, *, window, scale, segments=SEGMENTS, deterministic=False):
    """out_BTHK of causal attention inside segments, for bfloat16 or float16 on a GPU."""
    return _attend(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, window, float(scale), segments, deterministic)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _attend(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, window, scale, segments, deterministic):
    return _forward(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, window, scale, segments, deterministic)[0]


def _forward(q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, window, scale, segments, deterministic):
    """(out_BTHK, what the backward pass needs). The log-sum-exp is kept by token, [B,H,T], whichever call made it."""
    documents = Documents(segment_ids_BT, segments)

    def plain():
        return Call(scale, window).forward(q_BTHK, k_BSGK, v_BSGK)

    def packed():
        call = Call(scale, window, segments=segments)
        out_BTHK, stats_NHT = call.forward(q_BTHK, k_BSGK, v_BSGK, *documents.ragged(q_BTHK, k_BSGK))
        return out_BTHK, documents.by_token(stats_NHT)

    def masked():
        return Call(scale, window, biased=True).forward(q_BTHK, k_BSGK, v_BSGK, documents.bias(q_BTHK.dtype))

    out_BTHK, stats_BHT = jax.lax.switch(documents.kind, (plain, packed, masked))
    # Named in here, because a remat policy that saves the result alone would run the call again for its statistics.
    out_BTHK, stats_BHT = checkpoint_name(out_BTHK, "attention"), checkpoint_name(stats_BHT, "attention")
    return out_BTHK, (q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, out_BTHK, stats_BHT)


def _backward(window, scale, segments, deterministic, kept, dout_BTHK):
    q_BTHK, k_BSGK, v_BSGK, segment_ids_BT, out_BTHK, stats_BHT = kept
    if deterministic:
        from maxlm.kernels.attention.gpu_backward import attention_backward  # Pallas is slow to import

        grads = attention_backward(
            q_BTHK, k_BSGK, v_BSGK, out_BTHK, stats_BHT, dout_BTHK, segment_ids_BT, window=window, scale=scale
        )
        return (*grads, None)
    saved = (q_BTHK, k_BSGK, v_BSGK, out_BTHK)
    B, T, H, K = q_BTHK.shape
    rows = max(1, WORKSPACE // (8 * segments * T * H * K))
    parts = [slice(first, first + rows) for first in range(0, B, rows)]
    documents = [Documents(segment_ids_BT[part], segments) for part in parts]

    def plain():
        return Call(scale, window).backward(*saved, stats_BHT, dout_BTHK)

    def packed():
        call = Call(scale, window, segments=segments)
        grads = [
            call.backward(*(x[part] for x in saved), of_part.by_document(stats_BHT[part]), dout_BTHK[part],
                          *of_part.ragged(q_BTHK[part], k_BSGK[part]))
            for part, of_part in zip(parts, documents, strict=True)
        ]
        return tuple(map(jnp.concatenate, zip(*grads, strict=True)))

    def masked():
        call = Call(scale, window, biased=True)
        return call.backward(*saved, stats_BHT, dout_BTHK, Documents(segment_ids_BT, segments).bias(q_BTHK.dtype))

    kind = reduce(jnp.maximum, [of_part.kind for of_part in documents])
    return (*jax.lax.switch(kind, (plain, packed, masked)), None)


_attend.defvjp(_forward, _backward)


class Documents:
    """The runs of equal segment ids of a batch, padding included, numbered over the whole batch.

    kind: 0 where every row is one document (and padding behind it, which causality hides), 1 where there are at
    most B*segments runs, else 2.
    """

    def __init__(self, segment_ids_BT, segments: int):
        B, T = segment_ids_BT.shape
        self.segment_ids_BT, self.segments = segment_ids_BT, segments
        first_BT = jnp.ones((B, T), bool).at[:, 1:].set(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1])
        self.number_BT = jnp.cumsum(first_BT.reshape(-1), dtype=jnp.int32).reshape(B, T) - 1
        starts_N = jnp.nonzero(first_BT.reshape(-1), size=B * segments, fill_value=B * T)[0].astype(jnp.int32)
        ends_N = jnp.concatenate([starts_N[1:], jnp.full(1, B * T, jnp.int32)])
        self.starts_N, self.lengths_N = starts_N, ends_N - starts_N
        whole = jnp.all((segment_ids_BT == segment_ids_BT[:, :1]) | (segment_ids_BT == 0))
        count = self.number_BT[-1, -1] + 1
        self.kind = jnp.where(whole, 0, jnp.where(count <= B * segments, 1, 2))

    def ragged(self, q_BTHK, k_BSGK):
        return ragged(self.starts_N, self.lengths_N, q_BTHK, k_BSGK, self.segments)

    def bias(self, dtype):
        """[B,1,T,T]: 0 inside a document, else a number that no score makes up for (far from the dtype's least:
        cuDNN subtracts it from its like)."""
        same_BTS = self.segment_ids_BT[:, :, None] == self.segment_ids_BT[:, None, :]
        return jnp.where(same_BTS, 0.0, -(2.0**41) if dtype == jnp.bfloat16 else -(2.0**15)).astype(dtype)[:, None]

    def by_token(self, stats_NHT):
        """[N,H,T], a row a document -> [B,H,T], a row a row of the batch."""
        B, T = self.number_BT.shape
        H = stats_NHT.shape[1]
        place_BT = jnp.arange(B * T, dtype=jnp.int32).reshape(B, T) - self.starts_N[self.number_BT]
        return stats_NHT[self.number_BT[:, None, :], jnp.arange(H)[None, :, None], place_BT[:, None, :]]

    def by_document(self, stats_BHT):
        """The inverse of `by_token`; what lies past a document's length is unspecified."""
        B, H, T = stats_BHT.shape
        token_NT = jnp.minimum(self.starts_N[:, None] + jnp.arange(T, dtype=jnp.int32)[None], B * T - 1)
        return stats_BHT[token_NT[:, None, :] // T, jnp.arange(H)[None, :, None], token_NT[:, None, :] % T]
