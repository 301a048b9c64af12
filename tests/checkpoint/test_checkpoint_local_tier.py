"""The local tier: what a host has lost or holds damaged comes from its replica along `data`, bit for bit."""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import checkpoint_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maxlm
from maxlm.checkpoint import Checkpointer, CheckpointError, IntegrityError, pieces

WORKER = pathlib.Path(__file__).with_name("local_worker.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(pathlib.Path(maxlm.__file__).parents[1])}


class Group:
    """`count` worker processes; host i keeps its local tier in FOLDER/host_i."""

    def __init__(self, folder, count, fsdp):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        self.workers = [
            subprocess.Popen([sys.executable, "-W", "ignore", WORKER, folder / "durable", folder / f"host_{i}",
                              str(port), str(i), str(count), str(fsdp)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
            for i in range(count)
        ]
        self.read()

    def read(self):
        """One line of each, without what gloo says of its connections."""
        lines = []
        for worker in self.workers:
            while (line := worker.stdout.readline()).startswith("[Gloo]"):
                pass
            assert line, worker.communicate()[1][-2000:]
            lines.append(line)
        return lines

    def tell(self, command):
        for worker in self.workers:
            worker.stdin.write(command + "\n")
            worker.stdin.flush()
        return self.read()

    def restored(self):
        """What all processes restored; they must agree."""
        lines = self.tell("restore")
        assert len(set(lines)) == 1, lines
        return lines[0].removesuffix(" done\n")

    def end(self, how):
        for worker in self.workers:
            with contextlib.suppress(OSError):
                how(worker)
        for worker in self.workers:
            worker.wait(30)
            for stream in (worker.stdin, worker.stdout, worker.stderr):
                with contextlib.suppress(OSError):
                    stream.close()


@contextlib.contextmanager
def group(folder, count, fsdp):
    made = Group(folder, count, fsdp)
    try:
        yield made
        made.end(lambda worker: worker.stdin.close())
    finally:
        made.end(subprocess.Popen.kill)


def copies(host):
    """{step: folder} of a host's local tier."""
    return {int(path.name): path for path in host.glob("*/process_*/*") if path.name.isdigit()}


def damage(copy, at=3):
    data = bytearray((copy / "pieces").read_bytes())
    data[at] ^= 1
    (copy / "pieces").write_bytes(data)


def test_two_processes(tmp_path):
    first, second = tmp_path / "host_0", tmp_path / "host_1"
    with group(tmp_path, 2, 1) as pair:
        pair.tell("durable 10")
        pair.tell("local 20 30 40 50")
        pair.end(subprocess.Popen.kill)
    assert sorted(copies(first)) == sorted(copies(second)) == [30, 40, 50]
    shutil.rmtree(second)
    with group(tmp_path, 2, 1) as pair:
        assert pair.restored() == "50 ok"
        damage(copies(first)[50])  # now nobody has a good 50
        assert pair.restored().startswith("40 ok local checkpoint process_0/50 is damaged (")
        pair.tell("local 60")
        damage(copies(second)[60])
        assert pair.restored().startswith("60 ok local checkpoint process_1/60 is damaged (params/")
        shutil.rmtree(copies(first)[60])
        assert pair.restored() == "40 ok"
        for host in (first, second):
            shutil.rmtree(host)
        assert pair.restored() == "10 ok"


@pytest.mark.slow
def test_four_processes_and_then_two(tmp_path):
    hosts = [tmp_path / f"host_{i}" for i in range(4)]
    with group(tmp_path, 4, 2) as four:
        four.tell("durable 10")
        four.tell("local 20 30")
        assert four.restored() == "30 ok"
        for lost in ((3,), (0, 3)):  # 0 and 2 hold one half of what is sharded, 1 and 3 the other
            for host in lost:
                shutil.rmtree(hosts[host])
            assert four.restored() == "30 ok"
        four.tell("local 40")
        for host in (1, 3):
            shutil.rmtree(copies(hosts[host])[40])
        assert four.restored() == "30 ok"  # half of 40 is nowhere; 1 and 2 still have both halves of 30
        four.tell("local 50")
    for fsdp in (1, 2):  # fewer processes, and another layout
        with group(tmp_path, 2, fsdp) as two:
            assert two.restored() == "50 ok"


STATE = {"params": {"w": jnp.arange(64.0).reshape(8, 8)}}


def target(**axes):
    return lambda step, meta: cases.abstract(cases.mesh(**axes), STATE)


def test_the_newest_over_both_tiers_and_another_layout(tmp_path):
    state = lambda step: jax.tree.map(lambda x: x + step, STATE)  # noqa: E731
    local = {"local_path": tmp_path / "local"}
    lines = []
    with Checkpointer(tmp_path / "run", keep_last=2, **local) as checkpointer:
        for step in (1, 2):
            checkpointer.save_local(step, cases.place(cases.mesh(data=2, fsdp=4), state(step)), {})
        checkpointer.save(3, state(3), {})
    for newest, axes in ((3, {"fsdp": 8}), (5, {"data": 4, "tensor": 2}), (5, {"fsdp": 2})):
        with Checkpointer(tmp_path / "run", keep_last=2, **local) as checkpointer:
            found = checkpointer.restore_newest(target(**axes), say=lines.append)
            assert found.step == newest and cases.raw(found.state) == cases.raw(state(newest))
            checkpointer.save_local(5, cases.place(cases.mesh(fsdp=4), state(5)), {})
    assert lines == []
    with Checkpointer(tmp_path / "another run", keep_last=2, **local) as checkpointer:
        assert checkpointer.restore_newest(lambda step, meta: None, say=lines.append) is None


@pytest.mark.parametrize("ruin", [
    lambda copy: damage(copy), lambda copy: os.truncate(copy / "pieces", 10), lambda copy: (copy / "pieces").unlink(),
    lambda copy: (copy / "manifest.json").unlink(), lambda copy: os.truncate(copy / "manifest.json", 0),
    lambda copy: [shutil.rmtree(copy), copy.mkdir()],
])
def test_damage_is_set_aside(tmp_path, ruin):
    for tiers in (1, 2):
        with Checkpointer(tmp_path / "run", keep_last=2, local_path=tmp_path / "local") as checkpointer:
            if tiers == 1:
                checkpointer.save(1, STATE, {})
            checkpointer.save_local(2, STATE, {})
            checkpointer.wait()
            ruin(copies(tmp_path / "local")[2])
            lines = []
            with pytest.raises(IntegrityError, match="--strict refuses"):
                checkpointer.restore_newest(target(fsdp=4), strict=True, say=lines.append)
            (aside,) = (tmp_path / "local").glob("*/*/2.damaged")
            aside.rename(aside.with_name("2"))
            if tiers == 1:
                assert checkpointer.restore_newest(target(fsdp=4), say=lines.append).step == 1
                (line,) = lines
                assert line.startswith("local checkpoint process_0/2 is damaged (") and "2.damaged" in line
                shutil.rmtree(tmp_path / "run" / "1")
            else:
                for _ in range(2):
                    with pytest.raises(IntegrityError, match="no good checkpoint is left"):
                        checkpointer.restore_newest(target(fsdp=4), say=lines.append)


def test_retention_and_rollback(tmp_path):
    with Checkpointer(tmp_path / "run", keep_last=3, local_path=tmp_path / "local", local_keep_last=2) as checkpointer:
        for step in range(1, 7):
            (checkpointer.save if step % 3 == 0 else checkpointer.save_local)(step, STATE, {})
        checkpointer.wait()
        assert sorted(copies(tmp_path / "local")) == [2, 4, 5]
        checkpointer.rewind(4, expected=True)
        assert sorted(copies(tmp_path / "local")) == [2, 4] and checkpointer.latest_step() == 3
        assert checkpointer.save(6, STATE, {})  # again, with other values
        with pytest.raises(CheckpointError, match="no checkpoint up to step 2 to go back to"):
            checkpointer.rewind(2, expected=True)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["3", "6", "run_name"]
    with pytest.raises(ValueError, match="at least 2"):
        Checkpointer(tmp_path / "run", keep_last=1, local_path=tmp_path / "local", local_keep_last=1)


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {"params": {"w": cases.place(cases.mesh(fsdp=8), jnp.zeros((512, 512)))}}
    for step in range(3):
        with Checkpointer(tmp_path / "run", keep_last=2, local_path=tmp_path / "local") as checkpointer:
            checkpointer.save_local(step, state, {})
            for _ in range(20):
                state = advance(state)
        with Checkpointer(tmp_path / "run", keep_last=2, local_path=tmp_path / "local") as checkpointer:
            like = cases.abstract(cases.mesh(fsdp=1), state)
            found = checkpointer.restore_newest(lambda step, meta, like=like: like, say=print)
            assert (found.step, set(np.unique(found.state["params"]["w"]))) == (step, {20.0 * step})


def test_errors_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"a file is in the way while preparing checkpoint.local_path"):
        Checkpointer(tmp_path / "run", keep_last=1, local_path=tmp_path / "file")
    with Checkpointer(tmp_path / "run", keep_last=1, local_path=tmp_path / "local") as checkpointer:
        shutil.rmtree(tmp_path / "local")
        checkpointer.save_local(1, STATE, {})
        with pytest.raises(CheckpointError, match="vanished while saving .*process_0/1"):
            checkpointer.wait()


def test_pieces_cover_a_box():
    rows = [((0, 2), (0, 4)), ((2, 4), (0, 4))]
    assert pieces.cover(((0, 2), (0, 4)), rows) == rows[:1]
    assert pieces.cover(((1, 3), (1, 2)), rows) == rows
    assert pieces.cover(((1, 5), (1, 2)), rows) is None
    assert pieces.cover((), [()]) == [()]
    overlapping = [((0, 3), (0, 4)), ((2, 4), (0, 4))]
    assert pieces.cover(((0, 4), (0, 4)), overlapping) is None
