"""The cuDNN fused attention calls of XLA, reached through `jax.ffi`, with packed documents.

`jax.nn.dot_product_attention(implementation="cudnn")` makes these same calls but takes no document boundaries
except as an additive bias of B*T*T values. The calls themselves take the boundaries (cuDNN's ragged, or THD,
layout: every document is one sequence of a ragged batch), which is exact, and skips the work between documents.
Names, operands and the JSON are XLA's contract with jax (xla/service/gpu/cublas_cudnn.h, backend_configs.proto).
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp

_HEADS_LAST = (0, 2, 1, 3)  # results are [B,H,T,K] in name and [B,T,H,K] in memory: transposing them is free


@dataclass(frozen=True)
class Call:
    """What a call computes. segments > 1: a row holds up to that many documents on average, given as a ragged
    batch of B*segments sequences; segments = 1: one document a row. biased: an additive bias [B,1,T,T]."""

    scale: float
    window: int | None
    segments: int = 1
    biased: bool = False

    def forward(self, q_BTHK, k_BSGK, v_BSGK, *extra):
        """(out_BTHK, stats [B*segments, H, T]): log-sum-exp of the scores, by sequence. extra: `ragged`, or a bias."""
        B, T, H, K = q_BTHK.shape
        results = (
            jax.ShapeDtypeStruct((B, H, T, K), q_BTHK.dtype),
            jax.ShapeDtypeStruct((B * self.segments, H, T), jnp.float32),
            _WORKSPACE,
        )
        out_BHTK, stats, _ = self._call("", results, (_HEADS_LAST, None, None), q_BTHK, k_BSGK)(
            q_BTHK, k_BSGK, v_BSGK, *extra
        )
        return jnp.transpose(out_BHTK, _HEADS_LAST), stats

    def backward(self, q_BTHK, k_BSGK, v_BSGK, out_BTHK, stats, dout_BTHK, *extra):
        """(dq_BTHK, dk_BSGK, dv_BSGK)."""
        results = tuple(
            jax.ShapeDtypeStruct((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype)
            for x in (q_BTHK, k_BSGK, v_BSGK)
        )
        bias, ragged = (extra, ()) if self.biased else ((), extra)
        *grads, _ = self._call("Backward", (*results, _WORKSPACE), (_HEADS_LAST,) * 3 + (None,), q_BTHK, k_BSGK)(
            q_BTHK, k_BSGK, v_BSGK, stats, dout_BTHK, *bias, out_BTHK, *ragged
        )
        return tuple(jnp.transpose(g, _HEADS_LAST) for g in grads)

    def _call(self, direction, results, layouts, q_BTHK, k_BSGK):
        kind = "ScaleBiasSoftmax" if self.biased else "Softmax"
        return jax.ffi.ffi_call(
            f"__cudnn$fmha{kind}{direction}", results, output_layouts=layouts, custom_call_api_version=2,
            legacy_backend_config=json.dumps(self._config(q_BTHK, k_BSGK, backward=bool(direction))),
        )

    def _config(self, q_BTHK, k_BSGK, *, backward):
        B, T, H, _ = q_BTHK.shape
        score_shape = {
            "element_type": {"bfloat16": "BF16", "float16": "F16"}[q_BTHK.dtype.name],
            "dimensions": [str(n) for n in (B, H, T, k_BSGK.shape[1])],
            "layout": {"minor_to_major": ["3", "2", "1", "0"]},
            "is_dynamic_dimension": [False] * 4,
        }
        return {
            "operation_queue_id": "0",
            "cudnn_fmha_backend_config": {
                "algorithm": {"algo_id": "0", "math_type": "TENSOR_OP_MATH", "tuning_knobs": {"17": "1", "24": "0"},
                              "is_cudnn_frontend": True, "workspace_size": "0"},
                "fmha_scale": self.scale,
                "intermediate_tensor_shape": score_shape,
                "is_flash_attention": True,
                "mask_type": "PADDING_CAUSAL" if self.segments > 1 else "CAUSAL",
                "dropout_rate": 0.0,
                "seed": 42,
                "sliding_window_length": self.window or 0,
                "max_seg_per_batch": self.segments,
                "is_paged_attention": False,
                **{name: _dimensions(*numbers) for name, numbers in (_BACKWARD if backward else _FORWARD).items()},
            },
        }


_WORKSPACE = jax.ShapeDtypeStruct((0,), jnp.uint8)  # XLA sizes it when it compiles

# (contracting dims, batch dims) of both sides of each product; q, k, v, out are BTHK and scores are BHTS.
_FORWARD = {
    "bmm1_dot_dimension_numbers": ((3, 3), ((0, 2), (0, 2))),
    "bmm2_dot_dimension_numbers": ((3, 1), ((0, 1), (0, 2))),
}
_BACKWARD = {
    "bmm1_grad_gemm1_dot_dimension_numbers": ((2, 1), ((0, 1), (0, 2))),
    "bmm1_grad_gemm2_dot_dimension_numbers": ((3, 1), ((0, 1), (0, 2))),
    "bmm2_grad_gemm1_dot_dimension_numbers": ((2, 1), ((0, 1), (0, 2))),
    "bmm2_grad_gemm2_dot_dimension_numbers": ((3, 3), ((0, 2), (0, 2))),
}


def _dimensions(contracting, batch):
    return {
        f"{side}_{kind}_dimensions": [str(d) for d in dims]
        for i, side in enumerate(("lhs", "rhs"))
        for kind, dims in (("contracting", (contracting[i],)), ("batch", batch[i]))
    }


def ragged(starts_N, lengths_N, q_BTHK, k_BSGK, segments: int):
    """The ragged batch as the calls take it: (q lengths, kv lengths, q offsets, kv offsets), int32.

    starts_N, lengths_N, N = B*segments: first token, counted over the whole batch, and length of each sequence;
    sequences that are not there come last, with start B*T and length 0.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    if B * T * H * K >= 2**31:
        raise ValueError(f"q_BTHK of {B}x{T}x{H}x{K} values on one device is too large for cuDNN's 32-bit offsets: "
                         "split the batch or the heads over more devices")
    offsets = jnp.concatenate([starts_N, jnp.full(B, B * T, jnp.int32)]).reshape(B, segments + 1)
    lengths = lengths_N.reshape(B, segments)
    return lengths, lengths, offsets * (H * K), offsets * (G * K)
