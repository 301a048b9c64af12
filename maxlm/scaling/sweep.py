"""A sweep's folder: what is planned, what is there already, and the results of finished runs.

    OUT/configs/NAME.json   the whole config of each run: `maxlm train OUT/configs/NAME.json --run-dir OUT/runs/NAME`
    OUT/runs/NAME/          its run directory
    OUT/logs/NAME.log       what it said
    OUT/data/               corpora named by `data.source`, prepared once for all runs
    OUT/runs.jsonl          a row for each finished run, as `maxlm fit` reads it
    OUT/curves.jsonl        a row for each held-out evaluation of each run, as `maxlm fit --law envelope` reads it
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maxlm.config import RunConfig, training_difference
from maxlm.flops import parameter_count
from maxlm.overrides import load_config
from maxlm.scaling.grid import Sweep, Trial, flops_per_step
from maxlm.schema import require, to_dict

RUNS, CURVES, LOCK = "runs.jsonl", "curves.jsonl", ".lock"
LOCK_SECONDS = 90.0  # for the runs of a killed start to save and stop
MARK = ".sweep-start"  # in a branch's folder: its trunk's checkpoint is there


class SweepFolder:
    """The folder of one sweep; it is made where it is missing. Use as a context manager to be its only user: runs of
    an earlier start keep it in use until they have stopped, because they inherit the lock."""

    def __init__(self, out: Path, sweep: Sweep):
        self.out, self.sweep = out, sweep
        self._lock: int | None = None

    def __enter__(self) -> SweepFolder:
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        until = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return self
            except BlockingIOError:
                require(time.monotonic() < until, f"--out {self.out} is in use by another `maxlm sweep` or by runs of "
                                                  "one: wait for them, stop them, or choose another --out")
                time.sleep(0.2)

    def __exit__(self, *exception: object) -> None:
        os.close(self._lock)
        self._lock = None

    @property
    def lock(self) -> int:
        """The descriptor that runs inherit, so that the folder is in use as long as one of them lives."""
        assert self._lock is not None
        return self._lock

    def run_dir(self, trial: Trial) -> Path:
        return self.out / "runs" / trial.name

    def log(self, trial: Trial) -> Path:
        return self.out / "logs" / f"{trial.name}.log"

    def config_file(self, trial: Trial) -> Path:
        return self.out / "configs" / f"{trial.name}.json"

    def is_done(self, trial: Trial) -> bool:
        return (self.run_dir(trial) / "DONE").exists()

    def check(self) -> None:
        """Raises ConfigError where a run that was begun here had another config than the sweep has for it now."""
        for trial in self.sweep.trials:
            begun = self.run_dir(trial) / "config.json"
            if not begun.exists():
                continue
            saved, now = load_config(begun), self.config(trial)
            changed = training_difference(saved, now)
            if self.is_done(trial) and saved.train.num_steps != now.train.num_steps:
                changed.append(f"train.num_steps: {saved.train.num_steps} -> {now.train.num_steps}")
            require(not changed, f"run {trial.name} in {self.out} was begun with another config "
                                 f"({'; '.join(changed)}): restore it, or use another --out")

    def write_configs(self) -> None:
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        for trial in self.sweep.trials:
            _replace(self.config_file(trial), json.dumps(to_dict(self.config(trial)), indent=2) + "\n")

    def config(self, trial: Trial) -> RunConfig:
        """The trial's config as it is run: a corpus named by `data.source` is that of OUT/data."""
        config = trial.config
        if not config.data.source:
            return config
        return dataclasses.replace(config, data=dataclasses.replace(
            config.data, source=None, path=str(self._corpus(config).absolute())))

    def _corpus(self, config: RunConfig) -> Path:
        data = config.data
        key = json.dumps([data.source, data.tokenizer, data.heldout_fraction, config.train.seq_len])
        return self.out / "data" / f"{data.source}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"

    def corpora(self) -> dict[Path, list[str]]:
        """The words after `maxlm` that prepare each corpus which the runs name and which is not there yet."""
        found = {}
        for config in (trial.config for trial in self.sweep.trials if trial.config.data.source):
            folder, data = self._corpus(config), config.data
            if not (folder / "manifest.json").exists():
                found[folder] = ["data", "prepare", "--source", data.source, "--out", str(folder), "--tokenizer",
                                 data.tokenizer, "--seq-len", str(config.train.seq_len), "--heldout-fraction",
                                 str(data.heldout_fraction)]
        return found

    def begin_branch(self, trial: Trial) -> None:
        """Puts the trunk's checkpoint, metrics and ledger where the branch finds them as its own. Once."""
        if trial.branch_of is None or (self.run_dir(trial) / MARK).exists():
            return
        trunk, branch = self.out / "runs" / trial.branch_of, self.run_dir(trial)
        source = trunk / "checkpoints" / str(trial.from_step)
        require(source.is_dir(), f"run {trial.name} branches off step {trial.from_step} of {trial.branch_of}, which "
                                 "has no checkpoint of it: its checkpoint.keep_every must divide that step")
        shutil.rmtree(branch, ignore_errors=True)  # half of one
        shutil.copytree(source, branch / "checkpoints" / source.name, copy_function=_link_or_copy)
        for name in ("metrics.jsonl", "ledger.jsonl"):
            shutil.copyfile(trunk / name, branch / name)
        (branch / MARK).write_text(f"{trial.branch_of} {trial.from_step}\n")

    def collect(self) -> int:
        """Writes runs.jsonl and curves.jsonl anew; returns how many runs are in them. A trunk is no result."""
        trunks = {trial.branch_of for trial in self.sweep.trials}
        rows, curves = [], []
        for trial in self.sweep.trials:
            evaluations = [row for row in metrics(self.run_dir(trial)) if row.get("eval_loss") is not None]
            if trial.branch_of is not None:  # the rows before are its trunk's
                evaluations = [row for row in evaluations if row["step"] > trial.from_step]
            curves += [self._row(trial, row) for row in evaluations]
            if self.is_done(trial) and evaluations and trial.name not in trunks:
                rows.append(self._row(trial, evaluations[-1]) | self._spent(trial))
        for name, table in ((RUNS, rows), (CURVES, curves)):
            _replace(self.out / name, "".join(json.dumps(row) + "\n" for row in table))
        return len(rows)

    def _row(self, trial: Trial, evaluation: Mapping[str, Any]) -> dict[str, Any]:
        config, count = trial.config, parameter_count(trial.config.model)
        swept = {key: value for key, value in trial.swept.items() if isinstance(value, int | float | str)}
        experts = {"active_params": count.active} if config.model.num_experts else {}
        return {
            "run": trial.name, "params": count.total, "tokens": evaluation["tokens"], "loss": evaluation["eval_loss"],
            "flops": flops_per_step(config) * evaluation["step"], "seed": config.train.seed,
            "non_embedding_params": count.non_embedding, "step": evaluation["step"],
            "learning_rate": config.optimizer.learning_rate,
            "batch_tokens": config.train.global_batch_size * config.train.seq_len,
            "bits_per_byte": evaluation.get("eval_bits_per_byte"),
            **experts, **trial.columns, **swept,
        }

    def _spent(self, trial: Trial) -> dict[str, Any]:
        """What the run had to read and what it cost; null where nothing says so."""
        rows = metrics(self.run_dir(trial))
        step_seconds = [row["step_seconds"] for row in rows if row.get("step_seconds")]
        manifests = [_json(folder / "manifest.json") for folder in _folders(self.config(trial))]
        there = sum(manifest["train"]["tokens"] for manifest in manifests if manifest)
        return {
            "unique_tokens": min(there, rows[-1]["tokens"]) if there else None,
            "seconds": (_json(self.run_dir(trial) / "goodput.json") or {}).get("wall_seconds"),
            "step_seconds": statistics.median(step_seconds) if step_seconds else None,
        }


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of RUN_DIR/metrics.jsonl; a last line cut short is left out."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _folders(config: RunConfig) -> list[Path]:
    return [Path(d.path) for d in config.data.mixture] or ([Path(config.data.path)] if config.data.path else [])


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _link_or_copy(source: str, target: str) -> None:
    """Checkpoints are never altered, so both runs can hold one file; across file systems it is copied."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def check_branches(sweep: Sweep) -> None:
    """Raises ConfigError where a branch would not go on as its trunk began."""
    by_name = {trial.name: trial for trial in sweep.trials}
    for trial in sweep.trials:
        if trial.branch_of is None:
            continue
        trunk = by_name[trial.branch_of]
        changed = training_difference(trunk.config, trial.config, at_step=trial.from_step)
        require(not changed, f"run {trial.name} cannot branch off {trunk.name}: {'; '.join(changed)}")
        require(trial.from_step <= trunk.config.train.num_steps and trunk.branch_of is None,
                f"run {trial.name} branches off step {trial.from_step} of {trunk.name}, which ends at step "
                f"{trunk.config.train.num_steps} or is a branch itself")

