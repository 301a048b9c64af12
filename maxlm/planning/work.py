"""What a training step does on one device, counted from the config: products and memory passes by part of the model.

No compiler is asked. FLOPs are those of flops.py's convention (causal attention, two a multiply-add); bytes are the
passes over main memory that XLA's fusions make of what stands between the products, read off the layers' source: they
are counted in numbers a token, at 2 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from maxlm.config import ModelConfig, RunConfig
from maxlm.flops import mean_visible_keys, parameter_count

Kind = Literal["gemm", "fp8", "attention", "grouped", "grouped_fp8", "memory"]
HALF, FULL = 2, 4  # bytes of activations and of masters
LOGITS_PASSES = 4.5 * FULL  # bytes a logit: written, read for its peak, its sum and its gradient, which is in 16 bits
# Bytes a parameter and step: AdamW reads and writes master and moments, and reads the gradient, which has been read
# once before, for its norm, at two thirds of copy speed: the kernels of OLMoE's layers (docs/LOG.md, 2026-11-26).
UPDATE_BYTES, GRADIENT_PASSES = 24, 2.5
CAST_BYTES = FULL + HALF
FP8_BYTES = 7  # a number: read for its maximum, read again, written in 8 bits, turned (read and written)
FP8_WEIGHT_BYTES = 11


@dataclass(frozen=True)
class Part:
    """A kind of work of one part of the step: forward and backward FLOPs and bytes of one device."""

    name: str
    kind: Kind
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0

    def times(self, count: float) -> Part:
        return replace(self, forward_flops=count * self.forward_flops, backward_flops=count * self.backward_flops,
                       forward_bytes=count * self.forward_bytes, backward_bytes=count * self.backward_bytes)


@dataclass(frozen=True)
class Share:
    """What one device has of a step: `tokens` of one microbatch, and the sizes of the axes that split the model."""

    tokens: float
    fsdp: int  # and context, which splits what fsdp splits
    expert: int
    tensor: int
    microbatches: int

    @property
    def shards(self) -> int:
        """Devices that what every token multiplies is stored over."""
        return self.fsdp * self.expert * self.tensor


def share_of(config: RunConfig, axes: Mapping[str, int]) -> Share:
    train = config.train
    rows = train.global_batch_size / train.grad_accumulation / (axes["data"] * axes["fsdp"] * axes["expert"])
    return Share(rows * train.seq_len / axes["context"], axes["fsdp"] * axes["context"], axes["expert"], axes["tensor"],
                 train.grad_accumulation)


def layer_parts(config: RunConfig, share: Share, *, sparse: bool, window: int | None) -> list[Part]:
    """Of one layer and one microbatch."""
    model, tokens, tensor = config.model, share.tokens, share.tensor
    width, heads = model.hidden_dim, model.num_heads * model.head_dim
    keys = 2 * model.num_kv_heads * model.head_dim
    projections = 2.0 * tokens * width * (2 * heads + keys) / tensor
    visible = mean_visible_keys(config.train.seq_len, window or config.train.seq_len)
    attention = 4.0 * tokens * heads * visible / tensor
    fp8 = config.precision.recipe in ("fp8", "fp8_rowwise")  # blocks are multiplied in bfloat16
    site = lambda name: "fp8" if fp8 and name in config.precision.fp8_sites else "gemm"  # noqa: E731
    parts = [
        Part("attention projections", site("attention"), projections, 2 * projections),
        Part("attention", "attention", attention, 2.5 * attention),
        # Norms and residual sums read and write the stream, whose tokens `tensor` splits; rotary and the split
        # pass over queries, keys and values.
        Part("norms, residual, rotary", "memory",
             forward_bytes=tokens * HALF * (6 * width / tensor + 2 * (heads + keys) / tensor),
             backward_bytes=tokens * HALF * (8 * width / tensor + 2 * (heads + keys) / tensor)),
    ]
    if sparse:
        parts += _experts(model, share, site("experts") == "fp8")
    else:
        parts += _mlp(model, tokens, tensor, model.mlp_dim, site("mlp"))
    if sparse and model.moe.shared_experts:
        parts += _mlp(model, tokens, tensor, model.moe.shared_experts * model.expert_dim, site("mlp"))
    return parts + (_quantisation(config, share, sparse) if fp8 else [])


def _mlp(model: ModelConfig, tokens: float, tensor: int, units: int, kind: Kind) -> list[Part]:
    matrices = 2 if model.activation == "gelu" else 3
    products = 2.0 * tokens * model.hidden_dim * units * matrices / tensor
    passes = tokens * HALF * units / tensor
    return [Part("mlp", kind, products, 2 * products),
            Part("mlp activation", "memory", forward_bytes=matrices * passes, backward_bytes=2 * matrices * passes)]


def _experts(model: ModelConfig, share: Share, fp8: bool) -> list[Part]:
    """Rows are tokens times the experts that each takes, at an even load. Forward, rows are spread (read and written),
    gate and up become one hidden unit, results are collected; backward, rows and hidden units are made again, gradients
    spread, units' gradients made of them, and rows' collected. In 8 bits what is spread has half the bytes, and hidden
    units and their gradients are read once more, for their largest. (Hopper's bf16 kernels make units inside of
    products, which hides some of their passes.)"""
    rows, width, units = share.tokens * model.experts_per_token, model.hidden_dim, model.expert_dim / share.tensor
    products = 6.0 * rows * width * units
    router = 2.0 * share.tokens * width * model.num_experts
    forward, backward = (2 * width + 4.5 * units, 4 * width + 10.5 * units) if fp8 else (
        3 * width + 3 * units, 6 * width + 6 * units)
    return [
        Part("experts", "grouped_fp8" if fp8 else "grouped", products, 2 * products),
        Part("router", "gemm", 3 * router, 6 * router),  # float32 in three passes of bfloat16
        Part("spread, activation, collect", "memory", forward_bytes=HALF * rows * forward,
             backward_bytes=HALF * rows * backward),
    ]


def _quantisation(config: RunConfig, share: Share, sparse: bool) -> list[Part]:
    model, sites = config.model, config.precision.fp8_sites
    width, heads = model.hidden_dim, model.num_heads * model.head_dim
    keys = 2 * model.num_kv_heads * model.head_dim
    into = units = weights = 0.0
    if "attention" in sites:
        into, units = width + heads, width + heads + keys
        weights = width * (2 * heads + keys)
    if "mlp" in sites and not sparse:
        matrices = 2 if model.activation == "gelu" else 3
        into, units = into + width + model.mlp_dim, units + width + (matrices - 1) * model.mlp_dim
        weights += matrices * width * model.mlp_dim
    passes = share.tokens * FP8_BYTES / share.tensor
    return [Part("quantisation", "memory", forward_bytes=passes * into + FP8_WEIGHT_BYTES * weights / share.shards,
                 backward_bytes=passes * units)]


def head_parts(config: RunConfig, share: Share) -> list[Part]:
    """The output head and its loss: three products, forward and gradients at once, of one microbatch."""
    model = config.model
    logits = share.tokens * model.vocab_size / share.tensor
    product = 2.0 * logits * model.hidden_dim
    return [Part("head", "gemm", product, 2 * product), Part("logits", "memory", forward_bytes=LOGITS_PASSES * logits)]


def update_parts(config: RunConfig, share: Share) -> list[Part]:
    """What is done with parameters: cast once a microbatch, accumulated over several, updated once a step."""
    stored = stored_parameters(config, share)
    accumulated = share.microbatches > 1
    gradient = FULL if accumulated or config.precision.recipe == "float32" else HALF
    update = UPDATE_BYTES + GRADIENT_PASSES * gradient + (3 * FULL * share.microbatches if accumulated else 0)
    return [Part("casts", "memory", forward_bytes=CAST_BYTES * stored * share.microbatches),
            Part("update", "memory", forward_bytes=update * stored)]


def stored_parameters(config: RunConfig, share: Share) -> float:
    """Parameters that one device holds; norms' gains are whole everywhere."""
    count = parameter_count(config.model)
    return (count.total - count.norms) / share.shards + count.norms


def layers_of(model: ModelConfig) -> list[tuple[int, bool, int | None]]:
    """(how many, sparse, window) of each kind of layer."""
    pattern, kinds = model.layer_pattern, []
    for first, last, sparse in ((0, model.moe.dense_layers if model.num_experts else model.num_layers, False),
                                (model.moe.dense_layers, model.num_layers, True)):
        if sparse and not model.num_experts:
            continue
        for kind in sorted(set(pattern)):
            count = (last - first) // len(pattern) * pattern.count(kind)
            if count:
                kinds.append((count, sparse, model.sliding_window if kind == "local" else None))
    return kinds
