"""What training carries from step to step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from maxlm.config import RunConfig
from maxlm.hardware import chip_of
from maxlm.kernels.attention import choose_across, choose_attention
from maxlm.kernels.grouped_matmul import choose_grouped_matmul
from maxlm.model import Transformer, make_transformer
from maxlm.model.block import Kernels
from maxlm.model.moe.exchange import choose_exchange
from maxlm.model.parametrization import multipliers
from maxlm.numerics import Fp8, numerics_of
from maxlm.parallel.memory import has_host_memory, on_host
from maxlm.parallel.pipeline import Pipeline
from maxlm.parallel.sharding import stored
from maxlm.schema import ConfigError
from maxlm.training.optimizer import make_optimizer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """`step` counts finished steps (int32 scalar); `params` are float32 masters; `opt_state` is Optax's."""

    step: jax.Array
    params: Transformer
    opt_state: Any


def kernels_of(config: RunConfig, device: jax.Device) -> tuple[Kernels, str]:
    """(kernels, why, in a line): those of a run on devices like `device`, which need not be attached."""
    model, compute, numerics = config.model, config.compute, numerics_of(config.precision, device.platform)
    where = {"platform": device.platform, "compute_dtype": numerics.dtype.name,
             "compute_capability": getattr(device, "compute_capability", None)}
    attention, reason = choose_attention(compute.attention, head_dim=model.head_dim, seq_len=config.train.seq_len,
                                         softcap=model.attention_softcap, deterministic=compute.deterministic, **where)
    if (compute.offload_optimizer or config.remat.policy.endswith("offload")) and not has_host_memory(device):
        raise ConfigError(f"{device.device_kind} cannot read its host's memory: set compute.offload_optimizer=false, "
                          f"remat.policy={config.remat.policy.removesuffix('_offload')!r}")
    across = "ring"
    if config.mesh.context > 1:
        across, attention, reason = choose_across(
            compute.context_attention, attention, reason, seq_len=config.train.seq_len, context=config.mesh.context,
            kv_heads=model.num_kv_heads // config.mesh.tensor, named=compute.attention != "auto")
    told = f"attention: {attention}, {reason}{_fp8_units(config, device)}"
    if not model.num_experts:
        return Kernels(attention, across=across), told
    grouped, reason = choose_grouped_matmul(compute.grouped_matmul, width=model.hidden_dim,
                                            expert_dim=model.expert_dim // config.mesh.tensor,
                                            eight_bit=isinstance(numerics.experts, Fp8), **where)
    exchange = choose_exchange(compute.expert_exchange, device.platform, config.mesh.expert, model.experts_per_token)
    exchanged = f"{exchange} in 8 bits" if numerics.fp8_exchange else exchange
    ways = f"; {exchanged} between {config.mesh.expert} devices" if config.mesh.expert > 1 else ""
    return Kernels(attention, grouped, exchange, across), f"{told}; experts: {grouped}, {reason}{ways}"


def _fp8_units(config: RunConfig, device: jax.Device) -> str:
    """What 8-bit products run on, where the run has any."""
    if not config.precision.recipe.startswith("fp8"):
        return ""
    chip = chip_of(device.device_kind)
    if chip is None or chip.peak("fp8") is None:
        return f"; {config.precision.recipe} products are emulated: no FP8 units are known of {device.device_kind}"
    slow = chip.peak("fp8") <= chip.peak("bf16") or config.precision.recipe == "fp8_block"
    return f"; {config.precision.recipe} products" + (f", which {chip.name} makes no faster than bf16" if slow else "")


def build_model(config: RunConfig, key: jax.Array, device: jax.Device) -> Transformer:
    """The model of a run with the kernels and dtype for devices like `device`."""
    return make_transformer(
        config.model, key, kernels=kernels_of(config, device)[0], remat=config.remat.policy,
        numerics=numerics_of(config.precision, device.platform), unroll=config.compute.layer_unroll,
        pipeline=Pipeline(config.compute.pipeline_microbatches, config.compute.pipeline_repeats),
    )


def optimizer_of(config: RunConfig, peak: jax.Array | None = None,
                 seed: jax.Array | None = None) -> optax.GradientTransformation:
    """peak, seed: a learning rate and a seed in place of the config's, which may be traced."""
    return make_optimizer(config.optimizer, config.schedule, config.train.num_steps, peak=peak,
                          scale=multipliers(config.model), seed=config.train.seed if seed is None else seed)


def abstract_state(config: RunConfig, mesh: Mesh) -> TrainState:
    """The state's shapes, dtypes and storage shardings, with nothing allocated."""
    shapes = jax.eval_shape(lambda: _fresh(config, mesh))
    shardings = _placement(config, shapes, mesh)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)


def init_state(config: RunConfig, mesh: Mesh) -> TrainState:
    """A fresh state from `train.seed`, made in place on its devices: the same bits on any mesh."""
    shapes = jax.eval_shape(lambda: _fresh(config, mesh))
    return jax.jit(lambda: _fresh(config, mesh), out_shardings=_placement(config, shapes, mesh))()


def _placement(config: RunConfig, shapes: TrainState, mesh: Mesh) -> TrainState:
    """The sharding of each array of the state."""
    shardings = stored(shapes, mesh)
    return replace(shardings, opt_state=on_host(shardings.opt_state)) if config.compute.offload_optimizer else shardings


def _fresh(config: RunConfig, mesh: Mesh) -> TrainState:
    params = build_model(config, jax.random.key(config.train.seed), mesh.devices.flat[0])
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer_of(config).init(params))
