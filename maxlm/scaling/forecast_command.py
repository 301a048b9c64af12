"""The `forecast` verbs: seal, score, next. Nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maxlm.schema import ConfigError, require

if TYPE_CHECKING:
    from maxlm.scaling.analysis import Analysis

BROKEN_SEAL = 3


def add_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """`verb(name, function, help)` makes one of them."""
    sealing = verb("seal", seal, "write a prediction with digests of its data and code, before the run")
    _add_fit(sealing)
    sealing.add_argument("--out", required=True, type=Path, help="folder for forecast.json and a copy of the data")
    sealing.add_argument("--config", help="the run's config: its size is the target, and it is sealed too")
    sealing.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    scoring = verb("score", score, "grade a sealed forecast against the finished run")
    scoring.add_argument("forecast", type=Path, metavar="DIR", help="the folder that `forecast seal` wrote")
    scoring.add_argument("--run-dir", type=Path, help="the finished run")
    scoring.add_argument("--loss", type=float, help="or its held-out loss, where another trainer ran it")
    scoring.add_argument("--seal", help="the seal as it was written down elsewhere")
    scoring.add_argument("--other-code", action="store_true", help="grade the sealed numbers with another maxlm's code")
    coming = verb("next", propose, "propose the run that narrows a forecast most per chip-hour")
    _add_fit(coming)
    coming.add_argument("--max-flops", type=float, help="of a run to propose (default: the largest fitted)")
    coming.add_argument("--flops-per-second", type=float, help="that a chip reaches (default: what these runs reached, "
                                                               "from their column seconds)")
    coming.add_argument("--startup-seconds", type=float, default=30.0, help="of each run (default: 30)")
    coming.add_argument("--top", type=int, default=5, metavar="N", help="runs to show (default: 5)")


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, metavar="RUNS", help="runs.jsonl, or a CSV with a header")
    parser.add_argument("--law", required=True)
    parser.add_argument("--at", default="", metavar="COLUMN=NUMBER,...", help="the target: params=1e9,tokens=2e10")
    parser.add_argument("--columns", default="", metavar="OURS=THEIRS,...")
    parser.add_argument("--where", default="", metavar="EXPR")
    parser.add_argument("--bootstrap", type=int, default=4000, metavar="N")
    parser.add_argument("--level", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)


def _analysis(arguments: argparse.Namespace) -> Analysis:
    from maxlm.scaling.analysis import analyse
    from maxlm.scaling.command import read_for

    law, runs = read_for(arguments.law, arguments.runs, arguments.columns, arguments.where)
    return analyse(law, runs, replicates=arguments.bootstrap, level=arguments.level, seed=arguments.seed)


def seal(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for a user's mistake."""
    from maxlm.flops import parameter_count
    from maxlm.overrides import apply_overrides, load_config
    from maxlm.scaling import forecast
    from maxlm.scaling.cost import tokens_of
    from maxlm.scaling.grid import flops_per_step

    require(bool(arguments.at) != bool(arguments.config), "give the target by --at or by --config, one of them")
    require(bool(arguments.config) or not arguments.overrides, "--set changes the config of --config: give both")
    config = None
    if arguments.config:
        config = apply_overrides(load_config(arguments.config), arguments.overrides)
        target = {"params": float(parameter_count(config.model).total), "tokens": float(tokens_of(config)),
                  "flops": flops_per_step(config) * config.train.num_steps}
    else:
        target = forecast.parse_target(arguments.at)
    analysis = _analysis(arguments)
    options = {name: getattr(arguments, name) for name in ("columns", "where", "bootstrap", "seed")}
    document = forecast.seal(analysis, arguments.runs, arguments.out, target, config, options)
    low, high = document["interval"]
    print(f"{document['quantity']} of {_named(document['target'])}: {document['prediction']:.4f} "
          f"[{low:.4f}, {high:.4f}] ({document['level']:.0%})")
    print(f"verdict: {document['verdict']}")
    print(f"seal {document['seal']} (write it down where {arguments.out} cannot be changed with it)")


def score(arguments: argparse.Namespace) -> int:
    from maxlm.scaling import forecast

    try:
        graded = forecast.score(arguments.forecast, run_dir=arguments.run_dir, loss=arguments.loss,
                                known_seal=arguments.seal, other_code=arguments.other_code)
    except forecast.SealError as broken:
        print(f"maxlm: {broken}", file=sys.stderr)
        return BROKEN_SEAL
    print(graded["verdict"], file=sys.stderr)
    print(json.dumps(graded))
    return 0


def propose(arguments: argparse.Namespace) -> None:
    from maxlm.scaling import forecast
    from maxlm.scaling.design import candidates

    require(bool(arguments.at), "give the target by --at, such as --at params=1e9,tokens=2e10")
    require(arguments.startup_seconds >= 0, "--startup-seconds must be 0 or more")
    require(arguments.top > 0, "--top must be 1 or more")
    target = forecast.parse_target(arguments.at)
    analysis = _analysis(arguments)
    prediction, (low, high) = forecast.predict(analysis, target, arguments.seed)
    rate = arguments.flops_per_second or _reached(analysis)
    require(rate > 0, f"--flops-per-second {rate} must be above 0")
    most = arguments.max_flops or float(analysis.runs.columns["flops"].max())
    found = candidates(analysis, target, most_flops=most, flops_per_second=rate,
                       startup_seconds=arguments.startup_seconds)
    print(f"{_named(target)}: {prediction:.4f} [{low:.4f}, {high:.4f}]; a chip at {rate:.3g} FLOP/s")
    print(f"{'params':>10} {'tokens':>10} {'FLOPs':>10} {'chip-hours':>11} {'narrower':>9} {'an hour':>9}")
    for run in found[: arguments.top]:
        print(f"{run.params:>10.4g} {run.tokens:>10.4g} {run.flops:>10.3e} {run.hours:>11.4g} {run.narrower:>9.2%} "
              f"{run.per_hour:>9.2%}")


def _reached(analysis: Any) -> float:
    """FLOP/s of the runs that were fitted, from their column `seconds`."""
    import numpy as np

    from maxlm.scaling.runs import numbers

    cells = analysis.runs.cells
    if "seconds" not in cells:
        raise ConfigError("these runs have no column seconds: give --flops-per-second, what a chip reaches")
    seconds = numbers(cells["seconds"])
    good = np.isfinite(seconds) & (seconds > 0)
    require(bool(good.any()), "no run has a number in its column seconds: give --flops-per-second")
    return float(np.median(analysis.runs.columns["flops"][good] / seconds[good]))


def _named(target: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in target.items())
