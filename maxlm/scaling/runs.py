"""Results of finished runs as checked columns: reads runs.jsonl or any CSV, and refuses what cannot be fitted.

One row is one measurement: `params`, `tokens`, `loss`, optionally `flops` and `run`; other columns are kept. Rows of
one `run` (checkpoints of it, say) are not independent, so the bootstrap draws runs, not rows.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from maxlm.schema import ConfigError, require

FLOPS_PER_PARAM_TOKEN = 6  # where a file has no `flops`: C = 6 N D
DELIMITERS = ",;\t"
_COMPARISONS = {">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt,
                "<": operator.lt, "=": operator.eq}
_CONDITION = re.compile(r"\s*([^<>=!\s]+)\s*(>=|<=|==|!=|>|<|=)\s*(.+?)\s*")


@dataclass(frozen=True)
class Runs:
    """`columns[name]` [n] as float64, `cluster` [n] the number of each row's run, `lines` [n] where it stood."""

    columns: Mapping[str, np.ndarray]
    cells: Mapping[str, np.ndarray]  # everything in the file, as text [n]
    cluster: np.ndarray
    lines: np.ndarray
    source: str
    sha256: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.lines)

    def take(self, keep: np.ndarray) -> Runs:
        """The rows where `keep` [n] holds."""
        pick = lambda table: {name: values[keep] for name, values in table.items()}  # noqa: E731
        return replace(self, columns=pick(self.columns), cells=pick(self.cells), lines=self.lines[keep],
                       cluster=np.unique(self.cluster[keep], return_inverse=True)[1])

    def matching(self, condition: str) -> np.ndarray:
        """[n] of bool: the rows for which `condition`, such as 'flops>1e21 and family==c4', holds."""
        return np.all([self._compare(part) for part in re.split(r"\s+and\s+|,", condition)], axis=0)

    def _compare(self, text: str) -> np.ndarray:
        parts = _CONDITION.fullmatch(text)
        require(parts is not None, f"condition {text!r} must read COLUMN>VALUE (or >=, <, <=, ==, !=)")
        name, sign, value = parts.groups()
        compare = _COMPARISONS[sign]
        if name in self.columns:
            return compare(self.columns[name], _number(value, f"condition {text!r}: {value!r} must be a number"))
        known = [*self.columns, *self.cells]
        require(name in self.cells, f"condition {text!r}: no column {name!r}{_nearest(name, known)}")
        if math.isnan(_number_or_nan(value)):
            require(sign in ("==", "!=", "="), f"condition {text!r}: {value!r} must be a number")
            return compare(self.cells[name], value)
        return compare(numbers(self.cells[name]), float(value))


def read_runs(path: Path, needed: Sequence[str], renamed: Mapping[str, str] | None = None, where: str = "",
              optional: Sequence[str] = (), may_be_zero: Sequence[str] = ()) -> Runs:
    """The rows of a CSV or JSON-lines file with the columns `needed` checked; `renamed` maps our names to the file's.

    `flops` is read where there is one, and computed as 6 * params * tokens where there is not; `tokens` or `params` may
    come from the other two; `optional` columns are checked where they are there. `where` keeps the rows for which a
    condition holds, before anything is checked. Of the columns `may_be_zero` 0 is a value like others.

    Raises ConfigError for a missing column, a value that is not a positive number, and a run that occurs twice.
    """
    data = path.read_bytes()
    cells, lines = _table(path, data)
    renamed = dict(renamed or {})
    for ours, theirs in renamed.items():
        require(theirs in cells, f"--columns {ours}={theirs}: {path.name} has no column {theirs!r}"
                                 f"{_nearest(theirs, cells)}")
    source = {name: renamed.get(name, name) for name in (*needed, *optional, "flops", "params", "tokens")}
    derivable = {"flops": ("params", "tokens"), "tokens": ("flops", "params"), "params": ("flops", "tokens")}
    for name in needed:
        computed = name in derivable and all(source[other] in cells for other in derivable[name])
        require(source[name] in cells or computed,
                f"{path.name} has no column {source[name]!r}{_nearest(source[name], cells)}; name it with "
                f"--columns {name}=ITS_NAME")
    present = {name: source[name] for name in source if source[name] in cells}
    columns = {ours: numbers(cells[theirs]) for ours, theirs in present.items()}
    runs = Runs(_derived(columns), cells, np.arange(len(lines)), lines, path.name, hashlib.sha256(data).hexdigest())
    if where:
        runs = runs.take(runs.matching(where))
    require(len(runs) > 0, f"{path.name} has no rows" + (f" where {where}" if where else ""))
    for ours, theirs in present.items():
        _check_positive(runs, runs.columns[ours], theirs, zero=ours in may_be_zero)
    identity = renamed.get("run", "run")
    return _without_copies(runs, needed) if identity not in cells else _clustered(runs, runs.cells[identity])


def _derived(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    k = FLOPS_PER_PARAM_TOKEN
    has = columns.keys() >= {"params", "tokens"}, columns.keys() >= {"flops", "params"}
    if "flops" not in columns and has[0]:
        columns["flops"] = k * columns["params"] * columns["tokens"]
    elif "tokens" not in columns and has[1]:
        columns["tokens"] = columns["flops"] / (k * columns["params"])
    elif "params" not in columns and columns.keys() >= {"flops", "tokens"}:
        columns["params"] = columns["flops"] / (k * columns["tokens"])
    return columns


def column_names(path: Path) -> list[str]:
    """The columns of a file, as `read_runs` would find them."""
    return list(_table(path, path.read_bytes())[0])


def _table(path: Path, data: bytes) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """{column: text [n]} and the line [n] of each row, from a CSV with a header or one JSON object a line."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; give a CSV with a header or JSON lines") from None
    if text.lstrip().startswith("{"):
        numbered = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        rows = [_json_row(path, number, line) for number, line in numbered]
        lines = [number for number, _ in numbered]
    else:
        head = text.split("\n", 1)[0]
        reader = csv.DictReader(text.splitlines(), delimiter=max(DELIMITERS, key=head.count))
        require(bool(reader.fieldnames), f"{path} is empty; give a CSV with a header or JSON lines")
        reader.fieldnames = [name.strip() for name in reader.fieldnames]
        rows, lines = [], []
        for row in reader:
            require(None not in row and None not in row.values(),
                    f"{path.name} line {reader.line_num} has not {len(reader.fieldnames)} cells as the header has")
            rows.append(row)
            lines.append(reader.line_num)
    names = dict.fromkeys(name for row in rows for name in row)
    require(bool(rows), f"{path} has a header and no rows")
    return {name: np.array([_text(row.get(name)) for row in rows]) for name in names}, np.array(lines)


def _json_row(path: Path, number: int, line: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path.name} line {number} is not JSON: {error.msg}") from None
    require(isinstance(row, dict), f"{path.name} line {number} is not a JSON object")
    return row


def lowest(runs: Runs, inputs: Sequence[str], name: str) -> Runs:
    """Of rows that share `inputs` the one where column `name` is lowest; all rows where there is no such column."""
    if name not in runs.columns:
        return runs
    _, group = np.unique(np.stack([runs.columns[i] for i in inputs]), axis=1, return_inverse=True)
    keep = np.zeros(len(runs), bool)
    for k in range(group.max() + 1):
        rows = np.flatnonzero(group == k)
        keep[rows[np.argmin(runs.columns[name][rows])]] = True
    note = f"of {len(runs)} rows the {keep.sum()} with the lowest {name} for their {' and '.join(inputs)} were fitted"
    return replace(runs.take(keep), notes=(*runs.notes, note))


def _text(value: object) -> str:
    return "" if value is None else value.strip() if isinstance(value, str) else repr(value)


def _check_positive(runs: Runs, values: np.ndarray, name: str, *, zero: bool = False) -> None:
    """Every value of the file's column `name` must be a finite number above 0, or 0 where `zero` is a value."""
    bad = np.flatnonzero(~(np.isfinite(values) & ((values > 0) | (zero & (values == 0)))))
    if bad.size:
        more = f" (and {bad.size - 1} more)" if bad.size > 1 else ""
        cell = str(runs.cells[name][bad[0]])
        least = "of 0 or more" if zero else "above 0"
        raise ConfigError(f"{runs.source} line {runs.lines[bad[0]]}: {name}={cell!r} must be a number {least}{more}; "
                          f"correct the rows or leave them out with --where")


def _clustered(runs: Runs, identity: np.ndarray) -> Runs:
    """Rows that share a `run` belong to one cluster; the same run at the same number of tokens is there twice."""
    seen: dict[tuple, int] = {}
    place = runs.columns.get("tokens", runs.columns.get("flops", np.zeros(len(runs))))
    for i, key in enumerate(zip(identity, place, strict=True)):
        require(key not in seen, f"{runs.source} lines {runs.lines[seen.get(key, 0)]} and {runs.lines[i]} are both run "
                                 f"{str(identity[i])!r} after the same tokens; remove one")
        seen[key] = i
    number = {name: i for i, name in enumerate(dict.fromkeys(identity))}
    return replace(runs, cluster=np.array([number[name] for name in identity]))


def _without_copies(runs: Runs, needed: Sequence[str]) -> Runs:
    """In a file that does not name its runs, a row equal to another in every column is a copy and counts once."""
    rows = list(zip(*runs.cells.values(), strict=True))
    first = np.array(sorted({row: i for i, row in reversed(list(enumerate(rows)))}.values()))
    if first.size == len(runs):
        return runs
    copies = len(runs) - first.size
    note = f"{copies} of {len(runs)} rows are copies of another row in every column and were left out"
    keep = np.zeros(len(runs), bool)
    keep[first] = True
    return replace(runs.take(keep), notes=(*runs.notes, note))


def numbers(cells: np.ndarray) -> np.ndarray:
    """Text cells [n] as float64, NaN where one is not a number."""
    return np.array([_number_or_nan(cell) for cell in cells])


def _number_or_nan(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _number(text: str, message: str) -> float:
    value = _number_or_nan(text)
    require(not math.isnan(value), message)
    return value


def _nearest(name: str, known: Iterable[str]) -> str:
    lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    return f"; did you mean {lower[close[0]]!r}?" if close else f" (it has {', '.join(list(lower.values())[:12])})"


def parse_columns(text: str) -> dict[str, str]:
    """'params=N,loss=val' as {'params': 'N', 'loss': 'val'}."""
    pairs = [part.split("=", 1) for part in text.split(",") if part.strip()]
    require(all(len(pair) == 2 and all(p.strip() for p in pair) for pair in pairs),
            f"--columns {text!r} must read OURS=THEIRS,OURS=THEIRS such as params=N,tokens=D,loss=val")
    return {ours.strip(): theirs.strip() for ours, theirs in pairs}
