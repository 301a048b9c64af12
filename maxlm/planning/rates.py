"""What one chip reaches, by kind of work. For TPUs these are the peaks: no TPU was measured by us, so a time from them
is a bound. For Hopper GPUs they are calibrated on the records named here, and on nothing that they are then used for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from maxlm.hardware import Chip

# H100 and H200, which differ in memory alone. attention, copies, scan, fabric: benchmarks/results/primitives_h100.json.
# gemm: products inside a training step, where the chip is at its power limit: 989 TFLOP/s times what makes
# llama3_2_1b_h200_bf16.json of commit a82080b (504 ms a step) and 8 layers of Llama 3 8B (docs/LOG.md, 684 ms) come out
# right together, against 0.80 for one product alone. fp8: the same from the fp8 steps there. grouped: the kernels' own
# figures in grouped_matmul_h100.json and, for 8-bit gradients of weights, 1,154 TFLOP/s, within what docs/LOG.md has
# (2026-11-26; 1,081 as shipped since), less what products lose inside a step (665 of the 794 TFLOP/s in bf16 of
# primitives_h100.json).
_HOPPER_GEMM, _HOPPER_FP8 = 665e12 / 989e12, 1200e12 / 1979e12
_HOPPER_ATTENTION = {64: (396e12, 337e12), 128: (501e12, 420e12)}  # head_dim -> forward, backward; of a causal half
_HOPPER_GROUPED = (0.84 * 709e12, 0.84 * 698e12)  # forward, both gradients
_HOPPER_GROUPED_FP8 = (0.84 * 1281e12, 0.84 * 1178e12)
_HOPPER_COPY = 3.03e12 / 3350e9  # of the data sheet's bandwidth
_HOPPER_FABRIC = 315e9 / 450e9
# A layer scan stacks what it keeps for the backward pass and slices it again: the passes over those bytes that make the
# scanned step of that record as slow as it was (a chip of 3.03 TB/s, 21.5 GB kept, 83 ms more than unrolled).
_HOPPER_SCAN = (32768 / 50383 - 32768 / 57776) * 3.03e12 / 21.5e9
HOPPER = ("H100 SXM", "H200 SXM")
# TPU products count in multiples of the matrix unit's width: cloud.google.com/tpu/docs, system architecture.
MATRIX_UNIT: Mapping[str, int] = {"TPU v4": 128, "TPU v5e": 128, "TPU v5p": 128, "TPU v6e": 256, "TPU7x": 256}


@dataclass(frozen=True)
class Rates:
    """Of one chip, in FLOP/s and bytes/s. `scan_passes`: over what a scan keeps for the backward pass. `measured`:
    whether any of it is, so that a time is an estimate and not a bound."""

    gemm: float
    fp8: float
    attention: tuple[float, float]
    grouped: tuple[float, float]
    grouped_fp8: tuple[float, float]
    memory: float
    fabric: float
    scan_passes: float
    measured: bool


def rates_of(chip: Chip, head_dim: int) -> Rates:
    """Of a chip whose attention has heads of `head_dim`. Raises KeyError where the vendor gives no bf16 peak."""
    bf16 = chip.peak_flops["bf16"]
    fp8 = max(chip.peak("fp8") or 0.0, bf16)
    if chip.name in HOPPER:
        attention = _HOPPER_ATTENTION[64 if head_dim <= 64 else 128]
        return Rates(_HOPPER_GEMM * bf16, _HOPPER_FP8 * fp8, attention, _HOPPER_GROUPED,
                     _HOPPER_GROUPED_FP8, _HOPPER_COPY * chip.hbm_bytes_per_second,
                     _HOPPER_FABRIC * chip.ici_bytes_per_second, _HOPPER_SCAN, measured=True)
    lanes = MATRIX_UNIT.get(chip.name, 1)
    attention = bf16 * min(1.0, head_dim / lanes)
    return Rates(bf16, fp8, (attention, attention), (bf16, bf16), (fp8, fp8), chip.hbm_bytes_per_second,
                 chip.ici_bytes_per_second, 0.0, measured=False)
