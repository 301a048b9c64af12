"""The training loop: the one module that orders side effects.

Read it downward: set up, resume, then for each step: dispatch, look at the step before, evaluate, save, stop if asked.
The device always has the next step queued while the host reads the last one's metrics, so logging costs no wait.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from maxlm import __version__
from maxlm.checkpoint import Checkpointer
from maxlm.config import RunConfig, training_difference
from maxlm.data.folders import datasets_of
from maxlm.data.loader import HeldoutData, TrainingData
from maxlm.parallel.distributed import check_identical, together
from maxlm.parallel.mesh import check_divisible, make_mesh, pipeline_told
from maxlm.resilience import Goodput, HostTimes, RunLock, Spike, StopRequest, Watchdog
from maxlm.resilience.preemption import PREEMPTED_UNSAVED
from maxlm.schema import ConfigError, from_dict, to_dict
from maxlm.training.anomalies import StepAnomalies
from maxlm.training.corruption import CorruptionCheck
from maxlm.training.evaluate import Evaluation, local_rows, make_evaluator, to_device
from maxlm.training.expert_load import RouterFigures, plot_expert_load
from maxlm.training.metrics import MetricsWriter, plot_loss
from maxlm.training.progress import Progress
from maxlm.training.saved_run import CONFIG_FILE, DATA, TOKENIZER, TOKENIZER_CONFIG
from maxlm.training.state import TrainState, abstract_state, init_state, kernels_of
from maxlm.training.step import StepMetrics, compile_step
from maxlm.training.step_ledger import StepLedger
from maxlm.training.throughput import Throughput
from maxlm.training.tiers import due_locally, open_checkpoints

DONE_FILE = "DONE"


@dataclass
class Outcome:
    """How a call to `train` ended."""

    step: int
    tokens: int
    preempted: bool
    evaluation: Evaluation | None
    state: TrainState | None = field(repr=False, default=None)


def train(config: RunConfig, run_dir: Path, *, devices: list[jax.Device] | None = None, strict: bool = False,
          goodput: Goodput | None = None) -> Outcome:
    """Trains `config` in `run_dir`, from its newest good checkpoint if it has one, to `train.num_steps`.

    Every process of a run calls it alike (parallel/distributed.py); process 0 alone writes what is not a checkpoint.
    goodput: the clock of this start, where it started before this call.
    Raises ConfigError for a user's mistake (before the run is touched), CheckpointError where a save or restore
    failed, IntegrityError where every checkpoint is damaged (with `strict`: where the newest is), RunStopped where
    anomalies repeat, PeerError where another process failed while setting up.
    """
    leader = jax.process_index() == 0
    with contextlib.ExitStack() as held:
        with together("setting up"):
            mesh = make_mesh(config.mesh, devices)
            check_divisible(mesh, config)
            told = kernels_of(config, mesh.devices.flat[0])[1] + pipeline_told(config, mesh)
            held.enter_context(RunLock(run_dir, process_index=jax.process_index()))
            if leader:  # prepares data.source on first use; the others wait here, and then find it prepared
                datasets_of(config.data, config.train.seq_len, run_dir / DATA)
        held.enter_context(jax.set_mesh(mesh))
        say = _print if leader else lambda text: None
        say(told)
        if mesh.devices.flat[0].platform == "gpu":
            say("a GPU adds in no fixed order: a resumed run ends alike up to rounding, not bit for bit")
        with together("opening the data"):
            folders = datasets_of(config.data, config.train.seq_len, run_dir / DATA)
            sizes = {"seq_len": config.train.seq_len, "global_batch_size": config.train.global_batch_size}
            data = TrainingData(folders, **sizes, seed=config.train.seed, stages=config.data.weights_by_step())
            heldout = HeldoutData(folders, **sizes)
            _check_vocabulary(config, data)
        check_identical({"the config": json.dumps(to_dict(config)), "the prepared data": data.digest,
                         "the maxlm version": __version__, "the jax version": jax.__version__})
        goodput = goodput or Goodput(run_dir)
        watchdog = Watchdog(config.resilience.watchdog, run_dir, goodput, process=jax.process_index())
        with StopRequest(deadline_seconds=config.resilience.stop_seconds) as stop, watchdog, \
                open_checkpoints(config, run_dir) as checkpointer:
            run = _Run(config, run_dir, mesh, data, heldout, checkpointer, say, goodput, watchdog)
            return run.until_done(stop, strict)


def check_resumable(meta: dict[str, Any], step: int, config: RunConfig, data_digest: str) -> None:
    """Raises ConfigError unless `config` and the data continue the training that the checkpoint's `meta` tells of."""
    if step > config.train.num_steps:
        raise ConfigError(
            f"train.num_steps={config.train.num_steps} is below step {step}, which this run directory has reached: "
            f"set it to {step} or more, or use another --run-dir"
        )
    changed = training_difference(from_dict(RunConfig, meta["config"]), config, at_step=step)
    if changed:
        raise ConfigError(
            f"this run directory was trained with another config ({'; '.join(changed)}): restore these values, "
            "or use another --run-dir"
        )
    if meta["data"]["digest"] != data_digest:
        raise ConfigError(
            "data.path, data.source or data.mixture: the prepared data is not what this run was trained on (its digest "
            f"is {data_digest[:12]}, the checkpoint's {meta['data']['digest'][:12]}): point to the same data, or use "
            "another --run-dir"
        )


class _Run:
    """One start of a run: what its phases share."""

    def __init__(self, config: RunConfig, run_dir: Path, mesh: Mesh, data: TrainingData, heldout: HeldoutData,
                 checkpointer: Checkpointer, say: Callable[[str], None], goodput: Goodput, watchdog: Watchdog):
        self.config, self.run_dir, self.mesh, self.say = config, run_dir, mesh, say
        self.data, self.heldout, self.checkpointer, self.goodput = data, heldout, checkpointer, goodput
        self.rows = local_rows(mesh, config.train.global_batch_size)
        self.watchdog, self.leader = watchdog, jax.process_index() == 0
        self.throughput = Throughput(config, mesh)
        self.routers = RouterFigures(config, lambda text: self.progress.line(text))
        self.anomalies = StepAnomalies(config, run_dir, checkpointer.latest_step,
                                       lambda text: self.progress.line(text))

    def until_done(self, stop: StopRequest, strict: bool) -> Outcome:
        config, last = self.config, self.config.train.num_steps
        with self.goodput.phase("startup" if self.checkpointer.latest_step() is None else "restore"):
            state, start, meta = self._state(strict)
        tokens, owed = meta.get("data", {}).get("tokens", 0), meta.get("evaluation_owed", False)
        if start == last and (self.run_dir / DONE_FILE).exists():
            self.say(f"{self.run_dir.name}: already trained to step {start}; raise train.num_steps to go on")
            return Outcome(start, tokens, False, None, state)
        self._record_config()
        self.tokens, self.reached = tokens, start
        self.anomalies.begin(meta)
        self.evaluate = make_evaluator(config, self.mesh)
        self.writer = MetricsWriter(self.run_dir, start, config.logging.tensorboard) if self.leader else None
        self.ledger = StepLedger(config, self.run_dir, self.mesh, self.data.digest)
        stop.too_late = self._too_late
        self.hosts = HostTimes(config.resilience.watchdog, self.run_dir, process=jax.process_index(),
                               processes=jax.process_count(), say=self.say)
        try:
            self.goodput.begin(self.ledger.highest_step, writes=self.leader)
            self.ledger.begin(start, state, meta.get("ledger"))
            step_function = self._compiled(start) if start < last else None
            with Progress(last, start, shown=self.leader) as self.progress:
                evaluation = self._evaluate(start, state, stop) if owed or start == last else None
                if step_function is None:  # killed or stopped between the last save and the end
                    return self._end(state, start, evaluation, stop if evaluation is None else None)
                with self.goodput.stepping():
                    while isinstance(end := self._steps(step_function, state, start, stop), Spike):
                        del state  # on the device there is room for one
                        state, start = self._roll_back(end, strict)
                return end
        finally:
            self._leave()

    def _compiled(self, start: int) -> Any:
        clock = time.perf_counter()
        with self.goodput.phase("compile"):
            step_function = compile_step(self.config, self.mesh)
            checked = self.config.resilience.corruption_check_every_steps
            self.corruption = CorruptionCheck(self.config, self.mesh) if checked else None
        self.watchdog.watch_program(step_function.as_text, self.mesh.shape)
        self.say(f"step compiled in {time.perf_counter() - clock:.1f} s; training from step {start} on "
                 f"{self.mesh.size} {self.mesh.devices.flat[0].device_kind} device(s)")
        return step_function

    def _leave(self) -> None:
        """Closes ledger and metrics and draws them, also when the run ends with an error; that is not replaced."""
        with contextlib.ExitStack() as errors:
            if sys.exc_info()[0] is not None:
                errors.enter_context(contextlib.suppress(OSError))
            errors.callback(self.goodput.end)
            errors.callback(self.hosts.close)
            errors.callback(self.ledger.close)
            if self.writer:
                self.writer.close()
                plot_loss(self.run_dir)
                plot_expert_load(self.run_dir)

    def _state(self, strict: bool) -> tuple[TrainState, int, dict[str, Any]]:
        """(state, its step, what was saved with it): the newest good checkpoint's, or fresh."""

        def target(step: int, meta: dict[str, Any]) -> TrainState:
            check_resumable(meta, step, self.config, self.data.digest)
            return abstract_state(self.config, self.mesh)

        found = self.checkpointer.restore_newest(target, strict=strict, say=self.say)
        if found is None:
            return init_state(self.config, self.mesh), 0, {}
        self.say(f"resumed from step {found.step}")
        return found.state, found.step, found.meta

    def _record_config(self) -> None:
        if not self.leader:
            return
        (self.run_dir / DONE_FILE).unlink(missing_ok=True)
        partial = self.run_dir / (CONFIG_FILE + ".partial")
        partial.write_text(json.dumps(to_dict(self.config), indent=2) + "\n")
        os.replace(partial, self.run_dir / CONFIG_FILE)
        if self.data.tokenizer_path:  # so that the run directory can generate by itself
            folder = Path(self.data.tokenizer_path).parent
            for name in (TOKENIZER, TOKENIZER_CONFIG):
                if (folder / name).exists():
                    shutil.copyfile(folder / name, self.run_dir / name)

    def _steps(self, step_function: Any, state: TrainState, start: int, stop: StopRequest) -> Outcome | Spike:
        """Trains from `start` to the end, to a stop, or to a spike that is to be rolled back."""
        config, last = self.config, self.config.train.num_steps
        self.mark, self.marked_step = time.perf_counter(), start
        pending: StepMetrics | None = None
        evaluation, step = None, start
        data = config.data
        batches = self.data.iterate(
            start, self.rows, read_threads=data.read_threads, worker_processes=data.worker_processes,
            prefetch_batches=data.prefetch_batches, skipped=self.anomalies.skipped,
        )
        try:
            for index, batch in self.goodput.waiting(batches):
                self._profile(index, pending)
                batch = to_device(batch, self.mesh)
                state, metrics = step_function(state, batch)
                self.watchdog.dispatched(index + 1)
                if pending is not None and (spike := self._finished(index, pending)):
                    return spike
                pending, step = metrics, index + 1
                self.reached = step
                stopping = stop.should_stop(step) or self.anomalies.halted
                saving = stopping or step == last or step % config.checkpoint.every_steps == 0
                saving_locally = not saving and due_locally(config, step)
                evaluating = step == last or (config.eval.every_steps and step % config.eval.every_steps == 0)
                self.ledger.dispatched(step, self.anomalies.data_index(index), state, saving=saving or saving_locally)
                if self.corruption and step % config.resilience.corruption_check_every_steps == 0:
                    with self.goodput.phase("check"):
                        self.corruption.check(step, state, batch)
                if saving or saving_locally or evaluating:
                    # What is saved has no unseen spike in it: all metrics up to it are read first.
                    if spike := self._finished(step, pending):
                        return spike
                    pending, paused = None, time.perf_counter()
                    # Evaluated first, a saved step has all its rows in metrics.jsonl, whenever the run is killed.
                    # One asked to stop has little time: it saves, and its next start evaluates.
                    evaluation = self._evaluate(step, state, stop) if evaluating and not stopping else None
                    owed = bool(evaluating) and evaluation is None
                    stopping = stopping or owed  # asked to stop while it evaluated
                    if saving or stopping:
                        self._save(step, state, self.checkpointer.save, evaluation_owed=owed)
                    elif saving_locally:
                        self._save(step, state, self.checkpointer.save_local, evaluation_owed=owed)
                    self.mark += time.perf_counter() - paused
                if stopping or step == last:
                    break
        finally:
            batches.close()
            self._profile(None, pending)
        self.anomalies.check()
        return self._end(state, step, evaluation, stop if stopping else None)

    def _end(self, state: TrainState, step: int, evaluation: Evaluation | None, stop: StopRequest | None) -> Outcome:
        """stop: what ended the run before its last step; None where nothing did."""
        preempted = stop is not None
        with self.goodput.phase("save"):
            self.checkpointer.wait()
        if preempted:
            waited = stop.seconds_since_signal()
            when = "" if waited is None else f", {waited:.1f} s after {stop.signal_name}"
            self.say(f"stopped at step {step} as asked{when}; the same command goes on from there")
            if self.writer:
                self.writer.write({"step": step, "tokens": self.tokens, "preempted": True})
        return Outcome(step, self.tokens, preempted, evaluation, state)

    def _too_late(self) -> int:
        """Called where `resilience.stop_seconds` are over. The exit code: 0 where every step made is saved."""
        saved = self.checkpointer.newest_known or 0
        unsaved = self.reached - saved
        _print(f"maxlm: {self.config.resilience.stop_seconds:g} s (resilience.stop_seconds) after the signal: leaving "
               + (f"with step {saved} saved and {unsaved} not" if unsaved else "with everything saved"))
        if self.writer and not unsaved:
            self.writer.write({"step": saved, "tokens": self.tokens, "preempted": True})
        return PREEMPTED_UNSAVED if unsaved else 0

    def _finished(self, step: int, metrics: StepMetrics) -> Spike | None:
        """Step `step` is done or about to be: takes in its metrics, and logs when it is time to. A spike is returned
        where the run must roll back from it."""
        with self.hosts.device_wait():
            metrics = jax.device_get(metrics)
        self.hosts.finished(step)
        self.watchdog.finished(step)
        self.ledger.finished(step, metrics)
        self.goodput.step_done(step)
        loss, grad_norm, rate, tokens, skipped = (float(value) for value in metrics[:5])
        self.tokens += 0 if skipped else int(tokens)
        if spike := self.anomalies.finished(step, metrics):
            return spike
        self.progress.advance(step)
        self.routers.finished(step, metrics.load)
        every, last = self.config.logging.every_steps, self.config.train.num_steps
        if step % every and step != last:
            return None
        now = time.perf_counter()
        seconds = (now - self.mark) / (step - self.marked_step)
        self.mark, self.marked_step = now, step
        row = {
            "step": step, "tokens": self.tokens, "loss": loss, "learning_rate": rate, "grad_norm": grad_norm,
            "step_seconds": seconds, "mfu": self.throughput.mfu(seconds),
            "tokens_per_second_per_chip": self.throughput.tokens_per_second_per_chip(seconds),
            **self.anomalies.counts, **self.routers.figures(),
        }
        if self.writer:
            self.writer.write(row)
            self.progress.figures(row, (last - step) * seconds)
        return None

    def _roll_back(self, spike: Spike, strict: bool) -> tuple[TrainState, int]:
        """Back to the newest good checkpoint that has not seen the batches of `spike`, which are left out from now on.
        The checkpoints after it are deleted: they belong to steps that are made again, of other batches."""
        self.anomalies.check()
        batches = self.anomalies.batches_of(spike)
        with self.goodput.phase("restore"):
            self.checkpointer.rewind(spike.resume_at, expected=spike.resume_at >= self.config.checkpoint.every_steps)
            state, step, meta = self._state(strict)
        self.anomalies.rolled_back(spike, step, meta)
        self.ledger.rollback(step, batches, state, meta.get("ledger"))
        self.tokens = meta.get("data", {}).get("tokens", 0)
        if self.writer:
            self.writer.close()
            self.writer = MetricsWriter(self.run_dir, step, self.config.logging.tensorboard)
        return state, step

    def _evaluate(self, step: int, state: TrainState, stop: StopRequest) -> Evaluation | None:
        """The held-out result, logged; None where the run was asked to stop meanwhile."""

        def stopped() -> bool:
            self.goodput.sign_of_life()
            return stop.should_stop(step)

        with self.goodput.phase("evaluation"):
            result = self.evaluate(state.params, self.heldout, self.rows, stopped)
        if result is None:
            return None
        if not result.tokens:
            self.say(f"step {step}: no held-out text to evaluate on")
        elif self.writer and not self.writer.has_evaluation(step):
            self.writer.write({"step": step, "tokens": self.tokens, "eval_loss": result.loss,
                               "eval_bits_per_byte": result.bits_per_byte})
            self.progress.line(f"step {step}  held out: loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits a byte")
        return result

    def _save(self, step: int, state: TrainState, save: Callable[..., Any], *, evaluation_owed: bool) -> None:
        with self.goodput.phase("save"):
            self.anomalies.check_state(step, state.params)
            meta = {
                "step": step,
                "evaluation_owed": evaluation_owed,
                "config": to_dict(self.config),
                "data": {"digest": self.data.digest, "step": step, "tokens": self.tokens,
                         "skipped": self.anomalies.skipped},
                "anomalies": self.anomalies.state(),
                "ledger": self.ledger.meta(step, state),
                "versions": {"maxlm": __version__, "jax": jax.__version__},
            }
            save(step, state, meta)

    def _profile(self, index: int | None, pending: StepMetrics | None) -> None:
        """Starts or stops the trace before step `index`, once the step before it is done; None stops it at the end."""
        first, count = self.config.logging.profile_start, self.config.logging.profile_steps
        if not count:
            return
        if index in (None, first, first + count):
            jax.block_until_ready(pending)
        if index == first:
            jax.profiler.start_trace(str(self.run_dir / "profile"))
            self._tracing = True
        elif getattr(self, "_tracing", False) and (index is None or index == first + count):
            jax.profiler.stop_trace()
            self._tracing = False


def _check_vocabulary(config: RunConfig, data: TrainingData) -> None:
    if data.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the data's tokenizer, which has "
            f"{data.vocab_size} tokens: set model.vocab_size={data.vocab_size} or more"
        )


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
