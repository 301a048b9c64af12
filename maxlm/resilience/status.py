"""How a run stands, read from what it writes: the `maxlm status` of a run directory. Touches nothing."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from maxlm.checkpoint import complete_steps
from maxlm.resilience.goodput import CATEGORIES, FILE, SAVE_SECONDS, read_goodput, started_of
from maxlm.resilience.ledger import read_ledger
from maxlm.resilience.run_lock import LOCK_FILE
from maxlm.schema import ConfigError

WATCHDOG = "watchdog"
SILENT_SECONDS = 60.0  # without a sign of life: a process that was stopped, or a host that is gone


def status(run_dir: Path) -> dict[str, Any]:
    """The run's `state`, step, tokens, loss, newest checkpoint, goodput, and what went wrong, as JSON values.

    state: 'running'; 'hung' (alive without a sign of life, or ended by its watchdog); 'done'; 'preempted' (stopped on
    request and saved); 'stopped' (killed, failed, or stopped for its own safety). Raises ConfigError where `run_dir`
    is not a run directory.
    """
    config = _json(run_dir / "config.json")
    if config is None:
        raise ConfigError(f"--run-dir {run_dir}: no run has started there; give the folder that `maxlm train` wrote")
    rows, ledger, goodput = _rows(run_dir / "metrics.jsonl"), read_ledger(run_dir), read_goodput(run_dir)
    kinds = [record["kind"] for record in ledger.records]
    rollbacks = {tuple(r["skipped"]) for r in ledger.records if r["kind"] == "rollback"}  # a restart may repeat one
    steps = [record for record in ledger.records if record["kind"] == "step"]
    trained = [row for row in rows if row.get("loss") is not None]
    checkpoints = complete_steps(run_dir / "checkpoints")
    marks = sorted(path.name for path in (run_dir / WATCHDOG).glob("*.json"))
    return {
        "state": _state(run_dir, rows, goodput),
        "step": steps[-1]["step"] if steps else 0,
        "num_steps": config["train"]["num_steps"],
        "tokens": rows[-1]["tokens"] if rows else 0,
        "loss": trained[-1]["loss"] if trained else None,
        "checkpoint": checkpoints[-1] if checkpoints else None,
        "starts": kinds.count("start"),
        "skipped_updates": trained[-1].get("skipped_updates", 0) if trained else 0,
        "spikes": trained[-1].get("spikes", 0) if trained else 0,
        "rollbacks": len(rollbacks),
        "nondeterminism": [r["step"] for r in ledger.records if r["kind"] == "nondeterminism"],
        "ledger_lines": len(ledger.records) + len(ledger.damaged),
        "ledger_lines_altered": ledger.damaged,
        "watchdog": marks,
        "goodput": goodput,
    }


def table(found: dict[str, Any]) -> str:
    """`status` for a person."""
    loss = "none yet" if found["loss"] is None else f"{found['loss']:.4f}"
    lines = [
        f"{'state':14}{found['state']}",
        f"{'step':14}{found['step']:,} of {found['num_steps']:,}",
        f"{'tokens':14}{found['tokens']:,}",
        f"{'loss':14}{loss}",
        f"{'checkpoint':14}{'none' if found['checkpoint'] is None else found['checkpoint']}",
        f"{'starts':14}{found['starts']}",
        f"{'anomalies':14}{found['skipped_updates']} updates skipped, {found['spikes']} spikes of the loss, "
        f"{found['rollbacks']} rollbacks",
        f"{'ledger':14}{found['ledger_lines']:,} lines, " + _list("altered at line", found["ledger_lines_altered"],
                                                                 "intact"),
    ]
    if found["nondeterminism"]:
        lines.append(f"{'other bits':14}{_list('when made again: step', found['nondeterminism'], '')}")
    if found["watchdog"]:
        lines.append(f"{'watchdog':14}{', '.join(found['watchdog'])}")
    if found["goodput"]:
        lines += ["", f"{'wall time':14}{'seconds':>12}{'share':>9}"]
        seconds, share = found["goodput"]["seconds"], found["goodput"]["share"]
        lines += [f"{name:14}{seconds[name]:>12,.1f}{share[name]:>9.2%}" for name in CATEGORIES if seconds.get(name)]
        lines.append(f"{'total':14}{found['goodput']['wall_seconds']:>12,.1f}")
    return "\n".join(lines)


def _state(run_dir: Path, rows: list[dict[str, Any]], goodput: dict[str, Any] | None) -> str:
    holder = _json(run_dir / LOCK_FILE)
    if holder and _holds(holder, goodput):
        signs = [path.stat().st_mtime for path in (run_dir / FILE, run_dir / LOCK_FILE) if path.exists()]
        return "running" if time.time() - max(signs) < SILENT_SECONDS else "hung"
    if (run_dir / "DONE").exists():
        return "done"
    marks = [path.stat().st_mtime for path in (run_dir / WATCHDOG).glob("*.json")]
    if marks and max(marks) >= (goodput["process"]["started"] if goodput else 0.0):
        return "hung"
    return "preempted" if rows and rows[-1].get("preempted") else "stopped"


def _holds(holder: dict[str, Any], goodput: dict[str, Any] | None) -> bool:
    """Whether the process that last took the run's lock is still at it. Of another host only what it writes shows."""
    ended = goodput and goodput["updated"] >= holder["since"] and goodput["process"]["ended"]
    if ended:
        return False
    if holder["host"] != socket.gethostname():
        return goodput is not None and time.time() - goodput["updated"] < SILENT_SECONDS + SAVE_SECONDS
    started = started_of(holder["pid"])
    return started is not None and started <= holder["since"] + 1.0  # another process may have got its number since


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut short by a kill
            break
    return rows


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _list(before: str, numbers: list[int], otherwise: str) -> str:
    if not numbers:
        return otherwise
    return f"{before} {', '.join(map(str, numbers[:5]))}" + (", ..." if len(numbers) > 5 else "")
