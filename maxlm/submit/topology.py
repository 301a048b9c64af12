"""Where a job runs, and what each scheduler calls it. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from maxlm.hardware import Chip, chip_of
from maxlm.schema import require
from maxlm.topology import TPUS, parse_name


@dataclass(frozen=True)
class CloudTpu:
    """Names of one TPU generation. `type_prefix` and `cores` make gcloud's accelerator type: prefix-(cores * chips)."""

    gke_accelerator: str
    machine: str
    type_prefix: str
    cores: int
    runtime_version: str


@dataclass(frozen=True)
class Gpu:
    chip: str
    gke_accelerator: str
    skypilot: str


# Sources, read 2026-11: GKE's "Plan TPUs" and "GPU node labels", Cloud TPU's "TPU configurations" and "TPU software
# versions". A multi-host slice has 4 chips a host in every generation (machine type ...-4t).
CLOUD_TPUS = {
    "v4": CloudTpu("tpu-v4-podslice", "ct4p-hightpu", "v4", 2, "tpu-ubuntu2204-base"),
    "v5e": CloudTpu("tpu-v5-lite-podslice", "ct5lp-hightpu", "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": CloudTpu("tpu-v5p-slice", "ct5p-hightpu", "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": CloudTpu("tpu-v6e-slice", "ct6e-standard", "v6e", 1, "v2-alpha-tpuv6e"),
    "7x": CloudTpu("tpu7x", "tpu7x-standard", "tpu7x", 2, "v2-alpha-tpu7-ubuntu2404"),
}
GPUS = {
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", "nvidia-tesla-a100", "A100"),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", "nvidia-a100-80gb", "A100-80GB"),
    "h100": Gpu("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb", "H100"),
    "h100-mega": Gpu("NVIDIA H100 80GB HBM3", "nvidia-h100-mega-80gb", "H100-MEGA"),
    "h200": Gpu("NVIDIA H200", "nvidia-h200-141gb", "H200"),
    "b200": Gpu("NVIDIA B200", "nvidia-b200", "B200"),
}
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # all slices of v5e and v6e
SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # of a torus; larger ones are made of cubes of 4x4x4
CHIPS_A_HOST = 4


@dataclass(frozen=True)
class Topology:
    """One slice, or the GPU hosts or CPU processes of a job. `chips` are of the slice, GPUs, or CPU processes."""

    kind: str
    shape: str
    platform: Literal["tpu", "gpu", "cpu"]
    chips: int
    chips_per_host: int

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    @property
    def chip(self) -> Chip | None:
        """None for a CPU."""
        return None if self.platform == "cpu" else chip_of((TPUS | GPUS)[self.kind].chip)

    @property
    def devices(self) -> int:
        """JAX devices; a CPU process has one."""
        return self.chips * (self.chip.devices_per_chip if self.chip else 1)

    @property
    def gke_accelerator(self) -> str:
        return (CLOUD_TPUS | GPUS)[self.kind].gke_accelerator

    @property
    def machine_type(self) -> str:
        """Of a TPU host on Google Cloud, such as ct5p-hightpu-4t."""
        return f"{CLOUD_TPUS[self.kind].machine}-{self.chips_per_host}t"

    @property
    def accelerator_type(self) -> str:
        """Of a TPU slice for gcloud and SkyPilot, such as v5p-256: cores or chips, by generation."""
        return f"{CLOUD_TPUS[self.kind].type_prefix}-{CLOUD_TPUS[self.kind].cores * self.chips}"

    def __str__(self) -> str:
        return f"{self.kind}:{self.shape}"


def parse_topology(text: str) -> Topology:
    """Raises ConfigError where no such thing can be asked for."""
    kind, sizes = parse_name(text, hosts=(*GPUS, "cpu"))
    chips, shape = math.prod(sizes), "x".join(map(str, sizes))
    if kind not in TPUS:
        return Topology(kind, shape, "cpu" if kind == "cpu" else "gpu", chips, sizes[1])
    if len(sizes) == 2:
        require(sizes in FLAT, f"--topology {text}: slices of {kind} are {_listed(FLAT)}")
        return Topology(kind, shape, "tpu", chips, 8 if chips == 8 else min(chips, CHIPS_A_HOST))
    cubes = all(size % 4 == 0 for size in sizes) and list(sizes) == sorted(sizes)
    require(sizes in SMALL or cubes, f"--topology {text}: slices of {kind} are {_listed(SMALL)}, or multiples of 4 in "
                                     "ascending order such as 4x4x8")
    return Topology(kind, shape, "tpu", chips, CHIPS_A_HOST)


def _listed(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)
