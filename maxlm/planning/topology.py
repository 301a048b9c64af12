"""What a step is compiled for: a slice of TPUs by name, several of them, or the devices that are attached.

Slices are named as everywhere (maxlm/topology.py), 'v5p:4x4x8', in any order of sizes that libtpu has. 'local' is what
is attached to this machine, 'gpu' the same where that must be GPUs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from maxlm.hardware import CHIPS, GIB, Chip
from maxlm.schema import ConfigError, require
from maxlm.topology import TPUS, parse_name

# Kind -> (libtpu's name, HBM that a program can have in bytes a chip). The latter is what the compiler states when it
# refuses a program (libtpu 0.0.52, "exceeds available HBM (95.73G)"); of TPU7x twice a device's.
_LIBTPU = {
    "v4": ("v4", 30.75 * GIB),
    "v5e": ("v5e", 15.75 * GIB),
    "v5p": ("v5p", 95.73 * GIB),
    "v6e": ("v6e", 31.24 * GIB),
    "7x": ("tpu7x", 2 * 94.74 * GIB),
}
ATTACHED = ("local", "gpu")
BOTH_WAYS = frozenset(("up", "down"))
GPU_RESERVE = 1.5 * GIB  # CUDA context, NCCL and cuBLAS work space: what XLA's allocator cannot have


@dataclass(frozen=True)
class Target:
    """`shape`: chips along each dim of one slice; () for attached devices, whose chip is known once they were asked."""

    name: str
    shape: tuple[int, ...] = ()
    slices: int = 1
    chip: Chip | None = None
    libtpu_name: str = ""
    usable_bytes: float = 0.0

    @property
    def attached(self) -> bool:
        return self.name in ATTACHED

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def num_devices(self) -> int:
        assert self.chip is not None
        return self.num_chips * self.chip.devices_per_chip

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether each dim of the torus closes to a ring. v5e and v6e close a dim of 16 chips; v4, v5p and TPU7x close
        all dims of slices that are made of whole cubes of 4x4x4 (cloud.google.com/tpu/docs, system architecture)."""
        if len(self.shape) == 2:
            return tuple(size == 16 for size in self.shape)
        return (all(size % 4 == 0 for size in self.shape),) * len(self.shape)


def find_target(name: str, slices: int = 1) -> Target:
    """The target called `name`. Raises ConfigError where there is none, naming those that there are."""
    require(slices >= 1, f"--slices={slices} must be 1 or more")
    if name in ATTACHED:
        require(slices == 1, f"--slices={slices} is for TPU slices, and --topology={name} is what is attached here")
        return Target(name)
    kind, shape = parse_name(name, bare=ATTACHED)
    libtpu_name, usable = _LIBTPU[kind]
    sizes = "x".join(map(str, shape))
    chip = next(chip for chip in CHIPS if chip.name == TPUS[kind].chip)
    return Target(f"{kind}:{sizes}", shape, slices, chip, f"{libtpu_name}:{sizes}", usable)


def usable_bytes(chip: Chip) -> float:
    """Bytes of a chip's memory that a program can have."""
    for kind, (_, usable) in _LIBTPU.items():
        if TPUS[kind].chip == chip.name:
            return usable
    return chip.hbm_bytes - GPU_RESERVE


def links(chip: Chip, target: Target, coords: Sequence[tuple[int, ...]]) -> float:
    """Links of a chip that a ring through the chips at `coords` (one group of a collective, on one slice) keeps busy in
    one direction. GPUs: all of them, as they meet in a switch.

    A dim of the torus gives two where the group fills it and it closes to a ring, one where it is an open line, and
    1 / stride of one where other groups' members stand between its own. Two devices of one chip: all its links.
    """
    if not target.shape:
        return chip.ici_links
    found = 0.0
    for dim, size in enumerate(target.shape):
        places = sorted({place[dim] for place in coords})
        if len(places) == 1:
            continue
        stride = min(b - a for a, b in zip(places, places[1:], strict=False))
        full = len(places) == size
        found += 2.0 if full and target.wraps[dim] and size > 2 else 1.0 / stride
    return found or float(chip.ici_links)


def permuted(target: Target, pairs: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[int, frozenset[str]]:
    """(messages on the busiest link, directions of the torus that are used, 'up' and 'down') where each pair's first
    chip sends one message to its second: dim after dim, the shorter way round. 0 where none leaves its chip."""
    load: Counter[tuple[tuple[int, ...], int, str]] = Counter()
    for begin, end in pairs:
        at = list(begin)
        for dim, size in enumerate(target.shape):
            way = end[dim] - at[dim]
            if target.wraps[dim] and 2 * abs(way) > size:
                way -= math.copysign(size, way)
            for _ in range(abs(int(way))):
                load[tuple(at), dim, "up" if way > 0 else "down"] += 1
                at[dim] = (at[dim] + (1 if way > 0 else -1)) % size
    return max(load.values(), default=0), frozenset(way for _, _, way in load)


def complain_of_attached(name: str, platform: str) -> None:
    """Raises ConfigError where 'gpu' was asked for and something else is attached."""
    if name == "gpu" and platform != "gpu":
        raise ConfigError(f"--topology=gpu: the devices attached here are {platform}: use local, or run on a GPU host")
