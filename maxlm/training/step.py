"""The training step: (state, batch) -> (state, metrics). Pure; the loop jits it and does everything else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.config import RunConfig
from maxlm.hardware import compiler_options
from maxlm.model.moe.balance import balanced
from maxlm.model.moe.load import Load
from maxlm.parallel.memory import any_on_host, like, on_device
from maxlm.parallel.sharding import ACTIVATION, batch_sharding, has_mesh, spec
from maxlm.training.digest import tree_digest
from maxlm.training.loss import Batch, real_tokens, router_loss, summed_loss, token_count
from maxlm.training.optimizer import updates_made
from maxlm.training.schedule import make_schedule
from maxlm.training.state import TrainState, abstract_state, optimizer_of


class StepMetrics(NamedTuple):
    """Scalars of one step: mean loss in nats a token, norm of the whole gradient before clipping, the learning rate it
    used, the tokens that had a target, 1 where the update was skipped, else 0; and a digest of the batch as the device
    saw it, uint32 [2]. `load`: what the routers did, [sparse layers, ...], or None. The update's norm is not among
    them: to sum it up costs a second pass over parameters and update (docs/LOG.md).
    """

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    tokens: jax.Array
    skipped: jax.Array
    batch_digest: jax.Array
    load: Load | None


def train_step(state: TrainState, batch: Batch, *, optimizer: optax.GradientTransformation,
               schedule: Callable[[jax.Array], jax.Array], microbatches: int, z_loss: float, chunks: int | str,
               seed: int | None = None) -> tuple[TrainState, StepMetrics]:
    """One update. The loss is the mean over the whole batch's tokens, however they fall into microbatches.

    Where the loss or the gradient's norm is not finite the update is skipped: parameters and optimizer state, the
    count that drives the learning rate included, keep their bits, and `step` advances. Each new value is selected where
    it is made, inside the optimizer's own pass over the state: no host is asked and nothing is copied.
    seed: of what is random in a step, together with its number; None: nothing is.
    """
    tokens, real = token_count(batch), real_tokens(batch)

    def objective(params: Any, part: Batch, key: jax.Array | None) -> tuple[jax.Array, Any]:
        sums, load = summed_loss(params, part, z_loss=z_loss, chunks=chunks, key=key)
        load = None if load is None else load.weighted(real_tokens(part) / jnp.maximum(real, 1))
        loss = sums.loss / jnp.maximum(tokens, 1) + router_loss(load, params.config.moe)
        return loss, (sums.nll / jnp.maximum(tokens, 1), load)

    gradient = jax.value_and_grad(objective, has_aux=True)
    key = None if seed is None else jax.random.fold_in(jax.random.key(seed), state.step)
    if microbatches == 1:
        (_, (loss, load)), grads = gradient(state.params, batch, key)
    else:
        (loss, load), grads = _accumulate(gradient, state.params, batch, key, microbatches)
    grad_norm = optax.tree.norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    params, opt_state = _updated(optimizer, grads, state, good)
    if load is not None:
        params = balanced(params, load.chosen_E, good)
    metrics = StepMetrics(
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=jnp.asarray(schedule(updates_made(state.opt_state)), jnp.float32),
        tokens=tokens,
        skipped=(~good).astype(jnp.int32),
        batch_digest=tree_digest(batch),
        load=load,
    )
    return TrainState(state.step + 1, params, opt_state), metrics


def _updated(optimizer: optax.GradientTransformation, grads: Any, state: TrainState, good: jax.Array) -> Any:
    """(parameters, optimizer state) after an update, or, where the gradient is not `good`, as they were.

    A state on the host is fetched inside a conditional: elsewhere the compiler would fetch it ahead, while
    activations still fill the memory."""

    def update(opt_state: Any) -> Any:
        updates, new = optimizer.update(grads, opt_state, state.params)
        return optax.apply_updates(state.params, updates), new

    before = (state.params, state.opt_state)
    if any_on_host(state.opt_state):
        return jax.lax.cond(good, lambda: like(before, update(on_device(state.opt_state))), lambda: before)
    return jax.tree.map(
        lambda new, old: jax.lax.select(good, new, old), update(state.opt_state), before)


def _accumulate(gradient: Callable, params: Any, batch: Batch, key: jax.Array | None,
                microbatches: int) -> tuple[Any, Any]:
    """Sums loss, load and gradients over equal slices of the batch, one at a time."""
    parts = ({name: split_rows(rows, microbatches) for name, rows in batch.items()},
             None if key is None else jax.random.split(key, microbatches))

    def add(carry: Any, part: tuple[Batch, jax.Array | None]) -> tuple[Any, None]:
        (_, figures), grads = gradient(params, *part)
        return jax.tree.map(jnp.add, carry, (figures, grads)), None

    figures = jax.eval_shape(lambda: gradient(params, *jax.tree.map(lambda rows: rows[0], parts))[0][1])
    start = (jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), figures), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, start, parts)[0]


def split_rows(rows_BT: jax.Array, microbatches: int) -> jax.Array:
    """[B, T] -> [microbatches, B / microbatches, T], each slice taking rows from every device so that none move."""
    batch, length = rows_BT.shape
    size = batch // microbatches
    if not has_mesh():
        return rows_BT.reshape(size, microbatches, length).swapaxes(0, 1)
    split = rows_BT.reshape(size, microbatches, length, out_sharding=spec(("batch", None, "length"), ACTIVATION))
    return split.swapaxes(0, 1)


def compile_step(config: RunConfig, mesh: Mesh) -> jax.stages.Compiled:
    """The run's step, compiled ahead for `mesh` (which must be installed). It consumes the state it is given.

    Call it with (state, batch); arrays have the shardings of `abstract_state` and `batch_sharding`.
    """
    return lower_step(config, mesh).compile()


def lower_step(config: RunConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The run's step, traced and partitioned for `mesh` (which must be installed), not compiled yet."""
    platform = mesh.devices.flat[0].platform
    step = functools.partial(
        train_step,
        optimizer=optimizer_of(config),
        schedule=make_schedule(config.schedule, config.optimizer.learning_rate, config.train.num_steps),
        microbatches=config.train.grad_accumulation,
        z_loss=config.train.z_loss,
        chunks=config.compute.loss_chunks,
        seed=config.train.seed if config.model.moe.jitter else None,
    )
    state = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda a: a.sharding, state)
    jitted = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, NamedSharding(mesh, P())),
        compiler_options=compiler_options(platform, deterministic=config.compute.deterministic),
    )
    return jitted.lower(state, abstract_batch(config, mesh))


def abstract_batch(config: RunConfig, mesh: Mesh) -> Batch:
    """Shapes and shardings of one global batch."""
    shape = (config.train.global_batch_size, config.train.seq_len)
    array = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    return dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), array)
