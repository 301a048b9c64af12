"""Full disk, file-size limit, read-only and vanished folders: one line each, and the older checkpoint stays."""

import contextlib
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from maxlm.checkpoint import Checkpointer, CheckpointError, IntegrityError, latest_step, restore_state, tree_digest
from maxlm.checkpoint import checkpointer as checkpointer_module


def small(step):
    return {"params": {"w": jnp.full(8, step, jnp.int32)}}


def large():
    return {"params": {"w": jax.random.bits(jax.random.key(0), (1 << 20,)).astype(jnp.int32)}}  # 4 MiB, incompressible


@contextlib.contextmanager
def file_size_limit(size):
    """Stands in for a full disk where mounting is not permitted: writing past `size` fails in mid-file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def small_disk(folder):
    """A 2 MiB file system at `folder`, or a file-size limit. Yields what the error must say."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        with file_size_limit(1 << 20):
            yield "a file would be larger than the limit"
        return
    try:
        yield "no space left on the device"
    finally:
        subprocess.run(["umount", folder], check=True)


def check_failed_save(folder, message, capfd):
    """A large save fails with `message` at the next call; step 1 stays, and a later save succeeds."""
    with Checkpointer(folder, keep_last=1) as checkpointer:
        checkpointer.save(1, small(1), {})
        checkpointer.wait()
        digest = tree_digest(folder)
        with pytest.raises(CheckpointError, match=message) as caught:
            checkpointer.save(2, large(), {})
            checkpointer.wait()
        assert "\n" not in str(caught.value) and str(folder / "2") in str(caught.value)
        assert sorted(p.name for p in folder.iterdir()) == ["1"]  # and the space is given back
        assert checkpointer.latest_step() == 1  # told once
        assert tree_digest(folder) == digest
        checkpointer.save(3, small(3), {})
    assert latest_step(folder) == 3
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_full_disk(tmp_path, capfd):
    with small_disk(tmp_path / "disk") as message:
        check_failed_save(tmp_path / "disk" / "checkpoints", message, capfd)


def test_file_size_limit(tmp_path, capfd):
    with file_size_limit(1 << 20):
        check_failed_save(tmp_path, "a file would be larger than the limit", capfd)


def test_error_is_raised_by_close_and_does_not_mask_another(tmp_path):
    with file_size_limit(1 << 20):
        with pytest.raises(CheckpointError):
            with Checkpointer(tmp_path, keep_last=1) as checkpointer:
                checkpointer.save(1, large(), {})
        with pytest.raises(KeyError):
            with Checkpointer(tmp_path, keep_last=1) as checkpointer:
                checkpointer.save(1, large(), {})
                raise KeyError


def test_failure_before_commit_leaves_no_step(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.save(1, small(1), {})
        checkpointer.wait()
        monkeypatch.setattr(checkpointer_module.layout, "make_durable", fail)
        checkpointer.save(2, small(2), {})
        with pytest.raises(CheckpointError, match=r"saving .*/2 failed \(OSError: \[Errno 5\] Input/output error\)"):
            checkpointer.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]


def test_folder_deleted_while_saving(tmp_path, monkeypatch):
    def vanish(path):
        shutil.rmtree(tmp_path / "run")

    with Checkpointer(tmp_path / "run" / "checkpoints", keep_last=1) as checkpointer:
        monkeypatch.setattr(checkpointer_module.layout, "make_durable", vanish)
        checkpointer.save(1, small(1), {})
        with pytest.raises(CheckpointError, match="vanished while saving") as caught:
            checkpointer.wait()
    assert "\n" not in str(caught.value)


@contextlib.contextmanager
def read_only(folder):
    """Root writes through permissions, so it gets a read-only mount of `folder`, or /sys where it may not mount."""
    if os.geteuid():
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
    elif subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
        yield pathlib.Path("/sys")
    else:
        try:
            subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)


def test_read_only_folder(tmp_path):
    message = "(the file system is read-only|permission denied) while .*choose"
    with Checkpointer(tmp_path / "made", keep_last=1) as checkpointer:
        checkpointer.save(1, small(1), {})
        checkpointer.wait()
        with read_only(tmp_path) as folder:
            with pytest.raises(CheckpointError, match=message):
                Checkpointer(folder / "new", keep_last=1)
            checkpointer.durable.directory = folder / "made"  # /sys/made where mounting is not permitted
            with pytest.raises(CheckpointError, match=message):
                checkpointer.save(2, small(2), {})
                checkpointer.wait()
            assert latest_step(tmp_path / "made") == 1
            tree_digest(tmp_path / "made")  # reading needs no writing


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="a file is in the way while preparing .*checkpoints"):
        Checkpointer(tmp_path / "checkpoints", keep_last=1)


def test_damaged_arrays_are_one_line(tmp_path):
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.save(1, large(), {})
    for data in pathlib.Path(tmp_path / "1" / "state").glob("**/d/*"):
        data.write_bytes(data.read_bytes()[:100])
    like = {"params": {"w": jax.ShapeDtypeStruct((1 << 20,), jnp.int32,
                                                 sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}}
    for read in (lambda: restore_state(tmp_path, 1, like), lambda: tree_digest(tmp_path, 1)):
        with pytest.raises(IntegrityError, match=r"damaged \(state/.* has 100 bytes instead of") as caught:
            read()
        assert "\n" not in str(caught.value)


FAILING = """
import resource, sys
import jax.numpy as jnp
import numpy as np
from maxlm.checkpoint import CheckpointError, Checkpointer
large = {"params": {"w": jnp.asarray(np.random.default_rng(0).integers(0, 2**31, 1 << 20, dtype=np.int32))}}
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with Checkpointer(sys.argv[1], keep_last=1) as checkpointer:
        checkpointer.save(1, large, {})
except CheckpointError as error:
    sys.exit(str(error))
"""


def test_a_failed_save_does_not_hold_up_the_exit_and_says_one_line(tmp_path):
    done = subprocess.run([sys.executable, "-c", FAILING, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        f"a file would be larger than the limit while saving {tmp_path}/1: raise `ulimit -f`, "
        "then run the same command again to resume\n"
    )


@pytest.mark.parametrize("failed", [True, False])
def test_what_orbax_says_of_a_folder_that_is_gone_does_not_hide_the_cause(tmp_path, monkeypatch, failed):
    """Seen with two processes: Orbax had metadata left to write when the failed save's folder was cleared away."""
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep_last=1)
    checkpointer.save(1, small(1), {})
    checkpointer.wait()
    orbax = checkpointer.durable._orbax
    close = orbax.close

    def lost():
        close()
        raise FileNotFoundError("1.orbax-checkpoint-tmp/_CHECKPOINT_METADATA")

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(orbax, "close", lost)
    if failed:
        monkeypatch.setattr(orbax, "save", lambda *args, **kwargs: None)
        monkeypatch.setattr(orbax, "wait_until_finished", full)
        checkpointer.save(2, small(2), {})
    with pytest.raises(CheckpointError if failed else FileNotFoundError,
                       match="no space left" if failed else "METADATA"):
        checkpointer.close()
