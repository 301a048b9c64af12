"""The `fit` verb: its options, and reading, fitting and writing in order. Nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from maxlm.schema import not_negative

if TYPE_CHECKING:
    from maxlm.scaling.laws import Law
    from maxlm.scaling.runs import Runs


def add_options(fit: argparse.ArgumentParser) -> None:
    fit.add_argument("runs", type=Path, metavar="RUNS", help="runs.jsonl, or a CSV with a header")
    fit.add_argument("--law", required=True, help="chinchilla, kaplan, compute, ...: docs/SCALING.md lists them")
    fit.add_argument("--out", required=True, type=Path, help="folder for fit.json, report.md and fit.png")
    fit.add_argument("--columns", default="", metavar="OURS=THEIRS,...", help="such as params=N,tokens=D,loss=val")
    fit.add_argument("--where", default="", metavar="EXPR", help="fit only these rows: 'params>1e7 and lr==0.01'")
    fit.add_argument("--holdout", default="", metavar="EXPR", help="leave these out and predict them: 'flops>1e21'")
    fit.add_argument("--bootstrap", type=int, default=4000, metavar="N", help="replicates (default: 4000)")
    fit.add_argument("--level", type=float, default=0.95, help="of the intervals (default: 0.95)")
    fit.add_argument("--at-flops", type=float, nargs="+", default=[], metavar="C",
                     help="budgets to add to the frontier (default: 1, 10 and 100 times the largest)")
    fit.add_argument("--seed", type=int, default=0, help="of the bootstrap, 0 or more")


def fit(arguments: argparse.Namespace) -> None:
    """Writes fit.json, report.md and fit.png and prints a summary. Raises ConfigError for a user's mistake."""
    not_negative("fit", seed=arguments.seed)
    from maxlm.scaling.analysis import analyse
    from maxlm.scaling.report import summary, write

    law, runs = read_for(arguments.law, arguments.runs, arguments.columns, arguments.where)
    analysis = analyse(law, runs, replicates=arguments.bootstrap, level=arguments.level, seed=arguments.seed,
                       holdout=arguments.holdout, at_flops=arguments.at_flops)
    write(analysis, arguments.out)
    print(summary(analysis))


def read_for(name: str, path: Path, columns: str, where: str) -> tuple[Law, Runs]:
    """The law called `name` and the rows of a file as it takes them. Raises ConfigError for a user's mistake."""
    from maxlm.scaling.laws import find_law
    from maxlm.scaling.runs import column_names, lowest, parse_columns, read_runs

    renamed = parse_columns(columns)
    law = find_law(name, [*renamed, *column_names(path)])
    optional = (law.lowest,) if law.lowest else ()
    runs = read_runs(path, law.needed, renamed, where, optional, may_be_zero=law.inputs if law.shares else ())
    if law.prepare:
        runs = law.prepare(runs)
    return law, lowest(runs, law.inputs, law.lowest) if law.lowest else runs
