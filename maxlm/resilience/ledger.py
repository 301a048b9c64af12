"""The ledger of a run: what each step was made of and what came out, append-only and checksummed.

RUN_DIR/ledger.jsonl holds one JSON object a line. `kind` is one of
    start           a process began: the step it goes on from, its `lineage` and `environment`, digests of its state
    step            a finished step: data `index`, digest of the `batch`, `loss` and `grad_norm` as hexadecimal floats,
                    and every few steps digests of the state
    nondeterminism  a step made again gave other bits than before
    rollback        the run went back `to` a step by itself, to leave out the batches of the indices `skipped`
    damage          lines that were found altered or missing when a process started
The last field, `chain`, is a checksum over the line and the whole line before, so that a line that was edited, removed
or moved shows. Digests are those of training/digest.py; this module sees text alone.

Lines are written by a thread, so that a slow file system costs a step nothing. A kill loses at most what that thread
had not yet written; a last line cut short is trimmed by the next start. Lines of steps that a restart makes again stay.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "ledger.jsonl"
FORMAT = 1
COMPARED = ("batch", "loss", "grad_norm", "params", "optimizer")
_CHAIN = b', "chain": "'
_FIRST = b"maxlm ledger\n"  # stands for the line before the first
_SYNC_SECONDS = 10.0  # after which what was written is also made to survive the machine


@dataclass
class Reading:
    """What a ledger holds: its complete lines as dicts, the numbers (from 1) of lines whose checksum is wrong, the
    bytes that complete lines take, and the last line as it stands in the file."""

    records: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    size: int = 0
    last: bytes = _FIRST

    def steps(self) -> list[dict[str, Any]]:
        """The step records in order, each with the `lineage` and `environment` of the start it belongs to."""
        found, start = [], {}
        for record in self.records:
            if record["kind"] == "start":
                start = record
            elif record["kind"] == "step":
                found.append(record | {name: start.get(name) for name in ("lineage", "environment")})
        return found


def read_ledger(run_dir: Path) -> Reading:
    """Reads RUN_DIR/ledger.jsonl; nothing where there is none. A last line without its end is not looked at."""
    path = Path(run_dir) / FILE
    reading = Reading()
    if not path.exists():
        return reading
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                body, _, chain = line.rpartition(_CHAIN)
                record = json.loads(line)
                sound = chain == _checksum(reading.last, body).encode() + b'"}\n' and isinstance(record["kind"], str)
            except (ValueError, KeyError, TypeError):
                sound = False
            if sound:
                reading.records.append(record)
            else:
                reading.damaged.append(number)
            reading.last, reading.size = line, reading.size + len(line)
    return reading


class Ledger:
    """The one writer of a run's ledger. `start` first, then `step` for each step, `close` at the end.

    A step made again is compared with the record of the last time, and the first difference is reported on stderr and
    recorded. Records are comparable that have the same data index and the same lineage: the environments (mesh,
    devices, versions, what decides the training) that led to them.
    Raises OSError, from the call after the one that failed, where the file cannot be written.
    """

    def __init__(self, run_dir: Path):
        self.path = Path(run_dir) / FILE
        reading = read_ledger(run_dir)
        self.highest_step = max((r["step"] for r in reading.records if r["kind"] == "step"), default=0)
        self._history = reading.steps()
        self._chains = {record["chain"] for record in reading.records}
        self._earlier: dict[tuple[int, int], dict[str, Any]] = {}
        self._damaged, self._last = reading.damaged, reading.last
        self._reported = False
        if self.path.exists() and self.path.stat().st_size > reading.size:
            os.truncate(self.path, reading.size)  # the line that a kill cut short
        self._file = self.path.open("ab", buffering=0)
        self._size = reading.size
        self._error: OSError | None = None
        self._queue: queue.Queue[bytes | None] = queue.Queue()
        self._thread = threading.Thread(target=self._write, name="ledger", daemon=True)
        self._thread.start()

    @property
    def chain(self) -> str:
        """The checksum of the newest line: kept elsewhere, it shows when the end of the ledger was removed."""
        return json.loads(self._last)["chain"]

    def start(self, step: int, lineage: str, environment: dict[str, Any], *, chain: str | None = None,
              **digests: str) -> None:
        """Records that this process goes on from `step`, and readies the comparison with steps made before.

        chain: of the newest line when the checkpoint of `step` was saved.
        """
        if self._damaged:
            lines = ", ".join(map(str, self._damaged[:5])) + (", ..." if len(self._damaged) > 5 else "")
            _say(f"{self.path.name}: line {lines} was altered or follows a line that was removed; the rest stands")
            self._append({"kind": "damage", "lines": self._damaged[:100]})
        elif chain is not None and chain not in self._chains:
            _say(f"{self.path.name}: lines up to step {step} are missing: its end was removed")
            self._append({"kind": "damage", "missing_up_to_step": step})
        self._lineage = lineage
        self._expect(self._history, step)
        self._history, self._chains = [], set()
        self._append({"kind": "start", "format": FORMAT, "step": step, "lineage": lineage, **digests,
                      "environment": environment})

    def step(self, step: int, *, index: int, **values: str) -> None:
        """Records finished step `step`, made of batch `index`; values: those of COMPARED that are known."""
        self._append({"kind": "step", "step": step, "index": index, **values})
        self.highest_step = max(self.highest_step, step)
        before = self._earlier.pop((step, index), None)
        if before is None or self._reported:
            return
        other = [name for name in COMPARED if name in before and name in values and before[name] != values[name]]
        if other:
            self._reported = True
            was, now = ({name: source[name] for name in other} for source in (before, values))
            self._append({"kind": "nondeterminism", "step": step, "was": was, "now": now})
            _say(f"step {step} was made again and gave another {', '.join(other)} (was {was}, now {now}): the "
                 "computation is not deterministic here, or a device or the storage corrupts data; "
                 f"`maxlm replay --step {step}` says which")

    def rollback(self, to: int, skipped: list[int]) -> None:
        """Records that this process goes back to step `to`; the steps that it makes again are compared."""
        self.flush()
        self._expect(read_ledger(self.path.parent).steps(), to)
        self._append({"kind": "rollback", "to": to, "skipped": skipped})

    def _expect(self, steps: list[dict[str, Any]], after: int) -> None:
        self._earlier = {
            (record["step"], record["index"]): record
            for record in steps if record["step"] > after and record["lineage"] == self._lineage
        }

    def flush(self) -> None:
        """Returns when everything is in the file."""
        self._queue.join()
        self._check()

    def close(self) -> None:
        """Writes what is left. An error that is already being raised is not replaced."""
        self._queue.put(None)
        self._thread.join()
        self._file.close()
        if sys.exc_info()[0] is None:
            self._check()

    def _append(self, record: dict[str, Any]) -> None:
        self._check()
        body = json.dumps(record)[:-1].encode()
        line = body + _CHAIN + _checksum(self._last, body).encode() + b'"}\n'
        self._last = line
        self._queue.put(line)

    def _check(self) -> None:
        if self._error is not None:
            raise OSError(self._error.errno, self._error.strerror, str(self.path)) from self._error

    def _write(self) -> None:
        synced = time.monotonic()
        while (line := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._write_whole(line)
                    if time.monotonic() - synced > _SYNC_SECONDS:
                        os.fsync(self._file.fileno())
                        synced = time.monotonic()
            except OSError as error:
                self._error = error
                with contextlib.suppress(OSError):
                    os.truncate(self.path, self._size)
            finally:
                self._queue.task_done()

    def _write_whole(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._size += len(line)


def lineage_of(environments: list[Any]) -> str:
    """A digest of the environments that a state was computed in, in order and with the step from which on."""
    return hashlib.sha256(json.dumps(environments, sort_keys=True).encode()).hexdigest()[:16]


def _checksum(before: bytes, body: bytes) -> str:
    return hashlib.sha256(before + body).hexdigest()[:16]


def _say(text: str) -> None:
    print(f"ledger: {text}", file=sys.stderr, flush=True)
