"""Every way to lay a run out on a slice that could be sensible, judged by the analytic model.

What is trained stays as it is: meshes, microbatches, rematerialisation and what waits on the host change, never the
global batch. `mesh.stage` stays what the config says: within a slice, whose links reach all chips alike, a pipeline has
nothing to offer that `fsdp` has not, but bubbles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

from maxlm.config import MeshConfig, RunConfig
from maxlm.parallel.mesh import check_divisible
from maxlm.planning.analytic import Estimate, estimate
from maxlm.planning.topology import Target, find_target
from maxlm.planning.torus import axis_links
from maxlm.schema import ConfigError

POLICIES = ("none", "dots", "names", "full")
# The last resort, for the time on the host's link is in no estimate: layer inputs on the host, and the moments too.
OFFLOADED = (("full_offload", False), ("full_offload", True))
MOST_TENSOR = 32
CONTEXTS = (1, 2, 4, 8, 16)  # above 1 only where a device works on one row at a time: a second is better than a part
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # sequences of a device at once
SHAPES_2D = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SHAPES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")


@dataclass(frozen=True)
class Candidate:
    """A layout: sizes of the mesh, microbatches and remat policy, as keys of the config, and what is expected of it."""

    values: tuple[tuple[str, int | str | bool], ...]
    config: RunConfig
    rows: int
    expected: Estimate

    @property
    def mesh(self) -> tuple[int, ...]:
        mesh = self.config.mesh
        return (mesh.data, mesh.fsdp, mesh.expert, mesh.context, mesh.tensor)

    def overrides(self, given: RunConfig) -> str:
        """The --set options that turn the given config into this one."""
        written = lambda value: str(value).lower() if isinstance(value, bool) else value  # noqa: E731
        changed = [f"--set {key}={written(value)}" for key, value in self.values if _at(given, key) != value]
        return " ".join(changed) or "(the config as it is)"


def candidates(config: RunConfig, target: Target, *, offload: bool = False) -> list[Candidate]:
    """All that divide as they must, fastest first, whether or not they fit. offload: those that use the host's memory,
    in place of those that do not."""
    kept = OFFLOADED if offload else tuple((policy, config.compute.offload_optimizer) for policy in POLICIES)
    found = []
    for axes in _meshes(config, target):
        ways = axes["data"] * axes["stage"] * axes["fsdp"] * axes["expert"]
        for rows in ROWS[:1] if axes["context"] > 1 else ROWS:
            accumulation, left = divmod(config.train.global_batch_size, ways * rows)
            if left or not accumulation:
                continue
            found += [_candidate(config, target, axes, rows, accumulation, *how) for how in kept]
    return sorted((c for c in found if c is not None), key=lambda c: c.expected.seconds)


def _meshes(config: RunConfig, target: Target) -> Iterator[dict[str, int]]:
    model, stage = config.model, config.mesh.stage
    for tensor in _divisors(math.gcd(target.num_devices, model.num_kv_heads)):
        if tensor > MOST_TENSOR:
            continue
        for context in sorted({*CONTEXTS, config.mesh.context}):
            left, no = divmod(target.num_devices, tensor * context * stage)
            if no:
                continue
            for expert in _divisors(math.gcd(left, model.num_experts)) if model.num_experts else [1]:
                for data in _divisors(left // expert):
                    if data % target.slices == 0:
                        yield {"data": data, "stage": stage, "fsdp": left // expert // data, "expert": expert,
                               "context": context, "tensor": tensor}


def _candidate(config: RunConfig, target: Target, axes: dict[str, int], rows: int, accumulation: int,
               policy: str, offload_optimizer: bool) -> Candidate | None:
    train = replace(config.train, grad_accumulation=accumulation)
    try:
        check_divisible(SimpleNamespace(shape=axes), replace(config, train=train))
        laid_out = replace(config, mesh=MeshConfig(**axes), train=train, remat=replace(config.remat, policy=policy),
                           compute=replace(config.compute, offload_optimizer=offload_optimizer))
    except ConfigError:
        return None
    values = {f"mesh.{axis}": axes[axis] for axis in ("data", "fsdp", "expert", "context", "tensor")}
    values |= {"train.grad_accumulation": accumulation, "remat.policy": policy,
               "compute.offload_optimizer": offload_optimizer}
    inside = axes | {"data": axes["data"] // target.slices}
    expected = estimate(laid_out, target.chip, axes, axis_links(target, inside), dcn_slices=target.slices)
    return Candidate(tuple(values.items()), laid_out, rows, expected)


def why_none(config: RunConfig, target: Target, found: list[Candidate]) -> str:
    """One line: why no candidate can be, and what would make one possible."""
    train = config.train
    if not found:
        split = ("data", "stage", "fsdp", "expert")
        fewest = min((math.prod(axes[axis] for axis in split) for axes in _meshes(config, target)), default=0)
        return (f"no mesh of {target.num_devices} devices divides this config: train.global_batch_size="
                f"{train.global_batch_size} must be a multiple of the devices that split the batch, {fewest} or more "
                "here: change it to such a multiple, or take fewer chips")
    least = min(found, key=lambda c: c.expected.memory_bytes)
    needs = f"{least.expected.memory_bytes / 1e9:.0f} GB a chip ({least.overrides(config)})"
    has = f"{target.name} has {target.usable_bytes / 1e9:.0f}"
    larger = _first_that_holds(config, target)
    return f"it needs at least about {needs} and {has}: " + (
        f"take {larger} or more chips" if larger else "take a chip with more memory, or more slices over mesh.data")


def _first_that_holds(config: RunConfig, target: Target) -> str | None:
    """The smallest larger slice of the same chip on which a candidate fits."""
    kind = target.name.partition(":")[0]
    for shape in SHAPES_2D if len(target.shape) == 2 else SHAPES_3D:
        larger = find_target(f"{kind}:{shape}", target.slices)
        if larger.num_chips > target.num_chips and any(
                c.expected.memory_bytes <= larger.usable_bytes
                for offload in (False, True) for c in candidates(config, larger, offload=offload)):
            return larger.name
    return None


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _at(config: RunConfig, key: str) -> object:
    section, field = key.split(".")
    return getattr(getattr(config, section), field)
