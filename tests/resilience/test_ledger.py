"""The ledger on disk: a chain that shows edits, a torn end that is trimmed, steps made again that are compared."""

import json
import os
import signal
import subprocess
import sys

import pytest

from maxlm.resilience import Ledger, read_ledger

WORKER = """
import sys
from maxlm.resilience import Ledger
ledger = Ledger(sys.argv[1])
ledger.start(0, "a", {})
for step in range(1, 10**6):
    ledger.step(step, index=step - 1, batch=f"{step:016x}", loss=float(step).hex())
    if step == 200:
        ledger.flush()
        print("ready", flush=True)
"""


def values(step, **changes):
    return {"batch": f"{step:016x}", "loss": (1.0 / step).hex(), "grad_norm": "0x1.8p+0"} | changes


def write(folder, steps, start=0, lineage="a", chain=None, **changes):
    """One start of a run: `changes` are of its last step."""
    ledger = Ledger(folder)
    ledger.start(start, lineage, {"device": "cpu"}, chain=chain, params="00", optimizer="11")
    for step in steps:
        ledger.step(step, index=step - 1, **values(step, **(changes if step == steps[-1] else {})))
    ledger.flush()
    newest = ledger.chain
    ledger.close()
    return newest


def lines(folder):
    return (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)


def kinds(folder):
    return [record["kind"] for record in read_ledger(folder).records]


def test_what_is_written_is_read(tmp_path):
    write(tmp_path, range(1, 4))
    reading = read_ledger(tmp_path)
    assert reading.damaged == [] and kinds(tmp_path) == ["start", "step", "step", "step"]
    assert [(s["step"], s["index"], s["lineage"]) for s in reading.steps()] == [(1, 0, "a"), (2, 1, "a"), (3, 2, "a")]
    assert float.fromhex(reading.steps()[2]["loss"]) == 1.0 / 3


def test_a_start_appends_and_never_rewrites(tmp_path):
    write(tmp_path, range(1, 5))
    before = b"".join(lines(tmp_path))
    write(tmp_path, range(3, 7), start=2)
    assert b"".join(lines(tmp_path)).startswith(before)
    assert [s["step"] for s in read_ledger(tmp_path).steps()] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert Ledger(tmp_path).highest_step == 6


@pytest.mark.parametrize(("harm", "found"), [
    (lambda ls: [*ls[:2], ls[2].replace(b'"index": 1', b'"index": 7'), *ls[3:]], [3, 4]),
    (lambda ls: [*ls[:2], *ls[3:]], [3]),
    (lambda ls: [ls[0], ls[2], ls[1], *ls[3:]], [2, 3, 4]),
    (lambda ls: ls[1:], [1]),
    (lambda ls: [*ls[:2], b"\x00" * 40 + b"\n", *ls[2:]], [3, 4]),
], ids=["edited", "removed", "swapped", "first removed", "zeros"])
def test_an_altered_line_is_found_and_the_run_goes_on(tmp_path, capsys, harm, found):
    write(tmp_path, range(1, 6))
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(harm(lines(tmp_path))))
    assert read_ledger(tmp_path).damaged == found
    write(tmp_path, range(6, 8), start=5)
    assert f"line {found[0]}" in capsys.readouterr().err
    reading = read_ledger(tmp_path)
    assert reading.damaged == found, "what is appended after damage is sound"
    assert [r["lines"] for r in reading.records if r["kind"] == "damage"] == [found]


def test_a_removed_end_is_found_by_the_checkpoint_s_checksum(tmp_path, capsys):
    newest = write(tmp_path, range(1, 6))
    assert write(tmp_path, [], start=5, chain=newest) and "missing" not in capsys.readouterr().err
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(lines(tmp_path)[:4]))
    write(tmp_path, [], start=5, chain=newest)
    assert "lines up to step 5 are missing" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [1, 30, -1])
def test_a_torn_last_line_is_trimmed(tmp_path, capsys, keep):
    write(tmp_path, range(1, 4))
    whole = lines(tmp_path)
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(whole[:-1]) + whole[-1][:keep])
    write(tmp_path, range(3, 5), start=2)
    assert read_ledger(tmp_path).damaged == [] and capsys.readouterr().err == ""
    assert [s["step"] for s in read_ledger(tmp_path).steps()] == [1, 2, 3, 4]


def test_a_killed_writer_leaves_a_ledger_that_goes_on(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", WORKER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    highest = Ledger(tmp_path).highest_step
    assert highest >= 200
    write(tmp_path, range(150, highest + 2), start=149)
    assert read_ledger(tmp_path).damaged == []


def test_a_step_made_again_with_other_bits_is_reported_once(tmp_path, capsys):
    write(tmp_path, range(1, 8))
    write(tmp_path, range(3, 6), start=2, loss="0x1p-3")
    error = capsys.readouterr().err
    assert "step 5 was made again and gave another loss" in error and "0x1p-3" in error
    found = [r for r in read_ledger(tmp_path).records if r["kind"] == "nondeterminism"]
    assert [(r["step"], r["now"]) for r in found] == [(5, {"loss": "0x1p-3"})]


@pytest.mark.parametrize("again", [dict(), dict(lineage="b", loss="0x1p-3")], ids=["equal", "another lineage"])
def test_steps_made_again_pass_where_they_may(tmp_path, capsys, again):
    write(tmp_path, range(1, 8))
    write(tmp_path, range(3, 6), start=2, **again)
    assert capsys.readouterr().err == "" and "nondeterminism" not in kinds(tmp_path)


def test_a_rollback_compares_within_one_process(tmp_path, capsys):
    ledger = Ledger(tmp_path)
    ledger.start(0, "a", {})
    for step in (1, 2, 3):
        ledger.step(step, index=step - 1, **values(step))
    ledger.rollback(1, skipped=[2])
    ledger.step(2, index=1, **values(2))
    ledger.step(3, index=3, **values(3, loss="0x1p-9"))  # another batch, so another loss
    assert capsys.readouterr().err == ""
    ledger.rollback(1, skipped=[])
    ledger.step(2, index=1, **values(2, grad_norm="0x1p-9"))
    assert "step 2 was made again and gave another grad_norm" in capsys.readouterr().err
    ledger.close()
    assert json.loads(lines(tmp_path)[4])["skipped"] == [2]


def test_a_write_that_fails_is_raised_and_leaves_whole_lines(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path)
    ledger.start(0, "a", {})
    ledger.flush()
    whole = lines(tmp_path)

    def half(line):
        os.write(ledger._file.fileno(), bytes(line)[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger, "_write_whole", half)
    ledger.step(1, index=0, **values(1))
    with pytest.raises(OSError, match="No space left"):
        ledger.flush()
    with pytest.raises(OSError, match="No space left"):
        ledger.close()
    assert lines(tmp_path) == whole
