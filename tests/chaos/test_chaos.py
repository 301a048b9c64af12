"""Runs that are killed, stopped, cut off and damaged end with the parameters of the run that nothing disturbed.

Fifteen scenarios on real processes (`scripts/chaos.py --short`); all run once, for all tests of this file.
"""

import json
import pathlib
import subprocess
import sys

import pytest

from tests.chaos.faults import plan, short_plans

ROOT = pathlib.Path(__file__).parents[2]
SCENARIOS = 15


def run_script(script, *words, timeout):
    return subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True, cwd=ROOT,
                          timeout=timeout)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="module")
def short(work):
    """(the record of the fifteen scenarios, what was printed)."""
    done = run_script("scripts/chaos.py", "--short", "--work", work, "--json", work / "record.json", timeout=1500)
    assert (work / "record.json").exists(), done.stderr
    return json.loads((work / "record.json").read_text()), done


@pytest.mark.slow
@pytest.mark.parametrize("index", range(SCENARIOS))
def test_a_disturbed_run_ends_like_the_undisturbed_one(short, index):
    record, done = short
    scenario = record["scenarios"][index]
    assert scenario["index"] == index
    for strike in scenario["strikes"]:
        assert strike["problems"] == [], done.stderr
        assert strike["landed"], f"the run was over before the fault: {strike}"


@pytest.mark.slow
def test_the_table_counts_every_fault(short):
    record, done = short
    assert done.returncode == 0, done.stderr
    assert record["totals"]["faults"] == SCENARIOS == sum(row["faults"] for row in record["rows"])
    assert done.stdout.count("\n") == len(record["rows"]) + 3


@pytest.mark.slow
def test_a_harness_that_is_wrong_is_caught(short, work):
    """The perturbed twins: each violates what one check holds, and that check alone says so."""
    done = run_script("tests/chaos/twins.py", work, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "none": [],
        "other seed": ["digest"],
        "a checkpoint is lost": ["lost"],
        "a damaged checkpoint is deleted": ["lost"],
        "a line of the ledger is altered": ["books"],
        "a process stays": ["hang"],
    }


def test_a_seed_draws_the_same_faults_and_all_kinds():
    plans = [plan(7, index, 5, 120, can_cut=True) for index in range(40)]
    assert plans == [plan(7, index, 5, 120, can_cut=True) for index in range(40)]
    assert plans != [plan(8, index, 5, 120, can_cut=True) for index in range(40)]
    drawn = {(p.processes, fault.kind) for p in plans for fault in p.faults}
    assert {kind for processes, kind in drawn if processes == 1} == {
        "kill all", "SIGTERM all", "pause", "damage", "disk full"}
    for processes in (2, 4):
        assert {kind for p, kind in drawn if p == processes} >= {
            "kill one", "kill all", "SIGTERM one", "hang", "cut", "blip", "damage", "disk full"}
    assert {(p.processes, p.eight_bit) for p in plans} == {(n, b) for n in (1, 2, 4) for b in (False, True)}
    assert all(0 < fault.step < 120 for p in plans for fault in p.faults)
    assert not any(fault.kind in ("cut", "blip")
                   for index in range(40) for fault in plan(7, index, 5, 120, can_cut=False).faults)
    assert len(short_plans(0, 40, can_cut=True)) == SCENARIOS
