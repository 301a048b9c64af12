"""Writes what a fit found: `fit.json` for programs, `report.md` for a paper or a colleague, `fit.png` beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from maxlm import __version__
from maxlm.scaling.analysis import Analysis
from maxlm.scaling.holdout import Assessment
from maxlm.scaling.plot import draw

NOTHING = 1e-12  # shown as 0
FRONTIER = ("params", "tokens", "tokens_per_param", "loss")


def write(analysis: Analysis, out: Path) -> None:
    """`fit.json`, `report.md` and `fit.png` in the folder `out`, which is made where it is missing."""
    out.mkdir(parents=True, exist_ok=True)
    draw(analysis, out / "fit.png")
    (out / "report.md").write_text(markdown(analysis), encoding="utf-8")
    (out / "fit.json").write_text(json.dumps(_plain(record(analysis)), indent=2) + "\n", encoding="utf-8")


def record(analysis: Analysis) -> dict[str, object]:
    """The content of `fit.json`."""
    fitted, runs, details = analysis.fitted, analysis.runs, analysis.diagnostics
    column = lambda name: {key: row[name] for key, row in analysis.table.items()}  # noqa: E731
    return {
        "law": fitted.law.name, "params": column("value"), "interval": column("interval"), "level": analysis.level,
        "n": len(runs), "objective": fitted.objective,
        "holdout": None if analysis.holdout is None else
        {"condition": analysis.condition, **_assessed(analysis.holdout)},
        "data_sha256": runs.sha256,
        "verdict": analysis.verdict, "warnings": details.warnings, "notes": list(runs.notes),
        "equation": fitted.law.equation, "source": fitted.law.source, "data": runs.source, "version": __version__,
        "interval_method": f"percentile, {analysis.found.method}",
        "bootstrap": {"replicates": analysis.replicates, "seed": analysis.seed,
                      "independent_runs": int(runs.cluster.max()) + 1, "sd": column("sd")},
        "row_resampling": {"sd": column("row_sd"), "percentile": column("row_percentile"), "bca": column("row_bca")},
        "profile": analysis.profiles,
        "frontier": [{"flops": flops, **{name: table[name]["value"] for name in FRONTIER},
                      "interval": {name: table[name]["interval"] for name in FRONTIER}}
                     for flops, table in zip(analysis.flops, analysis.frontier, strict=True)],
        "flops_per_param_token": analysis.per_param_token, "frontier_held": dict(fitted.held),
        "leave_top_budget_out": analysis.next_budget if isinstance(analysis.next_budget, str) else
        _assessed(analysis.next_budget),
        "seed_noise": None if analysis.seed_noise is None else
        {"sd_log_loss": analysis.seed_noise[0], "degrees_of_freedom": analysis.seed_noise[1]},
        "diagnostics": {"residual_sd": details.residual_sd, "largest_residual": details.largest_residual,
                        "largest_residual_line": details.largest_residual_line, "condition": details.condition,
                        "flattest_direction": details.flattest,
                        "by_budget": [{"flops": c, "n": n, "mean_residual": mean}
                                      for c, n, mean in details.budget_residuals]},
        "minimises": fitted.law.method, "starts": fitted.num_starts, "starts_at_optimum": fitted.starts_at_optimum,
        "seconds": analysis.seconds,
    }


def _assessed(seen: Assessment) -> dict[str, object]:
    rows = zip(seen.lines, seen.observed, seen.predicted, seen.relative_errors, seen.interval, strict=True)
    return {
        "n": seen.n, "verdict": seen.verdict, "biased": seen.biased, "mean_error": seen.bias,
        "mean_error_interval": seen.bias_interval, "inside": seen.inside,
        "runs": [{"line": line, "observed": observed, "predicted": predicted, "relative_error": error,
                  "interval": ends} for line, observed, predicted, error, ends in rows],
    }


def _plain(value: object) -> object:
    """With plain numbers, and null for what is not a number: strict JSON."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(inner) for inner in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else bool(value) if isinstance(value, np.bool_) else value


def markdown(analysis: Analysis) -> str:
    """The text of `report.md`."""
    fitted, runs, details = analysis.fitted, analysis.runs, analysis.diagnostics
    parts = [
        f"# {fitted.law.title}: {runs.source}", "",
        f"    {fitted.law.equation}", "",
        f"{fitted.law.source}. Fitted to {len(runs)} rows of {int(runs.cluster.max()) + 1} independent runs, "
        f"minimising {fitted.law.method}; objective {fitted.objective:.9g}, reached from "
        f"{fitted.starts_at_optimum} of {fitted.num_starts} starts.", "",
        f"**Verdict: {analysis.verdict}.**", "",
        *(f"- Warning: {line}." for line in details.warnings), *(f"- Note: {line}." for line in runs.notes), "",
        *_table(("parameter", "estimate", f"{analysis.level:.0%} interval", "sd", "row resampling", "BCa", "profile"),
                (_parameter_row(name, row, analysis.profiles.get(name)) for name, row in analysis.table.items())), "",
        f"Intervals: percentiles of {analysis.replicates} bootstrap fits ({analysis.found.method}). Beside them, as a "
        "check: resampled runs (percentile and BCa) and the profile of the objective.", "",
        *_frontier_section(analysis), *_unseen_section(analysis),
        "## Residuals", "",
        f"Robust standard deviation {details.residual_sd:.3%}; largest {details.largest_residual:+.2%} (line "
        f"{details.largest_residual_line}). Condition number of the scaled Jacobian {details.condition:.3g}."
        + ("" if analysis.seed_noise is None else
           f" Repeated runs differ by {analysis.seed_noise[0]:.3%} (standard deviation, {analysis.seed_noise[1]} "
           "degrees of freedom): no law can be closer than that."), "",
        f"maxlm {__version__}; data SHA-256 `{runs.sha256}`; seed {analysis.seed}.", "",
        "![loss, frontier and residuals](fit.png)", "",
    ]
    return "\n".join(parts)


def _frontier_section(analysis: Analysis) -> list[str]:
    if not analysis.flops:
        return []
    rows = ([f"{flops:.3g}", *(f"{_short(table[name]['value'])} {_ends(table[name]['interval'])}" for name in FRONTIER)]
            for flops, table in zip(analysis.flops, analysis.frontier, strict=True))
    held = "".join(f" {name}{' / params' if analysis.fitted.law.held[name] == 'share' else ''} = {value:.4g}."
                   for name, value in analysis.fitted.held.items())
    return ["## Compute-optimal frontier", "", f"C = {analysis.per_param_token:.4g} N D.{held}", "",
            *_table(("C", "N*", "D*", "D*/N*", "loss"), rows), ""]


def _unseen_section(analysis: Analysis) -> list[str]:
    parts = []
    for title, seen in (("Largest budget left out", analysis.next_budget),
                        (f"Held out: {analysis.condition}", analysis.holdout)):
        if seen is None:
            continue
        parts += [f"## {title}", ""]
        if isinstance(seen, str):
            parts += [f"{seen}.", ""]
            continue
        parts += [f"{seen.verdict}.", ""]
        rows = zip(seen.lines, seen.observed, seen.predicted, seen.interval, seen.relative_errors, strict=True)
        parts += [*_table(("line", "observed", "predicted", "interval", "error"),
                          ([str(line), _short(o), _short(p), _ends(ends), f"{error:+.2%}"]
                           for line, o, p, ends, error in rows)), ""]
    return parts


def _parameter_row(name: str, row: dict, profile: tuple[float, float] | None) -> list[str]:
    return [name, _short(row["value"]), _ends(row["interval"]), _short(row["sd"]), _ends(row["row_percentile"]),
            _ends(row["row_bca"]), "" if profile is None else _ends(profile)]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def _short(value: float) -> str:
    return "0" if abs(value) < NOTHING else f"{value:.4g}"


def _ends(ends: tuple[float, float]) -> str:
    return f"[{_short(ends[0])}, {_short(ends[1])}]"


def summary(analysis: Analysis) -> str:
    """What the command line prints: the parameters, the frontier, the verdict and every warning."""
    rows = [f"  {name:>8}  {_short(row['value']):>10}  {_ends(row['interval'])}"
            for name, row in analysis.table.items()]
    ahead = [f"  C {flops:.3g}: N* {_short(t['params']['value'])} {_ends(t['params']['interval'])}, "
             f"D*/N* {_short(t['tokens_per_param']['value'])}, loss {_short(t['loss']['value'])} "
             f"{_ends(t['loss']['interval'])}" for flops, t in zip(analysis.flops, analysis.frontier, strict=True)]
    seen = [] if analysis.holdout is None else [f"held out ({analysis.condition}): {analysis.holdout.verdict}"]
    return "\n".join([
        f"{analysis.fitted.law.equation}   ({len(analysis.runs)} runs, objective {analysis.fitted.objective:.9g}, "
        f"{analysis.level:.0%} intervals)", *rows, *ahead, *seen, f"verdict: {analysis.verdict}",
        *(f"warning: {line}" for line in analysis.diagnostics.warnings),
        *(f"note: {line}" for line in analysis.runs.notes),
    ])
