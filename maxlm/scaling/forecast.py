"""Sealed forecasts: a prediction with its interval, bound to the data and the code it came from, and graded later.

The seal is a SHA-256 over everything the forecast says: the target, the prediction, the interval, digests of the data
and of the code. Whoever edits one of them and not the seal is caught; against someone who makes a new seal there is
only a copy of the old one elsewhere (a commit, an e-mail), which `--seal` compares. Scores never touch the forecast.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from maxlm import __version__
from maxlm.config import RunConfig, training_difference
from maxlm.flops import parameter_count
from maxlm.overrides import load_config
from maxlm.scaling.analysis import Analysis
from maxlm.scaling.holdout import prediction_errors
from maxlm.scaling.sweep import metrics
from maxlm.scaling.uncertainty import percentile
from maxlm.schema import ConfigError, from_dict, require, to_dict

FILE, SCORE, COPY = "forecast.json", "score.json", "sealed_runs"
FORMAT = 1
SAME_SIZE = 0.02  # a run this close to the target in every column is the one that was forecast


class SealError(RuntimeError):
    """A forecast or what it rests on is not what was sealed."""


def predict(analysis: Analysis, target: Mapping[str, float], seed: int) -> tuple[float, tuple[float, float]]:
    """(prediction, prediction interval) of the law's target column for one run with the columns `target`."""
    fitted = analysis.fitted
    missing = [name for name in fitted.law.inputs if name not in target]
    require(not missing, f"--at must give {', '.join(fitted.law.inputs)} for --law {fitted.law.name}: it lacks "
                         f"{', '.join(missing)}")
    columns = {name: np.array([target[name]], float) for name in fitted.law.inputs}
    errors = prediction_errors(fitted, analysis.found.stated, fitted.residuals(analysis.runs), columns,
                               np.random.default_rng([seed, 4]))
    middle = float(fitted.log_loss(columns)[0])
    low, high = percentile(errors[:, 0], analysis.level)
    return math.exp(middle), (math.exp(middle + low), math.exp(middle + high))


def seal(analysis: Analysis, path: Path, out: Path, target: Mapping[str, float], config: RunConfig | None,
         options: Mapping[str, Any]) -> dict[str, Any]:
    """Writes OUT/forecast.json, with a copy of the data beside it. Raises ConfigError where there is one already."""
    require(not (out / FILE).exists(), f"--out {out} holds a sealed forecast already: choose another folder")
    same = hashlib.sha256(path.read_bytes()).hexdigest() == analysis.runs.sha256
    require(same, f"{path} was changed while it was read")
    prediction, interval = predict(analysis, target, analysis.seed)
    fitted = analysis.fitted
    said = {
        "format": FORMAT, "law": fitted.law.name, "equation": fitted.law.equation, "quantity": fitted.law.target,
        "target": dict(target), "prediction": prediction, "interval": list(interval), "level": analysis.level,
        "verdict": analysis.verdict, "params": {name: row["value"] for name, row in analysis.table.items()},
        "n": len(analysis.runs), "options": dict(options),
        "config": None if config is None else to_dict(config),
        "data": {"path": os.path.relpath(path, out), "copy": COPY + path.suffix, "sha256": analysis.runs.sha256},
        "code": {"version": __version__, "sha256": code_digest()},
        "sealed_at": time.time(),
    }
    document = {**json.loads(json.dumps(said)), "seal": digest(said)}
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, out / document["data"]["copy"])
    (out / FILE).write_text(json.dumps(document, indent=2) + "\n")
    return document


def digest(said: Mapping[str, Any]) -> str:
    """SHA-256 of everything but the seal, whatever the file's layout."""
    plain = {name: value for name, value in said.items() if name != "seal"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def code_digest() -> str:
    """SHA-256 over the modules that make a forecast: those of this package, by name."""
    total = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        total.update(f"{path.name}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def opened(out: Path, known_seal: str | None, *, other_code: bool) -> dict[str, Any]:
    """The forecast in the folder `out`. Raises ConfigError where there is none, SealError where it, its data or the
    code is not what was sealed."""
    path = out / FILE
    require(path.is_file(), f"{out}: no {FILE}; give the folder that `maxlm forecast seal` wrote")
    try:
        document = json.loads(path.read_text())
        sealed, data, code = document["seal"], document["data"], document["code"]
    except (ValueError, KeyError, TypeError):
        raise SealError(f"{path} is damaged: it is not the document that was sealed") from None
    if digest(document) != sealed:
        raise SealError(f"{path} was edited after it was sealed: its content has digest {digest(document)[:16]}, its "
                        f"seal is {str(sealed)[:16]}")
    if known_seal is not None and known_seal != sealed:
        raise SealError(f"{path} was sealed anew: its seal is {sealed}, not {known_seal}")
    for where in (out / data["copy"], out / data["path"]):
        if where.exists() and hashlib.sha256(where.read_bytes()).hexdigest() != data["sha256"]:
            raise SealError(f"{where} was edited after the forecast was sealed: restore it, or move it away")
    if not (out / data["copy"]).exists():
        raise SealError(f"{out / data['copy']} is gone: the forecast cannot be checked without its data")
    if code["sha256"] != code_digest() and not other_code:
        raise SealError("the code of maxlm/scaling is not what the forecast was sealed with (maxlm "
                        f"{code['version']}, digest {code['sha256'][:16]}; now {code_digest()[:16]}): check that "
                        "version out, or grade the sealed numbers as they stand with --other-code")
    return document


def score(out: Path, *, run_dir: Path | None, loss: float | None, known_seal: str | None = None,
          other_code: bool = False) -> dict[str, Any]:
    """Grades the forecast in `out` against a finished run, or a loss measured elsewhere; writes OUT/score.json."""
    require((run_dir is None) != (loss is None), "give --run-dir or --loss, one of them")
    document = opened(out, known_seal, other_code=other_code)
    started = None
    if run_dir is not None:
        loss, started = _result(run_dir, document)
    require(loss is not None and math.isfinite(loss) and loss > 0, f"--loss {loss} must be a number above 0")
    low, high = document["interval"]
    graded = {
        "observed": loss, "prediction": document["prediction"], "interval": [low, high], "level": document["level"],
        "relative_error": document["prediction"] / loss - 1, "inside": low <= loss <= high,
        "interval_width": (high - low) / document["prediction"], "seal": document["seal"],
        "sealed_before_the_run": None if started is None else document["sealed_at"] < started,
        "same_code": document["code"]["sha256"] == code_digest(), "sealed_verdict": document["verdict"],
        "run": None if run_dir is None else str(run_dir),
    }
    graded["verdict"] = _verdict(graded)
    (out / SCORE).write_text(json.dumps(graded, indent=2) + "\n")
    return graded


def _verdict(graded: Mapping[str, Any]) -> str:
    low, high = graded["interval"]
    place = "inside" if graded["inside"] else "outside"
    way = "above" if graded["relative_error"] > 0 else "below"
    text = (f"{'hit' if graded['inside'] else 'miss'}: predicted {graded['prediction']:.4f}, "
            f"{abs(graded['relative_error']):.2%} {way} the observed {graded['observed']:.4f}, which lies {place} "
            f"the {graded['level']:.0%} interval [{low:.4f}, {high:.4f}]")
    late = graded["sealed_before_the_run"] is False
    return f"no forecast, the run began before the seal; {text}" if late else text


def _result(run_dir: Path, document: Mapping[str, Any]) -> tuple[float, float]:
    """(held-out loss, when the first row was written) of the finished run that was forecast."""
    require((run_dir / "DONE").exists(), f"--run-dir {run_dir} is not a finished run: there is no DONE in it")
    config, rows = load_config(run_dir / "config.json"), metrics(run_dir)
    evaluations = [row for row in rows if row.get("eval_loss") is not None]
    require(bool(evaluations), f"--run-dir {run_dir} has no held-out loss in its metrics.jsonl")
    if document["config"] is not None:
        sealed = from_dict(RunConfig, document["config"])
        changed = training_difference(sealed, config)
        changed = [line for line in changed if not line.startswith("data.source")]  # prepared before, or by the run
        if sealed.train.num_steps != config.train.num_steps:
            changed.append(f"train.num_steps: {sealed.train.num_steps} -> {config.train.num_steps}")
        require(not changed, f"--run-dir {run_dir} is not the run that was forecast: {'; '.join(changed)}")
    else:
        measured = {"params": parameter_count(config.model).total, "tokens": evaluations[-1]["tokens"]}
        for name in measured.keys() & document["target"].keys():
            wanted = document["target"][name]
            require(abs(measured[name] / wanted - 1) <= SAME_SIZE,
                    f"--run-dir {run_dir} is not the run that was forecast: it has {measured[name]:.4g} {name}, the "
                    f"forecast is for {wanted:.4g}")
    return evaluations[-1]["eval_loss"], rows[0]["time"]


def parse_target(text: str) -> dict[str, float]:
    """'params=1e9,tokens=2e10' as numbers."""
    pairs = [part.split("=", 1) for part in text.split(",") if part.strip()]
    try:
        found = {name.strip(): float(value) for name, value in pairs}
    except ValueError:
        raise ConfigError(f"--at {text!r} must read COLUMN=NUMBER,... such as params=1e9,tokens=2e10") from None
    require(bool(found) and all(math.isfinite(value) and value > 0 for value in found.values()),
            f"--at {text!r} must give numbers above 0, such as params=1e9,tokens=2e10")
    return found
