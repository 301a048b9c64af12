"""What a chip can do, from its vendor's data sheet, and the XLA options that each platform's compiles travel with.

Standard library only. Conventions, the same for every chip:

- Peaks are FLOP/s (int8: operations/s), dense (no 2:4 sparsity), of one *chip*. 'float32' is IEEE arithmetic; 'tf32' is
  what GPUs use for float32 products unless told otherwise. A precision without a vendor's figure is absent.
- `hbm_bytes` is the memory on the chip; runtime and driver keep some of it (0.2-1 GiB).
- `ici_bytes_per_second` is what one chip can send over all its links of the fast fabric (ICI, NVLink) at once, in one
  direction; half of the 'bidirectional' figure on data sheets. A ring along one mesh axis uses 2 of `ici_links`.
- `dcn_bytes_per_second` is one chip's share of its host's network, in one direction. None: it depends on the host.
- A chip is not always a JAX device: TPU7x shows its two chiplets as two devices, each with half of everything here.
  TPU v4 and v5p join their two cores into one device ('megacore') when they run, but an ahead-of-time topology
  of v4 lists cores, so a planner counts chips by coordinates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

GIB = 2**30
MIB = 2**20

Precision = Literal["bf16", "fp8", "int8", "tf32", "float32"]


@dataclass(frozen=True)
class Chip:
    """Peaks and bandwidths of one chip; the module's docstring has the conventions."""

    name: str
    device_kinds: tuple[str, ...]  # `jax.Device.device_kind`, exactly
    peak_flops: Mapping[Precision, float]
    hbm_bytes: int
    hbm_bytes_per_second: float
    ici_bytes_per_second: float
    ici_links: int
    dcn_bytes_per_second: float | None
    devices_per_chip: int = 1

    def peak(self, precision: Precision) -> float | None:
        """FLOP/s of the chip in `precision`, or None where the vendor publishes none (then no MFU is reported)."""
        return self.peak_flops.get(precision)

    def chips(self, num_devices: int) -> int:
        """Chips that `num_devices` JAX devices are: what a rate 'per chip' is divided by."""
        return max(1, num_devices // self.devices_per_chip)


# Sources: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, read 2026-11. They state ICI as bidirectional GB/s a chip
# and DCN as Gb/s a chip or as NICs a host. v4's links: Jouppi et al. 2023, arXiv:2304.01433 (6 links of 50 GB/s).
# v4's DCN: "How to Scale Your Model" (Austin et al. 2025), part 2. The FP8 figures of v5p and v6e are those that
# Google's TPU7x page gives for them: no faster than bf16.
_TPUS = (
    Chip("TPU v4", ("TPU v4",), {"bf16": 275e12, "int8": 275e12},
         32 * GIB, 1228e9, 300e9, 6, 6.25e9),
    Chip("TPU v5e", ("TPU v5 lite", "TPU v5e"), {"bf16": 197e12, "int8": 393e12},
         16 * GIB, 819e9, 200e9, 4, 3.125e9),
    Chip("TPU v5p", ("TPU v5", "TPU v5p"), {"bf16": 459e12, "fp8": 459e12, "int8": 918e12},
         95 * GIB, 2765e9, 600e9, 6, 6.25e9),
    Chip("TPU v6e", ("TPU v6 lite", "TPU v6e"), {"bf16": 918e12, "fp8": 918e12, "int8": 1836e12},
         32 * GIB, 1638e9, 400e9, 4, 12.5e9),
    Chip("TPU7x", ("TPU7x", "TPU v7x"), {"bf16": 2307e12, "fp8": 4614e12},
         192 * GIB, 7380e9, 600e9, 6, 12.5e9, devices_per_chip=2),
)

# Sources: NVIDIA A100, H100 and H200 Tensor Core GPU data sheets and the HGX B200 / Blackwell architecture brief;
# sparse figures halved. Memory is what nvidia-smi shows in total. DCN: the DGX design of one ConnectX a GPU
# (A100 200 Gb/s; H100, H200, B200 400 Gb/s); PCIe cards have no reference host.
_H100_SXM: Mapping[Precision, float] = {
    "bf16": 989e12, "fp8": 1979e12, "int8": 1979e12, "tf32": 494.7e12, "float32": 67e12
}
_A100: Mapping[Precision, float] = {"bf16": 312e12, "int8": 624e12, "tf32": 156e12, "float32": 19.5e12}
_GPUS = (
    Chip("A100 SXM 40GB", ("NVIDIA A100-SXM4-40GB",), _A100, 40960 * MIB, 1555e9, 300e9, 12, 25e9),
    Chip("A100 SXM 80GB", ("NVIDIA A100-SXM4-80GB",), _A100, 81920 * MIB, 2039e9, 300e9, 12, 25e9),
    Chip("A100 PCIe 40GB", ("NVIDIA A100-PCIE-40GB",), _A100, 40960 * MIB, 1555e9, 300e9, 12, None),
    Chip("A100 PCIe 80GB", ("NVIDIA A100 80GB PCIe",), _A100, 81920 * MIB, 1935e9, 300e9, 12, None),
    Chip("H100 SXM", ("NVIDIA H100 80GB HBM3",), _H100_SXM, 81559 * MIB, 3350e9, 450e9, 18, 50e9),
    Chip("H100 PCIe", ("NVIDIA H100 PCIe",),
         {"bf16": 756e12, "fp8": 1513e12, "int8": 1513e12, "tf32": 378e12, "float32": 51e12},
         81559 * MIB, 2000e9, 300e9, 12, None),
    Chip("H200 SXM", ("NVIDIA H200",), _H100_SXM, 143771 * MIB, 4800e9, 450e9, 18, 50e9),
    Chip("B200", ("NVIDIA B200",), {"bf16": 2250e12, "fp8": 4500e12, "int8": 4500e12, "tf32": 1125e12},
         183359 * MIB, 8000e9, 900e9, 18, 50e9),
)

CHIPS = _TPUS + _GPUS


def chip_of(device_kind: str) -> Chip | None:
    """The chip behind `jax.devices()[0].device_kind`, or None for one that is not known: a peak is never guessed.

    The whole name must match (spaces and case aside), because 'NVIDIA H200 NVL', 'NVIDIA H100 80GB HBM3 MIG 1g.10gb'
    and 'NVIDIA H800' are other machines than the names they begin with.
    """
    wanted = _normal(device_kind)
    for chip in CHIPS:
        if wanted in {_normal(kind) for kind in chip.device_kinds}:
            return chip
    return None


def _normal(kind: str) -> str:
    kind = re.sub(r"\s+", "", kind).lower()
    return kind.removeprefix("nvidia")  # drivers before 2021 leave the vendor out


def compiler_options(platform: str, *, deterministic: bool = False) -> dict[str, bool]:
    """XLA options for `jax.jit(..., compiler_options=...)` on 'tpu', 'gpu' ('cuda') or 'cpu'.

    deterministic: on a GPU, compile to the same bits every time (no atomics, no choice by timing).

    GPU: autotuning XLA's Triton GEMMs costs 12-131 s of compilation an FP8 product, and cuBLASLt ran faster
    (measured on an H100, docs/LOG.md). The latency-hiding scheduler overlaps collectives with computation.
    TPU: asynchronous all-gathers are libtpu's default from v5e on, and on v4 with this option (read from the HLO of
    ahead-of-time compiles, libtpu 0.0.52). The async-collective-fusion options that guides list are left out: they
    are on by default where they work, v5e, and for other chips libtpu refuses them as unsafe.
    """
    if platform in ("gpu", "cuda"):
        options = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_latency_hiding_scheduler": True}
        return {**options, "xla_gpu_deterministic_ops": True} if deterministic else options
    if platform == "tpu":
        return {"xla_enable_async_all_gather": True}
    return {}
