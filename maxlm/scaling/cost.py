"""What a run will cost, before it is paid for: parameters, tokens, FLOPs, seconds, bytes of device memory.

Counts are exact; seconds and bytes are estimates from the config alone, without a compiler. The bytes of llama3_2_1b on
an H200 come out within a tenth of what XLA allots (tests/scaling/test_grid.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from maxlm.config import RunConfig
from maxlm.flops import parameter_count
from maxlm.scaling.grid import Sweep, Trial, flops_per_step

UTILISATION = 0.3  # of a peak, where nobody says what a device reaches; small models reach less
LOGITS_BYTES = 2**31  # of a chunk at most (kernels/cross_entropy.py)
LOGITS_COPIES = 2.5  # logits, their exponentials, their gradient in the compute dtype
SPARE = 0.92  # of a device's memory that a program can have
BYTES = {"float32": 4, "bfloat16": 2, "float8": 1.01, "bf16": 2, "fp8": 2, "fp8_rowwise": 2, "fp8_block": 2}


@dataclass(frozen=True)
class Device:
    """What runs one trial: `flops_per_second` is its peak, or the measured rate of a large matrix product."""

    kind: str
    platform: str
    memory_bytes: int
    flops_per_second: float


@dataclass(frozen=True)
class Cost:
    """Of one trial. `tokens` and `flops` count from step 0; a branch pays for `flops_spent` alone."""

    params: int
    non_embedding_params: int
    tokens: int
    flops: float
    flops_spent: float
    seconds: float
    memory_bytes: float


def cost(trial: Trial, sweep: Sweep, device: Device) -> Cost:
    config = trial.config
    count = parameter_count(config.model)
    steps = config.train.num_steps
    spent = flops_per_step(config) * (steps - trial.from_step)
    rate = sweep.flops_per_second or UTILISATION * device.flops_per_second
    return Cost(
        params=count.total, non_embedding_params=count.non_embedding, tokens=tokens_of(config),
        flops=flops_per_step(config) * steps, flops_spent=spent,
        seconds=sweep.startup_seconds + max(spent / (rate * devices_of(config)),
                                            sweep.step_seconds * (steps - trial.from_step)),
        memory_bytes=memory_bytes(config, reference_attention=device.platform == "cpu"),
    )


def tokens_of(config: RunConfig) -> int:
    return config.train.num_steps * config.train.global_batch_size * config.train.seq_len


def devices_of(config: RunConfig) -> int:
    """Devices that a run asks for; an axis that takes the rest counts as one."""
    mesh = config.mesh
    return mesh.data * mesh.stage * mesh.expert * mesh.context * mesh.tensor * (1 if mesh.fsdp == "rest" else mesh.fsdp)


def memory_bytes(config: RunConfig, *, reference_attention: bool) -> float:
    """Bytes on one device: float32 masters, gradients and moments, weights in the compute dtype, what the layers keep
    for the backward pass, and one chunk of logits. Gradients of layers that are not scanned come when what the layers
    keep goes. `reference_attention` keeps its weights whole, [B, H, T, T]."""
    mesh, train = config.mesh, config.train
    fsdp = 1 if mesh.fsdp == "rest" else mesh.fsdp
    rows = train.global_batch_size / train.grad_accumulation / (mesh.data * mesh.stage * fsdp)
    tokens = rows * train.seq_len
    layers = config.model.num_layers * _layer_values(config, reference_attention) * tokens / mesh.tensor
    layers *= BYTES[config.precision.recipe]
    logits = min(tokens * config.model.vocab_size * 4, LOGITS_BYTES) * LOGITS_COPIES
    shards = mesh.stage * fsdp * mesh.tensor
    gradients = 4 * parameter_count(config.model).total / shards
    if config.compute.layer_unroll == "all" and train.grad_accumulation == 1:
        gradients = max(0.0, gradients - layers)
    return _state_bytes(config) / shards + gradients + layers + logits


def _state_bytes(config: RunConfig) -> float:
    """Of the whole model's state, gradients apart."""
    count, optimizer = parameter_count(config.model), config.optimizer
    moments = BYTES[optimizer.mu_dtype] + BYTES[optimizer.nu_dtype]
    whole = count.total * (4 + moments + (0 if config.precision.recipe == "float32" else 2))
    matrices = count.attention + count.mlp + count.experts
    return whole - (matrices * BYTES[optimizer.nu_dtype] if optimizer.name == "muon" else 0)


def _layer_values(config: RunConfig, reference_attention: bool) -> float:
    """Numbers that a layer keeps for each token, by what remat lets it keep."""
    model, train = config.model, config.train
    width, heads = model.hidden_dim, model.num_heads * model.head_dim
    keys = 2 * model.num_kv_heads * model.head_dim
    # Of experts count the rows a token is copied into, as a dense layer of that width would.
    moe_width = (model.experts_per_token + model.moe.shared_experts) * model.expert_dim
    mlp_dim = moe_width + model.experts_per_token * width if model.num_experts else model.mlp_dim
    into = mlp_dim * (1 if model.activation == "gelu" else 2)
    kept = {
        "full": width,
        "names": width + heads + into,
        "dots": 2 * width + (2 * heads + keys) + into,
        "none": 4 * width + (heads + keys) + (heads + keys / 2) + heads + into + mlp_dim,
    }[config.remat.policy]
    keeps_scores = reference_attention and config.remat.policy == "none"
    return kept + (2 * model.num_heads * train.seq_len if keeps_scores else 0)


def too_large(costs: dict[str, Cost], device: Device, share: int) -> list[str]:
    """One line for each run that does not fit a device which `share` runs use at a time."""
    room = SPARE * device.memory_bytes / share
    return [f"run {name} needs about {cost.memory_bytes / 2**30:.1f} GiB and has {room / 2**30:.1f} GiB"
            for name, cost in costs.items() if cost.memory_bytes > room]


def wall_seconds(costs: dict[str, Cost], sweep: Sweep, jobs: int) -> float:
    """Of all runs, `jobs` at a time: in order, each where there is room first; a branch waits for its trunk."""
    free, ends = [0.0] * jobs, {}
    for trial in sweep.trials:
        place = min(range(jobs), key=free.__getitem__)
        begin = max(free[place], ends.get(trial.branch_of, 0.0))
        free[place] = ends[trial.name] = begin + costs[trial.name].seconds
    return max(free)
