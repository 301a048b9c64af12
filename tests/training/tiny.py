"""A tiny model, its batches, and a few training steps, for the tests of this folder."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from maxlm.config import RunConfig
from maxlm.parallel.mesh import make_mesh
from maxlm.parallel.sharding import batch_sharding
from maxlm.schema import from_dict
from maxlm.training.loss import summed_loss
from maxlm.training.state import TrainState, abstract_state, init_state
from maxlm.training.step import StepMetrics, abstract_batch, compile_step

VOCAB, ROWS, LENGTH = 96, 16, 16

DEFAULTS = {
    "model": dict(num_layers=4, hidden_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64, vocab_size=VOCAB,
                  qk_norm=True, layer_pattern=["local", "global"], sliding_window=7, logit_softcap=20.0),
    "train": dict(num_steps=20, global_batch_size=ROWS, seq_len=LENGTH, z_loss=1e-3),
    # A large eps: where a gradient is nearly 0, Adam would blow rounding up into a step of the full rate.
    "optimizer": dict(learning_rate=1e-2, eps=1e-4),
    "schedule": dict(warmup_steps=2),
    "precision": dict(recipe="float32"),
}


def tiny_config(**sections: dict) -> RunConfig:
    merged = {name: dict(fields) for name, fields in DEFAULTS.items()}
    for name, fields in sections.items():
        merged.setdefault(name, {}).update(fields)
    return from_dict(RunConfig, merged)


def host_batch(seed: int) -> dict[str, np.ndarray]:
    """Two documents a row, and one row without any target, so that rows weigh differently."""
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (ROWS, LENGTH + 1))
    cut = 9
    targets = tokens[:, 1:].copy()
    targets[:, cut - 1] = -1
    targets[3] = -1
    segments = np.broadcast_to(np.where(np.arange(LENGTH) < cut, 1, 2), (ROWS, LENGTH))
    positions = np.broadcast_to(np.where(np.arange(LENGTH) < cut, np.arange(LENGTH), np.arange(LENGTH) - cut),
                                (ROWS, LENGTH))
    arrays = {"tokens": tokens[:, :-1], "targets": targets, "segment_ids": segments, "positions": positions}
    return {name: np.ascontiguousarray(a, dtype=np.int32) for name, a in arrays.items()}


def on(mesh, batch):
    return {name: jax.device_put(a, batch_sharding(mesh)) for name, a in batch.items()}


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


class Run(NamedTuple):
    """What a few steps did: state before and after as lists of arrays, losses, the last step's metrics."""

    first: list[np.ndarray]
    losses: list[float]
    last: list[np.ndarray]
    metrics: StepMetrics


def run_steps(config: RunConfig, devices: int, steps: int = 20, start: list[np.ndarray] | None = None) -> Run:
    """A few steps on fake devices, from `start` (the `first` of another run) or a fresh state."""
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        state = init_state(config, mesh) if start is None else placed(start, abstract_state(config, mesh))
        first = leaves(state)
        step = compile_step(config, mesh)
        losses = []
        for index in range(steps):
            state, metrics = step(state, on(mesh, host_batch(index)))
            losses.append(float(metrics.loss))
        return Run(first, losses, leaves(state), metrics)


def placed(arrays: list[np.ndarray], like: TrainState) -> TrainState:
    """A state as `like` says: its structure and shardings, these values."""
    targets, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(
        structure, [jax.device_put(a, t.sharding) for a, t in zip(arrays, targets, strict=True)]
    )


def furthest(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


def loops_of_gradient(config: RunConfig, devices: int, turns: int) -> list[list[jax.core.ShapedArray]]:
    """What each loop of `turns` turns gives in the trace of the loss's gradient: the forward one, what is kept too."""
    mesh = make_mesh(config.mesh, jax.devices()[:devices])

    def loops(jaxpr):
        for equation in jaxpr.eqns:
            inner = [getattr(p, "jaxpr", p) for p in equation.params.values()]
            yield from (found for p in inner if hasattr(p, "eqns") for found in loops(p))
            if equation.primitive.name == "scan" and equation.params["length"] == turns:
                yield [v.aval for v in equation.outvars]

    def loss(params, batch):
        return summed_loss(params, batch, z_loss=0.0, chunks=1)[0].loss

    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss)).trace(abstract_state(config, mesh).params, abstract_batch(config, mesh))
    return list(loops(traced.jaxpr.jaxpr))
