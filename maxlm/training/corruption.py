"""A check for silent corruption: hardware that computes or keeps something wrong without saying so.

Two comparisons, bit for bit, of what should be equal on different devices:
- Stored: parameters and optimizer state are kept once by each replica along `data`. All copies must have one digest.
  An optimizer that went wrong on one replica shows here too, because every replica makes every update itself.
- Computed: the forward and backward pass of the step's batch (one microbatch of it) is made twice, the second time with
  every device group on the rows of the group before it along `data` and `fsdp`. Devices that compute a row together
  (along `tensor` and `context`, and along `expert`, whose rows meet in their experts) are one group. What a row gives
  does not depend on where it is computed, so each row's final hidden states and gradient at the embedding must be the
  same.

What it cannot see: a fault in a weight's gradient, which is summed over all devices before the update, so that every
replica takes the same wrong step (the layers' forward and input gradients run on the same units); a fault that did not
happen while the check ran; with one group only, a fault that happens every time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.checkpoint import named_leaves
from maxlm.config import AXES, RunConfig
from maxlm.hardware import compiler_options
from maxlm.parallel.context import balanced_order
from maxlm.parallel.memory import on_device
from maxlm.parallel.sharding import BATCH
from maxlm.resilience import RunStopped
from maxlm.training.digest import array_digest, row_digests
from maxlm.training.loss import Batch, loss_of_embedded
from maxlm.training.state import TrainState, abstract_state
from maxlm.training.step import abstract_batch, split_rows

_WITHIN = tuple(axis for axis in AXES if axis != "data")  # the axes inside one replica


class CorruptionCheck:
    """Compiled for a run's config and mesh, which must be installed. Every process must call `check` alike."""

    def __init__(self, config: RunConfig, mesh: Mesh):
        self._mesh = mesh
        self._groups = mesh.shape["data"] * mesh.shape["fsdp"]
        platform = mesh.devices.flat[0].platform
        settings = {"out_shardings": NamedSharding(mesh, P()),
                    "compiler_options": compiler_options(platform, deterministic=config.compute.deterministic)}
        state, batch = abstract_state(config, mesh), abstract_batch(config, mesh)
        self._stored = jax.jit(_stored_digests, **settings).lower(state).compile()

        def computed(params: Any, batch: Batch) -> jax.Array:
            part = {name: split_rows(rows, config.train.grad_accumulation)[0] for name, rows in batch.items()}
            return _row_results(params, part, config.train.z_loss, config.compute.loss_chunks)

        self._computed = jax.jit(computed, **settings).lower(state.params, batch).compile()
        self._moved = jax.jit(_to_next_group)

    def check(self, step: int, state: TrainState, batch: Batch) -> None:
        """Compares, and waits for the devices. Raises RunStopped that names the devices which disagree."""
        moved = self._moved(batch)
        results = [self._computed(state.params, rows) for rows in (batch, moved)]
        stored, first, second = jax.device_get([self._stored(state), *results])
        found = self._stored_differently(stored) or self._computed_differently(first, second)
        if not found:
            return
        again = jax.device_get(self._computed(state.params, batch))
        if (again != first).any():
            found += "; and the same devices do not give the same twice: a fault that comes and goes, or a kernel " \
                     "that is not deterministic"
        raise RunStopped(f"silent corruption at step {step}: {found}. The state was not saved; take these devices out "
                         "and start again from the newest checkpoint")

    def _stored_differently(self, digests: np.ndarray) -> str:
        """digests [data, devices of a replica, 2]; the devices that are in a minority of their replicas, in words."""
        odd: list[tuple[int, int]] = []
        for place in range(digests.shape[1]):
            copies = [tuple(copy) for copy in digests[:, place].tolist()]
            most = max(copies.count(copy) for copy in copies)
            if most < len(copies):  # where no copy is in the majority, all are suspect
                right = {copy for copy in copies if copies.count(copy) == most and 2 * most > len(copies)}
                odd += [(replica, place) for replica, copy in enumerate(copies) if copy not in right]
        if not odd:
            return ""
        devices = self._mesh.devices.reshape(digests.shape[0], -1)
        return ("copies of parameters and optimizer state differ along mesh.data: replica "
                + ", ".join(f"{replica} ({_name(devices[replica, place])})" for replica, place in odd))

    def _computed_differently(self, first: np.ndarray, second: np.ndarray) -> str:
        """first, second [rows, digests]: computed in place, and by the next group. The suspects, in words."""
        rows = len(first) // self._groups
        differ = (first != np.roll(second, -rows, axis=0)).any(axis=1).reshape(self._groups, rows).any(axis=1)
        if not differ.any():
            return ""
        pairs = [{group, (group + 1) % self._groups} for group in np.flatnonzero(differ).tolist()]
        suspects = sorted(set.intersection(*pairs) or set.union(*pairs))
        # [groups, devices of a group]: their axes first, in the order in which they number the groups
        devices = np.moveaxis(self._mesh.devices, [AXES.index(axis) for axis in ("data", "fsdp")], [0, 1])
        devices = devices.reshape(self._groups, -1)
        return "the same rows give other bits on another device: " + "; or ".join(
            f"data={group // self._mesh.shape['fsdp']}, fsdp={group % self._mesh.shape['fsdp']} ("
            + ", ".join(map(_name, devices[group])) + ")" for group in suspects
        )


def _stored_digests(state: TrainState) -> jax.Array:
    """The digest of what each device holds, uint32 [data, devices of a replica, 2]."""
    leaves = named_leaves((state.params, on_device(state.opt_state)))

    def local(*shards: jax.Array) -> jax.Array:
        total = sum((array_digest(shard, name) for name, shard in zip(leaves, shards, strict=True)), jnp.uint32(0))
        return total[None, None]

    specs = tuple(jax.typeof(leaf).sharding.spec for leaf in leaves.values())
    # check_vma would take copies along `data` for equal, which is what is in question.
    return jax.shard_map(local, in_specs=specs, out_specs=P("data", _WITHIN), check_vma=False)(*leaves.values())


def _row_results(params: Any, batch: Batch, z_loss: float, chunks: int | str) -> jax.Array:
    """Digests of each row's hidden states and of its gradient at the embedding, uint32 [B, 4]."""

    batch = balanced_order(batch)

    def objective(x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        sums, _, hidden_BTD = loss_of_embedded(params, x_BTD, batch, z_loss=z_loss, chunks=chunks)
        return sums.loss, hidden_BTD

    (_, hidden_BTD), dx_BTD = jax.value_and_grad(objective, has_aux=True)(params.embed(batch["tokens"]))
    return jnp.concatenate([row_digests(hidden_BTD), row_digests(dx_BTD)], axis=1)


def _to_next_group(batch: Batch) -> Batch:
    """Each group's rows on the group after it."""

    def local(rows: Batch) -> Batch:
        parts, together = jax.lax.axis_size(BATCH), jax.lax.axis_size("expert")  # the last of BATCH: neighbours
        return jax.lax.ppermute(rows, BATCH, [(part, (part + together) % parts) for part in range(parts)])

    return jax.shard_map(local, in_specs=P(BATCH, "context"), out_specs=P(BATCH, "context"))(batch)


def _name(device: jax.Device) -> str:
    return f"device {device.id} of process {device.process_index}"
