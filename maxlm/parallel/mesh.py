"""The device mesh: six named axes, every one present, most of size 1.

The checks need no JAX, so that a submission makes them where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from maxlm.config import AXES, MeshConfig, RunConfig
from maxlm.schema import ConfigError

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh


def axis_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Devices along each axis, with `fsdp='rest'` resolved.

    Raises ConfigError where the product is not `num_devices`.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    others = math.prod(size for size in sizes.values() if size != "rest")
    if sizes["fsdp"] == "rest":
        if num_devices % others:
            axes = " * ".join(f"mesh.{axis}" for axis, size in sizes.items() if size not in (1, "rest"))
            raise ConfigError(f"{axes} = {others} does not divide the {num_devices} devices: choose sizes whose "
                              "product divides them")
        sizes["fsdp"] = num_devices // others
    elif others != num_devices:
        axes = " * ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "all axes 1"
        raise ConfigError(f"mesh ({axes}) needs {others} devices but there are {num_devices}: set mesh.fsdp='rest'")
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (all by default) with explicit axis types: a layout mistake is a trace-time error.

    `data` is outermost, so that on several hosts or slices its slow links carry the gradient sum alone;
    `tensor` is innermost, on the fastest links. Between TPU slices, which only the data center's network connects,
    `data` alone runs. Raises ConfigError where the sizes do not fit the devices.
    """
    import jax
    from jax.experimental import mesh_utils
    from jax.sharding import AxisType, Mesh

    devices = list(jax.devices() if devices is None else devices)
    sizes = axis_sizes(config, len(devices))
    slices = _slices(devices)
    if sizes["data"] % slices:
        raise ConfigError(f"mesh.data={sizes['data']} is not a multiple of the {slices} TPU slices, which must split "
                          f"no other axis: set it to {slices}, or to a multiple")
    # A pod is a torus of few axes: ours may have to share one of them.
    how = {"devices": devices, "allow_split_physical_axes": True}
    if slices == 1:
        layout = mesh_utils.create_device_mesh(tuple(sizes.values()), **how)
    else:
        inside = sizes | {"data": sizes["data"] // slices}
        between = dict.fromkeys(sizes, 1) | {"data": slices}
        layout = mesh_utils.create_hybrid_device_mesh(tuple(inside.values()), tuple(between.values()), **how)
    return Mesh(layout, tuple(sizes), axis_types=(AxisType.Explicit,) * len(sizes))


def _slices(devices: Sequence[jax.Device]) -> int:
    """How many TPU slices these are of. GPUs call their nodes slices as well, but any axis may run between nodes."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})  # one slice's compile-only devices have none


def check_divisible(mesh: Mesh, config: RunConfig) -> None:
    """Raises ConfigError, naming the field and the fix, where a sharded size is not a multiple of its axes. Of the mesh
    it reads `shape` alone."""
    model, train = config.model, config.train
    tensor, fsdp, expert, stage, context = (
        mesh.shape[axis] for axis in ("tensor", "fsdp", "expert", "stage", "context"))
    batch, axes = mesh.shape["data"] * fsdp * expert, "mesh.data * mesh.fsdp * mesh.expert"
    if stage > 1:  # microbatches, of which a multiple of the stages
        count = config.compute.pipeline_microbatches
        batch *= stage if count == "auto" else count
        axes += " * mesh.stage" if count == "auto" else " * compute.pipeline_microbatches"
    microbatch = train.global_batch_size // train.grad_accumulation
    if microbatch % batch:
        raise ConfigError(
            f"train.global_batch_size / train.grad_accumulation = {microbatch} is not a multiple of "
            f"{axes} = {batch}: raise the batch to a multiple of {batch * train.grad_accumulation} "
            f"or use fewer devices along these axes"
        )
    parts = context * math.lcm(tensor, 2 if context > 1 else 1)  # of a row; two for each of context (context.py)
    if train.seq_len % parts:
        raise ConfigError(f"train.seq_len={train.seq_len} is not a multiple of {parts}, the parts that mesh.context="
                          f"{context} and mesh.tensor={tensor} make of a row: make it one, or use smaller axes")
    for field, size, axis, ways in (
        ("hidden_dim", model.hidden_dim, "fsdp * mesh.expert * mesh.context", fsdp * expert * context),
        ("num_experts", model.num_experts, "expert", expert),
        ("expert_dim", model.expert_dim, "tensor", tensor),
        ("num_kv_heads", model.num_kv_heads, "tensor", tensor),
        ("mlp_dim", model.mlp_dim, "tensor", tensor),
        ("vocab_size", model.vocab_size, "tensor", tensor),
    ):
        if size % ways:
            raise ConfigError(f"model.{field}={size} is not a multiple of mesh.{axis}={ways}: change either")


def pipeline_told(config: RunConfig, mesh: Mesh) -> str:
    """What a run says of its pipeline; nothing where it has none."""
    from maxlm.parallel.pipeline import Pipeline, bubble_share
    from maxlm.parallel.sharding import BATCH

    stages, ways = mesh.shape["stage"], math.prod(mesh.shape[axis] for axis in BATCH) // mesh.shape["stage"]
    if stages == 1:
        return ""
    pipeline = Pipeline(config.compute.pipeline_microbatches, config.compute.pipeline_repeats)
    count = pipeline.count(config.train.global_batch_size // config.train.grad_accumulation, ways)
    idle = bubble_share(stages, count, pipeline.repeats)
    parts = f" of {pipeline.repeats} parts each" if pipeline.repeats > 1 else ""
    return f"; pipeline: {stages} stages{parts}, {count} microbatches, {idle:.1%} of a step idle"
