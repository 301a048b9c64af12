"""`maxlm packed`: trains runs of one program to their ends and leaves what `maxlm sweep` collects of each.

RUN_DIR gets config.json, metrics.jsonl and DONE, as from `maxlm train`; there are no checkpoints, so a pack that was
killed begins again, and `maxlm eval` has nothing to restore. It is for grids of many short runs.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.config import RunConfig
from maxlm.data.folders import datasets_of
from maxlm.data.loader import HeldoutData, TrainingData
from maxlm.resilience import RunLock
from maxlm.resilience.stopped import RunStopped
from maxlm.schema import require, to_dict
from maxlm.training.loop import DONE_FILE
from maxlm.training.metrics import MetricsWriter
from maxlm.training.packed import PackedRuns, stacked
from maxlm.training.saved_run import CONFIG_FILE, DATA


def train_packed(configs: Sequence[RunConfig], run_dirs: Sequence[Path]) -> None:
    """Trains every config in its folder, all at once. Raises ConfigError where they are not of one program, RunStopped
    where some ended without a finite held-out loss; the others are done then."""
    runs = PackedRuns(configs)
    first = configs[0]
    sizes = {"seq_len": first.train.seq_len, "global_batch_size": first.train.global_batch_size}
    with contextlib.ExitStack() as held:
        for run_dir in run_dirs:
            held.enter_context(RunLock(run_dir))
        folders = datasets_of(first.data, first.train.seq_len, run_dirs[0] / DATA)
        stages = first.data.weights_by_step()
        data = [TrainingData(folders, **sizes, seed=config.train.seed, stages=stages) for config in configs]
        heldout = HeldoutData(folders, **sizes)
        require(data[0].vocab_size <= first.model.vocab_size,
                f"model.vocab_size={first.model.vocab_size} is smaller than the data's tokenizer, which has "
                f"{data[0].vocab_size} tokens: set model.vocab_size={data[0].vocab_size} or more")
        writers = []
        for config, run_dir in zip(configs, run_dirs, strict=True):
            (run_dir / DONE_FILE).unlink(missing_ok=True)
            (run_dir / CONFIG_FILE).write_text(json.dumps(to_dict(config), indent=2) + "\n")
            writers.append(MetricsWriter(run_dir, 0, first.logging.tensorboard))
            held.callback(writers[-1].close)
        streams = [held.enter_context(d.iterate(0, read_threads=first.data.read_threads,
                                                prefetch_batches=first.data.prefetch_batches)) for d in data]
        losses = _train(runs, first, streams, heldout, writers)
        for loss, run_dir in zip(losses, run_dirs, strict=True):
            if np.isfinite(loss):
                (run_dir / DONE_FILE).write_text(f"{first.train.num_steps}\n")
    lost = [run_dir.name for loss, run_dir in zip(losses, run_dirs, strict=True) if not np.isfinite(loss)]
    if lost:
        raise RunStopped(f"{len(lost)} of {len(losses)} packed runs ended without a finite held-out loss: "
                         f"{', '.join(lost)}; lower their learning rate, or prepare data with held-out text")


def _train(runs: PackedRuns, config: RunConfig, streams: Sequence[Any], heldout: HeldoutData,
           writers: Sequence[MetricsWriter]) -> np.ndarray:
    """Trains to the last step; returns the held-out losses [runs]."""
    states, last, tokens = runs.init(), config.train.num_steps, np.zeros(len(writers), int)
    every, evaluating = config.logging.every_steps, config.eval.every_steps
    losses, mark, marked = np.full(len(writers), np.nan), time.perf_counter(), 0
    for step, batches in enumerate(zip(*streams, strict=True), 1):
        states, metrics = runs.step(states, stacked([batch for _, batch in batches]))
        tokens += np.asarray(metrics.tokens) * (1 - np.asarray(metrics.skipped))
        if step % every == 0 or step == last:
            seconds, marked = (time.perf_counter() - mark) / (step - marked), step
            for k, writer in enumerate(writers):
                writer.write({"step": step, "tokens": int(tokens[k]), "step_seconds": seconds / len(writers),
                              **{name: float(getattr(metrics, name)[k]) for name in
                                 ("loss", "learning_rate", "grad_norm")}})
            mark = time.perf_counter()
        if step == last or (evaluating and step % evaluating == 0):
            clock = time.perf_counter()
            losses, bits = _evaluate(runs, states, heldout, config.eval.num_batches)
            for k, writer in enumerate(writers):
                writer.write({"step": step, "tokens": int(tokens[k]), "eval_loss": float(losses[k]),
                              "eval_bits_per_byte": float(bits[k])})
            mark += time.perf_counter() - clock
        if step == last:
            return losses
    raise AssertionError("streams of batches do not end")


def _evaluate(runs: PackedRuns, states: Any, heldout: HeldoutData, num_batches: int) -> tuple[np.ndarray, np.ndarray]:
    """(held-out loss in nats a token, bits a byte) [runs]; NaN without held-out text."""
    count = min(heldout.num_batches, num_batches or heldout.num_batches)
    nats, tokens, size = np.zeros(runs.count), np.zeros(runs.count), 0
    for index in range(count):
        batch = heldout.batch(index)
        found, seen = runs.losses(states, stacked([batch] * runs.count))
        nats, tokens, size = nats + found, tokens + seen, size + int(batch["bytes"].sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        return nats / tokens, nats / np.log(2) / size
