"""`maxlm bench`: the real compiled step on synthetic batches, timed."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxlm import __version__
from maxlm.config import RunConfig
from maxlm.flops import parameter_count, training_flops_per_token_full_attention
from maxlm.parallel.mesh import check_divisible, make_mesh
from maxlm.schema import to_dict
from maxlm.training.compiled_products import products, slow_products
from maxlm.training.evaluate import local_rows, to_device
from maxlm.training.state import init_state, kernels_of
from maxlm.training.step import compile_step
from maxlm.training.throughput import Throughput

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def measure(config: RunConfig, *, steps: int = 20, warmup: int = 3, documents: int = 1) -> dict[str, Any]:
    """Times `steps` training steps after `warmup` ones and returns the record `maxlm bench` writes.

    Each row of a batch holds `documents` equal documents. A step is timed from the arrival of the loss before it to
    that of its own, with the next one queued. tokens/s/chip counts every position; mfu is against the chip's dense
    peak for the recipe's precision, in the convention of flops.training_flops_per_token (causal; of experts, those that
    a token takes), and null for a chip that is not known. dropped_choices: of the last timed step, where there are
    experts. products: what 8-bit products were compiled to (compiled_products.py), where the recipe has any;
    slow_products: on a GPU, those that are not cuBLASLt's FP8 call.
    """
    mesh = make_mesh(config.mesh)
    check_divisible(mesh, config)
    with jax.set_mesh(mesh):
        clock = time.perf_counter()
        step = compile_step(config, mesh)
        compile_seconds = time.perf_counter() - clock
        state = init_state(config, mesh)
        rows = local_rows(mesh, config.train.global_batch_size)
        batches = [to_device(synthetic_batch(config, seed, documents, rows), mesh) for seed in range(2)]
        seconds, losses = [], []
        before, clock = None, time.perf_counter()
        for index in range(warmup + steps + 1):  # as the loop does: the next step is queued before one is waited for
            state, metrics = step(state, batches[index % 2])
            if before is not None:
                losses.append(float(before.loss))
                seconds.append(time.perf_counter() - clock)
                clock = time.perf_counter()
            before = metrics
        dropped = None if metrics.load is None else float(metrics.load.dropped.sum())
    return _record(config, mesh, step, seconds[warmup:], losses, compile_seconds, documents, dropped)


def synthetic_batch(config: RunConfig, seed: int, documents: int, rows: Sequence[int]) -> dict[str, np.ndarray]:
    """Random tokens in `documents` equal documents a row: this process's `rows` of a global batch, int32 [rows, T]."""
    shape = (config.train.global_batch_size, config.train.seq_len)
    tokens = np.random.default_rng(seed).integers(0, config.model.vocab_size, (shape[0], shape[1] + 1), np.int32)
    starts = np.arange(shape[1]) * documents // shape[1]
    first = np.searchsorted(starts, starts)
    whole = {
        "tokens": tokens[:, :-1],
        "targets": np.where(np.append(np.diff(starts), 0) == 0, tokens[:, 1:], -1),
        "segment_ids": np.broadcast_to(starts + 1, shape),
        "positions": np.broadcast_to(np.arange(shape[1]) - first, shape),
    }
    return {name: np.ascontiguousarray(a[list(rows)], dtype=np.int32) for name, a in whole.items()}


def _record(config, mesh, step, seconds, losses, compile_seconds, documents, dropped) -> dict[str, Any]:
    device, train, throughput = mesh.devices.flat[0], config.train, Throughput(config, mesh)
    count, kernels = parameter_count(config.model), kernels_of(config, device)[0]
    extra = {"grouped_matmul": kernels.grouped_matmul, "expert_exchange": kernels.exchange,
             "dropped_choices": dropped} if config.model.num_experts else {}
    median = statistics.median(seconds)
    mfu = throughput.mfu(median)
    full = training_flops_per_token_full_attention(config.model, train.seq_len) / throughput.flops_per_token
    memory = step.memory_analysis()
    if config.precision.recipe.startswith("fp8"):
        extra["products"] = products(step.as_text())
        if device.platform == "gpu":
            extra["slow_products"] = slow_products(extra["products"])
    return {
        "benchmark": "train_step",
        "device_kind": device.device_kind,
        "devices": mesh.size,
        "tokens_per_second_per_chip": throughput.tokens_per_second_per_chip(median),
        "mfu": mfu,
        "mfu_full_attention_convention": None if mfu is None else mfu * full,
        "flops_per_token": throughput.flops_per_token,
        "step_seconds": {"median": median, "min": min(seconds), "max": max(seconds), "count": len(seconds)},
        "compile_seconds": compile_seconds,
        "bytes_per_chip": memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else None,
        "parameters": count.total,
        "active_parameters": count.active,
        "attention": kernels.attention,
        **extra,
        "documents_per_row": documents,
        "loss_first_last": [losses[0], losses[-1]],
        "config": to_dict(config),
        "versions": {"maxlm": __version__} | {name: _version(name) for name in PACKAGES},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, '+' where it has changes. MAXLM_COMMIT says it for a copy without its history, as sent to
    another machine; else None outside a checkout."""
    if os.environ.get("MAXLM_COMMIT"):
        return os.environ["MAXLM_COMMIT"]
    here = Path(__file__).parent
    git = lambda *words: subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)  # noqa: E731
    try:
        head = git("rev-parse", "--short", "HEAD")
    except FileNotFoundError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if git("status", "--porcelain", "-uno").stdout.strip() else "")


def summary(record: dict[str, Any]) -> str:
    """One line for people."""
    seconds = record["step_seconds"]
    name = "MFU" if record["active_parameters"] == record["parameters"] else (
        f"active-parameter MFU (of {record['active_parameters'] / 1e9:.2f}B in {record['parameters'] / 1e9:.2f}B)")
    mfu = f"unknown chip, no {name}" if record["mfu"] is None else (
        f"{name} {record['mfu']:.1%} (causal attention; {record['mfu_full_attention_convention']:.1%} if it counted "
        "whole)"
    )
    slow = record.get("slow_products")
    fp8 = f", NOT by cuBLASLt's FP8 call: {'; '.join(slow)}" if slow else ""
    return (
        f"{record['device_kind']} x{record['devices']}: {record['tokens_per_second_per_chip']:,.0f} tokens/s/chip, "
        f"{mfu}, {record['attention']} attention, "
        f"step {seconds['median'] * 1e3:.1f} ms (min {seconds['min'] * 1e3:.1f}, max {seconds['max'] * 1e3:.1f}, "
        f"n {seconds['count']}), compiled in {record['compile_seconds']:.1f} s{fp8}"
    )
