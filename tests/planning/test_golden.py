"""The recipes' compile reports for the slices that their docstrings name, against what was committed.

To make them again after a change that is meant: MAXLM_WRITE_GOLDEN=1 pytest tests/planning/test_golden.py -m slow
"""

import copy
import json
import os
import pathlib
import re

import pytest

from maxlm.overrides import apply_overrides, load_config
from maxlm.planning.report import compile_report
from maxlm.planning.topology import find_target

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = sorted((ROOT / "tests" / "golden" / "compile").glob("*.json"))
# Relative tolerances: a compiler's patch release moves temporaries and times a little, never by these.
TOLERANCES = {"bytes_per_chip": 0.03, "executed_flops_per_device": 0.02, "step_seconds_estimate": 0.05,
              "flops_per_step": 1e-9, "mfu_estimate": 0.05}
EXACT = ("chips", "mesh", "kernels", "fits", "warnings")
KIND = 0.03  # of a kind of memory or collective, where it is more than a hundredth of all


def kept(record):
    """What of a report is compared."""
    warned = [re.sub(r"[\d.]+ GB", "GB", line) for line in record["warnings"]]
    keys = (*TOLERANCES, *EXACT, "bytes_by_kind", "collective_bytes")
    return {key: record[key] for key in keys} | {"warnings": warned}


def differences(golden, now):
    found = [f"{key}: {golden[key]!r} -> {now[key]!r}" for key in EXACT if golden[key] != now[key]]
    for key, tolerance in TOLERANCES.items():
        if abs(now[key] / golden[key] - 1) > tolerance:
            found.append(f"{key}: {golden[key]:.4g} -> {now[key]:.4g}, more than {tolerance:.0%}")
    for name in ("bytes_by_kind", "collective_bytes"):
        before, after = _flat(golden[name]), _flat(now[name])
        floor = sum(before.values()) / 100
        for kind in sorted(before.keys() | after.keys()):
            old, new = before.get(kind, 0.0), after.get(kind, 0.0)
            if abs(new - old) > max(KIND * old, floor if old < floor else 0.0):
                found.append(f"{name} {kind}: {old:.4g} -> {new:.4g}")
    return found


def _flat(table):
    """{'fsdp all-gather': bytes, ...}; a flat table as it is."""
    nested = {key: value for key, value in table.items() if isinstance(value, dict)}
    inner = {f"{axis} {kind}": value for axis, kinds in nested.items() for kind, value in kinds.items()}
    return inner | {key: value for key, value in table.items() if key not in nested}


@pytest.mark.slow
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_recipe_compiles_as_it_did(path):
    golden = json.loads(path.read_text())
    config = apply_overrides(load_config(ROOT / "configs" / f"{golden['recipe']}.py"), golden["set"])
    now = kept(compile_report(config, find_target(golden["topology"], golden["slices"])))
    if os.environ.get("MAXLM_WRITE_GOLDEN"):
        path.write_text(json.dumps(golden | {"report": now}, indent=1) + "\n")
        return
    assert differences(golden["report"], now) == []


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_docstring_names_the_slice(path):
    golden = json.loads(path.read_text())
    text = (ROOT / "configs" / f"{golden['recipe']}.py").read_text()
    named = golden["topology"] if golden["slices"] == 1 else f"{golden['topology']} --slices {golden['slices']}"
    assert named in text, f"configs/{golden['recipe']}.py does not name {named}"


def test_a_golden_bites():
    golden = json.loads(GOLDEN[0].read_text())["report"]
    assert differences(golden, copy.deepcopy(golden)) == []
    for change in (
        lambda r: r["bytes_by_kind"].update(temporaries=1.05 * r["bytes_by_kind"]["temporaries"]),
        lambda r: r.update(step_seconds_estimate=1.06 * r["step_seconds_estimate"]),
        lambda r: r.update(fits=not r["fits"]),
        lambda r: next(iter(r["collective_bytes"].values())).update({"all-to-all": 1e12}),
        lambda r: r.update(warnings=["something"]),
    ):
        changed = copy.deepcopy(golden)
        change(changed)
        assert differences(golden, changed), "a change went unseen"
