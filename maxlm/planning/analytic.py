"""A step's time, memory and traffic from the config alone, in milliseconds: what `maxlm plan` ranks meshes by before it
compiles any, and what benchmarks/roofline_check.py predicts of GPUs. docs/PODS.md says how far it can be trusted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from maxlm.config import RunConfig
from maxlm.flops import parameter_count, training_flops_per_token
from maxlm.hardware import Chip
from maxlm.model.moe.exchange import choose_exchange
from maxlm.planning.rates import Rates, rates_of
from maxlm.planning.work import (
    FULL,
    HALF,
    Part,
    Share,
    head_parts,
    layer_parts,
    layers_of,
    share_of,
    stored_parameters,
    update_parts,
)
from maxlm.training.throughput import ARITHMETIC

LOGITS_BYTES, LOGITS_COPIES = 2**31, 2.5  # a chunk at most (kernels/cross_entropy.py); logits, exponentials, gradient
# A scan without remat keeps every intermediate that the backward pass could use, float32 ones too: 2.7 times what the
# unrolled layers keep of llama3_70b, 2.1 times of mixtral_8x7b (compiled for v5p; docs/LOG.md, 2026-11-25).
SCAN_KEEPS = 2.5
MOMENT_BYTES = {"float32": 4, "bfloat16": 2, "float8": 1.01}
# Of a gather's or scatter's time, the part that shows. TPUs: read from the schedules of compiled steps, where v5e alone
# gathers beside its products (docs/LOG.md, 2026-11-25); GPUs: the latency-hiding scheduler runs most of it so.
EXPOSED = {"TPU v5e": 0.8}
EXPOSED_TPU, EXPOSED_GPU = 1.0, 0.25
# Where fsdp and expert cover a whole slice, gradients are summed whole there and then cut: twice a scatter's bytes; on
# v4, v5p and TPU7x gathers are sums of padded buffers as well. Seen on 64 devices and more, not on 4.
WHOLE_SLICE_DEVICES = 16
WHOLE_SLICE_GRADIENTS = ("TPU v4", "TPU v5p", "TPU v6e", "TPU7x")
WHOLE_SLICE_GATHERS = ("TPU v4", "TPU v5p", "TPU7x")


@dataclass(frozen=True)
class Estimate:
    """Of one step on one chip. `kinds`: seconds by kind of work; `wire_bytes`: by mesh axis, what a device sends."""

    seconds: float
    memory_bytes: float
    memory_by_kind: Mapping[str, float]
    kinds: Mapping[str, float]
    wire_bytes: Mapping[str, float]
    exposed_seconds: float
    mfu: float | None  # as a run reports it: training/throughput.py
    tokens_per_second_per_chip: float


def estimate(config: RunConfig, chip: Chip, axes: Mapping[str, int], links: Mapping[str, float] | None = None,
             *, dcn_slices: int = 1) -> Estimate:
    """axes: the mesh. links: of a chip's links those that each axis keeps busy; all of them where it is left out.
    dcn_slices: of `data`, how many are slices that only the network joins. Sizes are of devices, whose rates are a
    chip's divided by its devices."""
    rates, share = rates_of(chip, config.model.head_dim), share_of(config, axes)
    kinds = _seconds_by_kind(config, share, rates)
    kinds = {kind: seconds * chip.devices_per_chip for kind, seconds in kinds.items()}
    wire = _wire_bytes(config, axes, share, chip)
    hidden = EXPOSED_TPU if chip.name.startswith("TPU") else EXPOSED_GPU
    exposed = 0.0
    for axis, moved in wire.items():
        shown = EXPOSED.get(chip.name, hidden) if axis in ("fsdp", "data") else 1.0
        exposed += shown * _wire_seconds(axis, moved, chip, rates, links, dcn_slices)
    memory = _memory(config, share, axes)
    seconds = sum(kinds.values()) + exposed
    devices = math.prod(axes.values())
    tokens = config.train.global_batch_size * config.train.seq_len
    chips = devices / chip.devices_per_chip
    peak = chip.peak(ARITHMETIC[config.precision.recipe])
    useful = training_flops_per_token(config.model, config.train.seq_len) * tokens
    return Estimate(seconds, sum(memory.values()) * chip.devices_per_chip, memory, kinds, wire, exposed,
                    useful / seconds / chips / peak if peak else None, tokens / seconds / chips)


def _seconds_by_kind(config: RunConfig, share: Share, rates: Rates) -> dict[str, float]:
    seconds: dict[str, float] = {}
    passes = rates.scan_passes if config.compute.layer_unroll != "all" else 0.0
    for count, sparse, window in layers_of(config.model):
        for part in layer_parts(config, share, sparse=sparse, window=window):
            taken = _forward(part, rates) * (1 + _again(config.remat.policy, part)) + _backward(part, rates)
            seconds[part.kind] = seconds.get(part.kind, 0.0) + count * share.microbatches * taken
        kept = HALF * share.tokens * _kept_numbers(config, sparse, share)
        seconds["memory"] += count * share.microbatches * passes * kept / rates.memory
    for part in head_parts(config, share):
        taken = share.microbatches * (_forward(part, rates) + _backward(part, rates))
        seconds[part.kind] = seconds.get(part.kind, 0.0) + taken
    for part in update_parts(config, share):
        seconds[part.kind] = seconds.get(part.kind, 0.0) + _forward(part, rates)
    return seconds


def _again(policy: str, part: Part) -> float:
    """Of a part's forward work, what the backward pass does again."""
    if policy == "none":
        return 0.0
    policy = policy.removesuffix("_offload")
    if policy == "full":
        return 1.0
    if policy == "dots":
        return 1.0 if part.kind == "memory" or part.name == "router" else 0.0
    return {"attention": 0.0, "mlp": 0.0, "experts": 1 / 3}.get(part.name, 1.0)  # 'names': gate, up and attention


def _rate(part: Part, rates: Rates, backward: bool) -> float:
    return {"gemm": rates.gemm, "fp8": rates.fp8, "attention": rates.attention[backward],
            "grouped": rates.grouped[backward], "grouped_fp8": rates.grouped_fp8[backward]}.get(part.kind, rates.gemm)


def _forward(part: Part, rates: Rates) -> float:
    return part.forward_flops / _rate(part, rates, False) + part.forward_bytes / rates.memory


def _backward(part: Part, rates: Rates) -> float:
    return part.backward_flops / _rate(part, rates, True) + part.backward_bytes / rates.memory


def _wire_bytes(config: RunConfig, axes: Mapping[str, int], share: Share, chip: Chip) -> dict[str, float]:
    """What a device sends in a step, by mesh axis, were every collective done in a ring."""
    model, count = config.model, parameter_count(config.model)
    part = lambda ways: (ways - 1) / ways  # noqa: E731
    whole = (count.total - count.experts) / share.tensor
    experts = count.experts / share.tensor / share.expert
    ways = share.fsdp * share.expert
    alone = WHOLE_SLICE_DEVICES < ways == math.prod(axes.values()) // axes["data"]
    passes = 1 if config.remat.policy == "none" else 2  # gathers forward, and again
    passes *= 2 if alone and chip.name in WHOLE_SLICE_GATHERS else 1
    passes += 2 if alone and chip.name in WHOLE_SLICE_GRADIENTS else 1
    moved: dict[str, float] = {}
    if ways > 1:  # weights gathered in 16 bits, gradients scattered in 16; the vocabulary's in float32
        gathered = HALF * (whole * part(ways) + experts * part(share.fsdp))
        tables = (FULL - HALF) * 2 * model.vocab_size * model.hidden_dim / share.tensor * part(ways)
        moved["fsdp"] = share.microbatches * (passes * gathered + tables)
    if axes["data"] > 1:  # what each device holds of the gradients, once a microbatch
        held = (whole / ways + experts / share.fsdp)
        moved["data"] = share.microbatches * 2 * HALF * held * part(axes["data"])
    if share.tensor > 1:  # of the stream: gathered into two sublayers, again, and so its gradients; scattered likewise
        trips = (6 + 4 if config.remat.policy == "none" else 6 + 5) * model.num_layers
        moved["tensor"] = share.microbatches * trips * HALF * share.tokens * model.hidden_dim * part(share.tensor)
    if axes["context"] > 1:  # keys and values of whole rows, forward and backward, and their gradients
        trips = (2 if config.remat.policy == "none" else 3) * model.num_layers
        keys = 2 * model.num_kv_heads * model.head_dim / share.tensor
        moved["context"] = share.microbatches * trips * HALF * share.tokens * keys * (axes["context"] - 1)
    if share.expert > 1 and model.num_experts:  # there and back, and the gradients of both
        layers = model.num_layers - model.moe.dense_layers
        trips = 4 + (2 if config.remat.policy.removesuffix("_offload") == "full" else 0)
        moved["expert"] = (share.microbatches * trips * layers * HALF * share.tokens * model.hidden_dim
                           * _rows_sent(config, share, chip))
    return moved


def _rows_sent(config: RunConfig, share: Share, chip: Chip) -> float:
    """Of each token: itself to every other device, or a row for each choice that is elsewhere, padded to its slot."""
    platform = "tpu" if chip.name.startswith("TPU") else "gpu"
    exchange = choose_exchange(config.compute.expert_exchange, platform, share.expert, config.model.experts_per_token)
    if exchange == "all_gather":
        return share.expert - 1
    padded = 1.0 if exchange == "ragged_all_to_all" else _room(config, share)
    return config.model.experts_per_token * (share.expert - 1) / share.expert * padded


def _wire_seconds(axis: str, moved: float, chip: Chip, rates: Rates, links: Mapping[str, float] | None,
                  dcn_slices: int) -> float:
    if axis == "data" and dcn_slices > 1 and chip.dcn_bytes_per_second:
        return moved * chip.devices_per_chip / chip.dcn_bytes_per_second
    used = links.get(axis, chip.ici_links) if links else chip.ici_links
    return moved * chip.devices_per_chip / (rates.fabric * min(used, chip.ici_links) / chip.ici_links)


def _memory(config: RunConfig, share: Share, axes: Mapping[str, int]) -> dict[str, float]:
    """Bytes of one device."""
    model, optimizer = config.model, config.optimizer
    stored = stored_parameters(config, share)
    moments = MOMENT_BYTES[optimizer.mu_dtype] + MOMENT_BYTES[optimizer.nu_dtype]
    kept = sum(count * _kept_numbers(config, sparse, share) for count, sparse, _ in layers_of(model))
    once = max(_layer_numbers(config, sparse, share) for _, sparse, _ in layers_of(model))
    scanned = config.remat.policy == "none" and config.compute.layer_unroll != "all"
    activations = HALF * share.tokens * kept * (SCAN_KEEPS if scanned else 1.0)
    if config.remat.policy.endswith("_offload"):  # a layer's on its way, and one in work
        activations *= 2 / model.num_layers
    again = HALF * share.tokens * once if config.remat.policy != "none" else 0.0
    logits = min(FULL * share.tokens * model.vocab_size / share.tensor, LOGITS_BYTES) * LOGITS_COPIES
    table = model.vocab_size * model.hidden_dim / share.tensor
    gradients = FULL * stored * (2 if share.microbatches > 1 else 1)
    # Either the head with its table and that one's gradient, or a layer done again with its weights and gradients.
    head, layer = logits + (HALF + FULL) * table, again + 2 * HALF * _layer_parameters(config, share)
    whole_weights = 0.0
    if config.compute.layer_unroll == "all" and config.remat.policy == "none":  # every layer's cast stays
        whole_weights = HALF * parameter_count(model).non_embedding / share.tensor / share.expert
    if config.compute.layer_unroll == "all":  # gradients come when activations go
        gradients = max(0.0, gradients - activations - logits) if share.microbatches == 1 else gradients / 2
    working, moments = activations + max(head, layer) + whole_weights, moments * stored
    if config.compute.offload_optimizer:  # they come when only parameters and one set of gradients are left
        moments = max(0.0, moments - working - (gradients - FULL * stored))
    return {"parameters": FULL * stored, "optimizer": moments, "gradients": gradients,
            "activations": activations, "layer or head in work": max(head, layer), "weights": whole_weights}


def _kept_numbers(config: RunConfig, sparse: bool, share: Share) -> float:
    """Numbers a token that a layer keeps for its backward pass."""
    model, policy = config.model, config.remat.policy
    tensor = share.tensor
    width, heads = model.hidden_dim / share.tensor, model.num_heads * model.head_dim
    keys = 2 * model.num_kv_heads * model.head_dim
    room = _room(config, share) * model.experts_per_token
    units = room * model.expert_dim + model.moe.shared_experts * model.expert_dim if sparse else model.mlp_dim
    into = units * (1 if model.activation == "gelu" else 2)
    if sparse:  # rows and hidden units of routed experts are made again (model/moe/exchange.py)
        units = model.moe.shared_experts * model.expert_dim
    # fp8 keeps its products' operands in 8 bits, but attention's output, which attention keeps in 16, twice.
    in_8_bits = (2 * width + (units - heads) / tensor) / 2 if config.precision.recipe == "fp8" and not sparse else 0.0
    return {
        "full": width,
        "names": width + (heads + into) / tensor,
        "dots": 2 * width + (2 * heads + keys + into) / tensor,
        "none": 4 * width + (2 * heads + keys + into + units) / tensor - in_8_bits,
    }[policy.removesuffix("_offload")]


def _layer_numbers(config: RunConfig, sparse: bool, share: Share) -> float:
    """Numbers a token of one layer whose forward pass is done again, with their gradients."""
    model, tensor = config.model, share.tensor
    width, heads = model.hidden_dim, model.num_heads * model.head_dim
    keys = 2 * model.num_kv_heads * model.head_dim
    units = model.mlp_dim * 3
    rows = 0.0
    if sparse:
        rows = 1.6 * _room(config, share) * model.experts_per_token * (2 * width + 3 * model.expert_dim / tensor)
        units = 3 * model.moe.shared_experts * model.expert_dim
    return 1.5 * (4 * width + (2 * heads + keys + units) / tensor + rows)


def _room(config: RunConfig, share: Share) -> float:
    """Rows that a device's experts have room for, over those that an even load brings: without a bound, all that the
    devices of `expert` can send."""
    moe = config.model.moe
    return 1.0 if share.expert == 1 else moe.buffer_factor or moe.capacity_factor or float(share.expert)


def _layer_parameters(config: RunConfig, share: Share) -> float:
    """Of the largest layer, gathered for use."""
    model = config.model
    attention = model.hidden_dim * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads) / share.tensor
    if model.num_experts:
        experts = 3 * model.num_experts * model.hidden_dim * model.expert_dim / share.expert / share.tensor
        shared = 3 * model.hidden_dim * model.expert_dim * model.moe.shared_experts / share.tensor
        return attention + experts + shared
    return attention + 3 * model.hidden_dim * model.mlp_dim / share.tensor
