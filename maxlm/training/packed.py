"""Packed mode: many small runs of one shape in one program.

Runs that differ in seed, learning rate and data order alone have the same compiled step, so `vmap` over their states,
batches and rates trains them all at once: one compilation, and products large enough for an accelerator that a single
small model would leave idle. Each run is the one that `train` would make by itself, up to the rounding of products that
are batched differently. One device: no mesh is installed, so every array lives whole on it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config import RunConfig
from maxlm.config.packing import MAY_DIFFER, on_one_device, packing_difference
from maxlm.hardware import compiler_options
from maxlm.schema import require
from maxlm.training.loss import Batch, summed_loss, token_count
from maxlm.training.schedule import make_schedule
from maxlm.training.state import TrainState, build_model, optimizer_of
from maxlm.training.step import StepMetrics, train_step


class PackedRuns:
    """The runs of `configs` on one device. Arrays of states, batches and metrics lead with a dim of one entry a run."""

    def __init__(self, configs: Sequence[RunConfig], device: jax.Device | None = None):
        """Raises ConfigError where the configs are not of one program."""
        check_packable(configs)
        self.config, self.count = configs[0], len(configs)
        self.device = device or jax.devices()[0]
        self._options = compiler_options(self.device.platform, deterministic=self.config.compute.deterministic)
        seeds = np.array([config.train.seed for config in configs], np.uint32)
        peaks = np.array([config.optimizer.learning_rate for config in configs], np.float32)
        self._seeds, self._peaks = jax.device_put((seeds, peaks), self.device)
        self._step = jax.jit(jax.vmap(self._one), donate_argnums=0, compiler_options=self._options)
        self._losses = jax.jit(jax.vmap(self._summed), compiler_options=self._options)

    def init(self) -> TrainState:
        """The fresh states of all runs, as each would make it alone."""
        return jax.jit(jax.vmap(self._fresh), compiler_options=self._options)(self._seeds, self._peaks)

    def step(self, states: TrainState, batches: Batch) -> tuple[TrainState, StepMetrics]:
        """One step of every run; `states` are consumed. `batches`: int32 [runs, B, T] each."""
        return self._step(states, batches, self._peaks, self._seeds)

    def losses(self, states: TrainState, batches: Batch) -> tuple[np.ndarray, np.ndarray]:
        """(summed negative log likelihood in nats, predicted tokens) [runs] of held-out batches."""
        return jax.device_get(self._losses(states.params, batches))

    def _fresh(self, seed: jax.Array, peak: jax.Array) -> TrainState:
        params = build_model(self.config, jax.random.key(seed), self.device)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer_of(self.config, peak).init(params))

    def _one(self, state: TrainState, batch: Batch, peak: jax.Array,
             seed: jax.Array) -> tuple[TrainState, StepMetrics]:
        config = self.config
        return train_step(
            state, batch, optimizer=optimizer_of(config, peak, seed),
            schedule=make_schedule(config.schedule, peak, config.train.num_steps),
            microbatches=config.train.grad_accumulation, z_loss=config.train.z_loss, chunks=config.compute.loss_chunks,
        )

    def _summed(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        sums, _ = summed_loss(params, batch, z_loss=0.0, chunks=self.config.compute.loss_chunks)
        return sums.nll, token_count(batch)


def check_packable(configs: Sequence[RunConfig]) -> None:
    """Raises ConfigError, naming the field, where the configs differ in more than MAY_DIFFER, or need a mesh."""
    require(len(configs) > 0, "there is no run to pack")
    for config in configs[1:]:
        other = packing_difference(configs[0], config)
        require(not other, f"packed runs may differ in {' and '.join(MAY_DIFFER)} alone, not in {'; '.join(other[:3])}")
    require(configs[0].model.num_experts == 0, "packed runs have no experts: set model.num_experts=0, or do not pack")
    require(on_one_device(configs[0]), "packed runs use one device: leave every axis of mesh at 1")


def stacked(batches: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One batch of each run, [runs, B, T], as `PackedRuns.step` takes them."""
    return {name: np.stack([batch[name] for batch in batches])
            for name in ("tokens", "targets", "segment_ids", "positions")}


@functools.partial(jax.jit, static_argnums=1)
def run_of(states: TrainState, number: int) -> TrainState:
    """The state of one run, as it would be alone."""
    return jax.tree.map(lambda a: a[number], states)
