"""Where a job runs, and what each scheduler calls it.

`v5p:4x4x8` is a TPU slice by its chips, `h100:4x8` is four hosts of eight GPUs, `cpu:1x2` is one host with two CPU
processes. Standard library only.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import Literal

from maxlm.hardware import Chip, chip_of
from maxlm.schema import ConfigError, require


@dataclass(frozen=True)
class Tpu:
    """Names of one TPU generation. `type_prefix` and `cores` make gcloud's accelerator type: prefix-(cores * chips)."""

    chip: str
    gke_accelerator: str
    machine: str
    dims: int
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
TPUS = {
    "v4": Tpu("TPU v4", "tpu-v4-podslice", "ct4p-hightpu", 3, "v4", 2, "tpu-ubuntu2204-base"),
    "v5e": Tpu("TPU v5e", "tpu-v5-lite-podslice", "ct5lp-hightpu", 2, "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": Tpu("TPU v5p", "tpu-v5p-slice", "ct5p-hightpu", 3, "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": Tpu("TPU v6e", "tpu-v6e-slice", "ct6e-standard", 2, "v6e", 1, "v2-alpha-tpuv6e"),
    "tpu7x": Tpu("TPU7x", "tpu7x", "tpu7x-standard", 3, "tpu7x", 2, "v2-alpha-tpu7-ubuntu2404"),
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
        return (TPUS | GPUS)[self.kind].gke_accelerator

    @property
    def machine_type(self) -> str:
        """Of a TPU host on Google Cloud, such as ct5p-hightpu-4t."""
        return f"{TPUS[self.kind].machine}-{self.chips_per_host}t"

    @property
    def accelerator_type(self) -> str:
        """Of a TPU slice for gcloud and SkyPilot, such as v5p-256: cores or chips, by generation."""
        return f"{TPUS[self.kind].type_prefix}-{TPUS[self.kind].cores * self.chips}"

    def __str__(self) -> str:
        return f"{self.kind}:{self.shape}"


def parse_topology(text: str) -> Topology:
    """Raises ConfigError where no such thing can be asked for."""
    kind, _, shape = text.lower().partition(":")
    kind = {"7x": "tpu7x", "v7x": "tpu7x", "v5litepod": "v5e", "a100": "a100-80"}.get(kind, kind)
    known = [*TPUS, *GPUS, "cpu"]
    if kind not in known:
        near = difflib.get_close_matches(kind, known, n=1)
        raise ConfigError(f"--topology {text}: {kind!r} is not known{f', did you mean {near[0]!r}' if near else ''}; "
                          f"known: {', '.join(known)}")
    example = "v5p:4x4x8" if kind in TPUS and TPUS[kind].dims == 3 else "v6e:16x16" if kind in TPUS else f"{kind}:4x8"
    require(bool(re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape)), f"--topology {text} must be like {example}")
    sizes = tuple(int(size) for size in shape.split("x"))
    chips = math.prod(sizes)
    if kind not in TPUS:
        require(len(sizes) == 2, f"--topology {text} must be {kind}:HOSTSxPROCESSES, such as {example}" if kind == "cpu"
                else f"--topology {text} must be {kind}:HOSTSxGPUS, such as {example}")
        return Topology(kind, shape, "cpu" if kind == "cpu" else "gpu", chips, sizes[1])
    require(len(sizes) == TPUS[kind].dims, f"--topology {text}: a slice of {kind} has {TPUS[kind].dims} sizes, such as "
                                           f"{example}")
    if len(sizes) == 2:
        require(sizes in FLAT, f"--topology {text}: slices of {kind} are {_listed(FLAT)}")
        return Topology(kind, shape, "tpu", chips, 8 if chips == 8 else min(chips, CHIPS_A_HOST))
    cubes = all(size % 4 == 0 for size in sizes) and list(sizes) == sorted(sizes)
    require(sizes in SMALL or cubes, f"--topology {text}: slices of {kind} are {_listed(SMALL)}, or multiples of 4 in "
                                     "ascending order such as 4x4x8")
    return Topology(kind, shape, "tpu", chips, CHIPS_A_HOST)


def _listed(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)
