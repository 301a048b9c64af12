"""What the faults came to, as a table: Markdown for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.chaos.faults import DESCRIPTION, Plan
from tests.chaos.scenario import EXIT_BOUND, Strike

CHECKS = {"digest": "wrong digests", "lost": "lost steps", "hang": "hangs", "exit": "wrong exits",
          "books": "broken books"}
PACKAGES = ("maxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
Results = Sequence[tuple[Plan, list[Strike]]]


def record(results: Results, **about: Any) -> dict[str, Any]:
    """Everything, as one JSON object. about: what was asked for (seed, bounds)."""
    root = Path(__file__).parents[2]
    return about | {
        "commit": _said("git", "-C", root, "rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_said("git", "-C", root, "status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "totals": _row([strike for _, strikes in results for strike in strikes]),
        "rows": [{"fault": kind, "processes": processes} | _row(strikes)
                 for (kind, processes), strikes in _groups(results).items()],
        "scenarios": [
            {"index": plan.index, "processes": plan.processes, "eight_bit": plan.eight_bit,
             "strikes": [dataclasses.asdict(strike) for strike in strikes]}
            for plan, strikes in sorted(results, key=lambda result: result[0].index)
        ],
    }


def summary(record: dict[str, Any]) -> str:
    """The table, in Markdown."""
    head = ["fault", "processes", "faults", *CHECKS.values(), "restarts", "slowest exit (s)", "CPU s a fault",
            "seconds a fault"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in record["rows"]:
        lines.append([DESCRIPTION[row["fault"]], str(row["processes"]), *_cells(row)])
    lines.append(["**all**", "", *_cells(record["totals"])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def document(record: dict[str, Any]) -> str:
    """docs/CHAOS.md."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    eight_bit = sum(run["eight_bit"] for run in record["scenarios"])
    return f"""# {record["totals"]["faults"]} faults

Made by `scripts/chaos.py --seed {record["seed"]}`, not by hand; how it works and what it checks is in
docs/RESILIENCE.md. {record["date"]}, commit {record["commit"]}, {record["machine"]}, {record["lanes"]} runs at a time,
{eight_bit} of {len(record["scenarios"])} runs with FP8 products and moments of 8 bits,
{record["wall_seconds"] / 60:.0f} minutes. {versions}.

{summary(record)}

- *wrong digests*: parameters, at the next checkpoint or at the end, or rows of `metrics.jsonl`, that differ from
  those of the run that nothing disturbed.
- *lost steps*: a start that went on from less than the newest complete checkpoint.
- *hangs*: processes still there {EXIT_BOUND:.0f} s after the fault; *slowest exit* is the longest any took.
- *wrong exits*: an exit code that is not what README.md says, or a run that could not be brought to its end.
- *restarts*: starts after a fault. *seconds a fault*: all of reaching the moment, the fault, and its end.
"""


def problems(results: Results) -> list[str]:
    """One line for each violated check."""
    return [
        f"scenario {plan.index} ({plan.processes} processes), '{strike.fault.kind}' {strike.fault.detail}"
        f" at {strike.fault.moment} {strike.fault.step}: {check}: {words}"
        for plan, strikes in results for strike in strikes for check, words in strike.problems
    ]


def _groups(results: Results) -> dict[tuple[str, int], list[Strike]]:
    groups: dict[tuple[str, int], list[Strike]] = {}
    for kind in DESCRIPTION:
        for processes in (1, 2, 4):
            found = [s for plan, strikes in results for s in strikes
                     if (s.fault.kind, plan.processes) == (kind, processes)]
            if found:
                groups[kind, processes] = found
    return groups


def _row(strikes: list[Strike]) -> dict[str, Any]:
    landed = [strike for strike in strikes if strike.landed]
    return {"faults": len(landed), "missed": len(strikes) - len(landed)} | {
        name: sum(1 for strike in strikes if any(found == check for found, _ in strike.problems))
        for check, name in CHECKS.items()
    } | {
        "restarts": sum(strike.restarts for strike in strikes),
        "slowest_exit_seconds": round(max((strike.exit_seconds for strike in strikes), default=0.0), 1),
        "cpu_seconds": round(sum(strike.cpu_seconds for strike in strikes), 1),
        "seconds": round(sum(strike.seconds for strike in strikes), 1),
    }


def _cells(row: dict[str, Any]) -> list[str]:
    return [str(row["faults"]), *(str(row[name]) for name in CHECKS.values()), str(row["restarts"]),
            f"{row['slowest_exit_seconds']:.1f}",
            f"{row['cpu_seconds'] / max(row['faults'], 1):.1f}", f"{row['seconds'] / max(row['faults'], 1):.1f}"]


def _version(package: str) -> str:
    import maxlm

    return maxlm.__version__ if package == "maxlm" else importlib.metadata.version(package)


def _said(*words: object) -> str:
    return subprocess.run(list(map(str, words)), capture_output=True, text=True).stdout.strip()


class Display:
    """Shows results as they come: a bar on a terminal, lines elsewhere; what failed on both."""

    def __init__(self, faults: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True)
        self._bar = Progress(TextColumn("faults"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                             console=self._console, disable=not self._console.is_terminal)
        self._faults, self._done = faults, 0

    def __enter__(self) -> Display:
        self._task = self._bar.add_task("", total=self._faults)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def add(self, result: tuple[Plan, list[Strike]]) -> None:
        plan, strikes = result
        if not self._done:
            self._bar.start()
        self._done += len(strikes)
        self._bar.update(self._task, completed=self._done)
        wrong = problems([result])
        if wrong or not self._console.is_terminal:
            seconds = sum(strike.seconds for strike in strikes)
            met = ", ".join(strike.fault.kind + ("" if strike.landed else " (missed)") for strike in strikes)
            how = f"{plan.processes} processes{', 8 bits' if plan.eight_bit else ''}"
            print(f"[{self._done}/{self._faults}] scenario {plan.index}, {how}, {seconds:.1f} s: {met}",
                  file=sys.stderr, flush=True)
        for line in wrong:
            print(f"  FAILED {line}", file=sys.stderr, flush=True)
