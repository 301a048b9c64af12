"""Which checkpoints stay, what is listed, and what a new run finds of an old one's leftovers."""

import json
import threading

import jax.numpy as jnp
import pytest

from maxlm.checkpoint import Checkpointer, CheckpointError, latest_step, list_checkpoints
from maxlm.checkpoint import layout as layout_module
from maxlm.checkpoint.layout import COMMIT_FILE, complete_steps, steps_to_delete

STATE = {"params": {"w": jnp.arange(4.0)}}


@pytest.mark.parametrize(
    ("steps", "keep_last", "keep_every", "deleted"),
    [
        ([], 2, 0, []),
        ([10, 20], 2, 0, []),
        ([10, 20, 30], 2, 0, [10]),
        ([10, 20, 30, 40, 50], 1, 20, [10, 30]),
        ([10, 20, 30, 40, 50], 2, 30, [10, 20]),
        ([50, 10, 30], 1, 0, [10, 30]),
        ([0, 10, 20], 1, 7, [10]),
    ],
)
def test_policy(steps, keep_last, keep_every, deleted):
    assert steps_to_delete(steps, keep_last, keep_every) == deleted


@pytest.mark.parametrize(("steps", "behind", "deleted"), [
    ([10, 20, 30], 0, [10, 20]),
    ([10, 20, 30], 5, [10]),  # a spike at 31 goes back to 26 at the latest
    ([10, 20, 30], 11, [10]),
    ([10, 20, 30], 12, [20]),
    ([10, 27, 29, 30], 4, [10, 29]),
    ([10, 20, 30], 100, [10, 20]),
])
def test_one_stays_for_a_rollback(steps, behind, deleted):
    assert steps_to_delete(steps, 1, 0, behind) == deleted


def test_rewinding_deletes_what_is_newer_and_refuses_to_leave_nothing(tmp_path):
    with Checkpointer(tmp_path, keep_last=5) as checkpointer:
        for step in (2, 4, 6):
            checkpointer.save(step, STATE, {"step": step})
        with pytest.raises(CheckpointError, match="no checkpoint up to step 1 to go back to"):
            checkpointer.rewind(1, expected=True)
        assert complete_steps(tmp_path) == [2, 4, 6]
        checkpointer.rewind(5, expected=True)
        assert checkpointer.latest_step() == 4 and complete_steps(tmp_path) == [2, 4]
        assert checkpointer.save(6, STATE, {"step": 6}), "the step may be saved again"
        checkpointer.rewind(1, expected=False)
        assert checkpointer.latest_step() is None and complete_steps(tmp_path) == []


def test_policy_on_disk_and_across_runs(tmp_path):
    for first in (1, 5):
        with Checkpointer(tmp_path, keep_last=2, keep_every=3) as checkpointer:
            for step in range(first, first + 4):
                checkpointer.save(step, STATE, {})
    assert complete_steps(tmp_path) == [3, 6, 7, 8]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "6", "7", "8"]


def test_saving_a_saved_step_again_writes_nothing(tmp_path):
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        assert checkpointer.save(1, STATE, {})
        assert not checkpointer.save(1, STATE, {})
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        assert not checkpointer.save(1, STATE, {})


def test_the_previous_one_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    reached, go_on = threading.Event(), threading.Event()

    def slow(path):
        reached.set()
        assert go_on.wait(30)

    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.save(1, STATE, {})
        checkpointer.wait()
        monkeypatch.setattr(layout_module, "make_durable", slow)
        checkpointer.save(2, STATE, {})
        assert reached.wait(30)
        assert complete_steps(tmp_path) == [1]  # everything is written, nothing is committed
        assert [(row.step, row.complete) for row in list_checkpoints(tmp_path)] == [(1, True), (2, False)]
        go_on.set()
        assert checkpointer.latest_step() == 2
    assert complete_steps(tmp_path) == [2]


def test_leftovers_are_cleaned_and_foreign_folders_left_alone(tmp_path):
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.save(1, STATE, {})
    for name in ("2.orbax-checkpoint-tmp/state", "0.deleting/state", "notes", "03", "4"):
        (tmp_path / name).mkdir(parents=True)
    assert latest_step(tmp_path) == 1
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        assert sorted(p.name for p in tmp_path.iterdir()) == ["03", "1", "4", "notes"]
        checkpointer.save(4, STATE, {})  # '4' was there but not complete: set aside, not deleted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["03", "1", "4", "4.damaged", "notes"]


@pytest.mark.parametrize("missing", [COMMIT_FILE, "meta/meta.json"])
def test_incomplete_steps_do_not_count(tmp_path, missing):
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        checkpointer.save(1, STATE, {})
        checkpointer.save(2, STATE, {})
    (tmp_path / "2" / missing).unlink()
    assert latest_step(tmp_path) == 1
    assert [(row.step, row.complete) for row in list_checkpoints(tmp_path)] == [(1, True), (2, False)]


def test_rows_carry_size_and_time(tmp_path):
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        checkpointer.save(1, STATE, {})
    (row,) = list_checkpoints(tmp_path)
    files = [p for p in (tmp_path / "1").rglob("*") if p.is_file()]
    assert row.bytes == sum(p.stat().st_size for p in files) and row.time == max(p.stat().st_mtime for p in files)
    with pytest.raises(CheckpointError, match="is not a folder of checkpoints"):
        list_checkpoints(tmp_path / "absent")


@pytest.mark.parametrize("content", ["", "{", '{"format": 99}', "[]"])
def test_damaged_meta_is_one_line(tmp_path, content):
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        checkpointer.save(1, STATE, {})
        checkpointer.wait()
        (tmp_path / "1" / "meta" / "meta.json").write_text(content)
        with pytest.raises(CheckpointError, match=str(tmp_path / "1")) as caught:
            checkpointer.restore_meta(1)
    assert "\n" not in str(caught.value)


def test_meta_file_is_plain_json(tmp_path):
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        checkpointer.save(1, STATE, {"step": 1})
    assert json.loads((tmp_path / "1/meta/meta.json").read_text()) == {
        "format": 2, "arrays": {"params/w": ["float32", [4]]}, "meta": {"step": 1},
    }
