"""Held-out evaluation: loss in nats a token, perplexity, and bits per byte of the source text."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.config import RunConfig
from maxlm.hardware import compiler_options
from maxlm.model import Transformer
from maxlm.parallel.sharding import BATCH, batch_sharding
from maxlm.training.loss import Batch, summed_loss, token_count


class Evaluation(NamedTuple):
    """Sums over held-out rows: negative log likelihood in nats, tokens predicted, bytes of text they stand for.
    Where there are no such rows, `loss` and `bits_per_byte` are NaN."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


QUEUED = 2  # batches the device has ahead of it


def make_evaluator(config: RunConfig, mesh: Mesh) -> Callable[..., Evaluation | None]:
    """A function (params, held-out data, this process's rows) -> Evaluation over `eval.num_batches` batches (0: all).
    A fourth argument is asked between batches whether to stop; the result is then None. `mesh` must be installed."""
    objective = functools.partial(summed_loss, z_loss=0.0, chunks=config.compute.loss_chunks)
    options = compiler_options(mesh.devices.flat[0].platform)

    @functools.partial(jax.jit, compiler_options=options)
    def sums(params: Transformer, batch: Batch, bytes_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return objective(params, batch)[0].nll, token_count(batch), jnp.sum(bytes_B)

    def evaluate(params: Transformer, heldout: Any, rows: Sequence[int],
                 stopped: Callable[[], bool] = lambda: False) -> Evaluation | None:
        count = min(heldout.num_batches, config.eval.num_batches or heldout.num_batches)
        rows_of = NamedSharding(mesh, P(BATCH))
        parts = []
        for index in range(count):
            jax.block_until_ready(parts[-QUEUED:][:1])
            if stopped():
                return None
            batch = heldout.batch(index, rows)
            bytes_B = jax.make_array_from_process_local_data(rows_of, batch["bytes"])
            parts.append(sums(params, to_device(batch, mesh), bytes_B))
        sums_of_batches = jax.device_get(parts)
        nats = math.fsum(float(nll) for nll, _, _ in sums_of_batches)
        return Evaluation(nats, sum(int(n) for _, n, _ in sums_of_batches), sum(int(n) for _, _, n in sums_of_batches))

    return evaluate


def to_device(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """This process's rows of a global batch, whole, as global arrays, [B, T], laid out by `batch_sharding`."""
    sharding, (rows, length) = batch_sharding(mesh), batch["tokens"].shape
    parts = math.prod(mesh.shape[axis] for axis in BATCH)
    shape = (rows * parts // len(local_rows(mesh, parts)), length)
    return {
        name: jax.make_array_from_process_local_data(sharding, batch[name], shape)
        for name in ("tokens", "targets", "segment_ids", "positions")
    }


def local_rows(mesh: Mesh, global_batch_size: int) -> list[int]:
    """The rows of a global batch that this process's devices hold, in order. On a pod they need not be neighbours:
    the mesh follows the torus, not the numbering of hosts."""
    held = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((global_batch_size,)).values()
    return sorted({row for rows, in held for row in range(global_batch_size)[rows]})
