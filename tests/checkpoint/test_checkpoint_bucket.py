"""The durable tier in an object store: TensorStore's own GCS and S3 drivers against a server on localhost."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import checkpoint_cases as cases
import jax.numpy as jnp
import numpy as np
import pytest
from fake_store import FakeStore
from test_checkpoint_two_processes import run_until

import maxlm
from maxlm.checkpoint import (
    Checkpointer,
    CheckpointError,
    IntegrityError,
    array_digest,
    bucket,
    latest_step,
    list_checkpoints,
    named_leaves,
    object_store,
    parts,
    read_meta,
    restore_state,
    tree_digest,
    verify,
)

RETRIES = {"max_retries": 4, "initial_delay": "10ms", "max_delay": "20ms"}


def state(step):
    words = np.random.default_rng(step).integers(0, 2**31, (8, 32), dtype=np.int32)
    return {"params": {"large": jnp.asarray(words), "small": jnp.full(5, step, jnp.bfloat16)}, "step": np.int32(step)}


def like(step=0, meta=None):
    return cases.abstract(cases.mesh(fsdp=1), state(0))


@pytest.fixture(params=["gs"])
def scheme(request):
    return request.param


@pytest.fixture
def store(scheme, monkeypatch):
    monkeypatch.setattr(parts, "OBJECT_BYTES", 100)  # the large array spans several, the small ones share one
    monkeypatch.setattr(object_store, "RETRIES", RETRIES)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with FakeStore("bucket") as fake:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", fake.url)
        monkeypatch.setenv("AWS_ENDPOINT_URL", fake.url)
        yield fake


@pytest.fixture
def url(scheme, store):
    return f"{scheme}://bucket/runs/the run"


@pytest.fixture
def saved(url, store):
    with Checkpointer(url, keep_last=9) as checkpointer:
        for step in (10, 20, 30):
            checkpointer.save(step, state(step), {"step": step})
    return url


def newest(url, strict=False):
    lines = []
    with Checkpointer(url, keep_last=9) as checkpointer:
        return checkpointer.restore_newest(like, strict=strict, say=lines.append), lines


def keys(store, ending, step=30):
    return sorted(key for key in store.objects if f"/{step}." in key and key.endswith(ending))


@pytest.mark.parametrize("scheme", ["gs", "s3", "file"], indirect=True)
def test_what_was_saved_comes_back(url, scheme, tmp_path):
    if scheme == "file":
        url = f"file://{tmp_path}/objects"
    whole = cases.make_state(3)
    with Checkpointer(url, keep_last=2, keep_every=4) as checkpointer:
        for step in range(2, 8):
            assert checkpointer.save(step, cases.place(cases.mesh(fsdp=4, tensor=2), whole), {"step": step})
        assert not checkpointer.save(7, whole, {"step": 7})
        assert checkpointer.latest_step() == 7 and checkpointer.restore_meta(4) == {"step": 4}
    assert [(row.step, row.complete) for row in list_checkpoints(url)] == [(4, True), (6, True), (7, True)]
    rows = list_checkpoints(url)
    assert rows[-1].bytes == sum(leaf.nbytes for leaf in named_leaves(whole).values()) and rows[-1].time > 1e9
    assert verify(url) == [(4, None), (6, None), (7, None)]
    assert tree_digest(url) == array_digest(named_leaves({"params": whole["params"]}))
    for mesh in (cases.mesh(fsdp=4, tensor=2), cases.mesh(fsdp=2, tensor=4), cases.mesh(fsdp=1), cases.mesh(fsdp=8)):
        assert cases.raw(restore_state(url, 7, cases.abstract(mesh, whole))) == cases.raw(whole)
    params = {"params": cases.abstract(cases.mesh(fsdp=8), whole["params"])}
    assert cases.raw(restore_state(url, None, params)) == cases.raw({"params": whole["params"]})
    with Checkpointer(url, keep_last=2) as checkpointer:
        checkpointer.rewind(6, expected=True)
        assert checkpointer.save(7, whole, {"again": True})
        checkpointer.wait()
        assert read_meta(url, 7) == {"again": True}
        assert latest_step(url) == 7 and [step for step, _ in verify(url)] == [6, 7]


def test_the_local_tier_goes_with_it(url, tmp_path):
    def tiers():
        return Checkpointer(url, keep_last=2, local_path=tmp_path / "local")

    with tiers() as checkpointer:
        checkpointer.save(4, state(4), {"step": 4})
        checkpointer.save_local(5, state(5), {"step": 5})
    with tiers() as checkpointer:
        found = checkpointer.restore_newest(like, say=print)
        assert found.step == 5 and cases.raw(found.state) == cases.raw(state(5))
        checkpointer.rewind(4, expected=True)
        assert checkpointer.restore_newest(like, say=print).step == 4


def flip(store, key):
    data = bytearray(store.objects[key])
    data[len(data) // 2] ^= 1
    store.objects[key] = bytes(data)


DAMAGE = {
    "flipped bit": lambda store: flip(store, keys(store, "/00003")[0]),
    "truncated object": lambda store: store.objects.update({(key := keys(store, "/00003")[0]): store.objects[key][:9]}),
    "missing object": lambda store: store.objects.pop(keys(store, "/00003")[0]),
    "empty object": lambda store: store.objects.update({keys(store, "/00000")[0]: b""}),
    "flipped bit in the commit": lambda store: flip(store, keys(store, "/commit.json")[0]),
    "empty commit": lambda store: store.objects.update({keys(store, "/commit.json")[0]: b""}),
    "missing commit": lambda store: store.objects.pop(keys(store, "/commit.json")[0]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_set_aside_and_the_one_before_is_used(saved, store, kind):
    DAMAGE[kind](store)
    before = dict(store.objects)
    assert [(step, damage is None) for step, damage in verify(saved)] == [(10, True), (20, True), (30, False)]
    for read in (lambda: restore_state(saved, None, like()), lambda: tree_digest(saved)):  # readers mark nothing
        with pytest.raises(IntegrityError, match=f"{saved}/30"):
            read()
    with pytest.raises(IntegrityError, match="--strict refuses"):
        newest(saved, strict=True)
    assert store.objects == before
    found, lines = newest(saved)
    assert (found.step, found.meta) == (20, {"step": 20}) and cases.raw(found.state) == cases.raw(state(20))
    (line,) = lines
    assert line.startswith("checkpoint 30 is damaged (") and "set aside as 30." in line and line.endswith("/damaged")
    assert before.items() <= store.objects.items() and len(store.objects) == len(before) + 1
    assert newest(saved)[1] == [] and [row.step for row in list_checkpoints(saved)] == [10, 20]
    with Checkpointer(saved, keep_last=9) as checkpointer:
        assert checkpointer.save(30, state(30), {"step": 30})
    assert cases.raw(restore_state(saved, 30, like())) == cases.raw(state(30))
    assert before.items() <= store.objects.items()


def test_all_damaged_does_not_begin_again(saved, store):
    for step in (10, 20, 30):
        flip(store, keys(store, "/00000", step)[0])
    for _ in range(2):
        with pytest.raises(IntegrityError, match=r"no good checkpoint is left in gs://.*another --run-dir"):
            newest(saved)


def test_errors_of_the_server_are_tried_again(url, store):
    refused = []

    def refuse(method, key):
        """Each request fails twice before it is answered."""
        refused.append((method, key))
        return 503 if refused.count((method, key)) % 3 else None

    store.before = refuse
    with Checkpointer(url, keep_last=1) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state(step), {})
    assert cases.raw(restore_state(url, None, like())) == cases.raw(state(2))
    assert len(refused) > 50


def test_a_store_that_is_gone_loses_nothing(saved, store):
    with Checkpointer(saved, keep_last=9) as checkpointer:
        store.pause()
        checkpointer.save(40, state(40), {"step": 40})
        with pytest.raises(CheckpointError, match="the object store does not answer while writing gs://") as caught:
            checkpointer.wait()
        assert "\n" not in str(caught.value) and "run the same command again" in str(caught.value)
        with pytest.raises(CheckpointError, match="the object store does not answer while listing gs://"):
            latest_step(saved)
        store.go_on()
        assert checkpointer.save(50, state(50), {"step": 50})
    assert [step for step, _ in verify(saved)] == [10, 20, 30, 50]
    assert newest(saved)[0].step == 50


def test_a_store_that_is_silent_is_given_up(saved, store, monkeypatch):
    monkeypatch.setattr(object_store, "SECONDS", 0.3)
    go_on = threading.Event()
    store.before = lambda method, key: go_on.wait(30) and None
    with pytest.raises(CheckpointError, match=r"does not answer while listing gs://.*\(no answer in 0.3 s\)"):
        latest_step(saved)
    go_on.set()
    assert latest_step(saved) == 30


@pytest.mark.parametrize(("method", "status", "message"), [
    ("POST", 403, "access denied while writing gs://.*: check the credentials"),
    ("GET", 403, "access denied while reading gs://.*: check the credentials"),
    ("POST", 404, "no such bucket while writing gs://.*: check the URL"),
])
def test_no_access_is_one_line_and_touches_nothing(url, store, method, status, message):
    store.before = lambda asked, key: status if asked == method else None
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpointer(url, keep_last=1)
    assert "\n" not in str(caught.value) and not isinstance(caught.value, IntegrityError) and not store.objects


def test_a_refused_list_does_not_begin_again(saved, store):
    """TensorStore takes GCS's refusal to list for an empty bucket."""
    store.before = lambda method, key: 403 if method == "GET" and not key else None
    with pytest.raises(CheckpointError, match="cannot be listed: check that the credentials allow it"):
        newest(saved)


LIFE = """
import sys
from maxlm.checkpoint import Checkpointer, parts
sys.path.insert(0, sys.argv[2])
from test_checkpoint_bucket import state
parts.OBJECT_BYTES = 100
with Checkpointer(sys.argv[1], keep_last=1) as checkpointer:
    for step in range((checkpointer.latest_step() or 0) + 1, 9):
        checkpointer.save(step, state(step), {"step": step})
        print(step, flush=True)
"""


@pytest.mark.parametrize(("method", "step", "name", "kept"), [
    ("POST", 3, "process_0/00002", [2]),
    pytest.param("POST", 3, "commit.json", [2], marks=pytest.mark.slow),
    pytest.param("DELETE", 3, "writing/0", [2, 3], marks=pytest.mark.slow),
    pytest.param("DELETE", 2, "process_0/00002", [3], marks=pytest.mark.slow),
], ids=["objects", "commit", "after the commit", "deletion"])
def test_kill_inside_a_save(url, store, method, step, name, kept):
    """The third save of a life is killed, or the deletion of what it replaces, before this request is answered."""
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(maxlm.__file__).parents[1])}
    words = [sys.executable, "-W", "ignore", "-c", LIFE, url, str(pathlib.Path(__file__).parent)]
    life = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def kill(asked, key):
        if asked == method and f"/{step}." in key and key.endswith(name):
            life.send_signal(signal.SIGKILL)
            life.wait()
            return 503  # nobody hears it

    store.before = kill
    try:
        error = life.communicate(timeout=60)[1]
    finally:
        life.kill()
    assert life.returncode == -signal.SIGKILL, error
    store.before = lambda method, key: None
    assert any("/writing/" in key for key in store.objects)
    assert verify(url) == [(step, None) for step in kept]
    assert cases.raw(restore_state(url, None, like())) == cases.raw(state(kept[-1]))
    with Checkpointer(url, keep_last=1) as checkpointer:
        assert {key.split("/")[2].partition(".")[0] for key in store.objects} == {"run_name", *map(str, kept)}
        assert not any("/writing/" in key for key in store.objects)
        checkpointer.save(4, state(4), {"step": 4})
    assert verify(url) == [(4, None)]


def test_a_process_that_fails_or_is_silent_does_not_hang_the_others(url, store, monkeypatch):
    monkeypatch.setattr(bucket, "PEERS_SECONDS", 0.2)
    place = bucket.Bucket(url)
    with pytest.raises(CheckpointError, match=r"4.x is not complete, no word from the others for 0.2 s"):
        place._await("4.x", lambda names: "1.done" in names)
    store.objects["runs/the run/4.x/writing/1.failed"] = b"1"
    with pytest.raises(CheckpointError, match=r"4.x is not complete, process 1 failed: run the same command again"):
        place._await("4.x", lambda names: "1.done" in names)


def test_two_processes_write_one_checkpoint(url, store, tmp_path):
    """Stopped and resumed; every shard is stored once, and what both wrote restores in one process."""
    first = run_until(url, signal.SIGTERM, told=1, at_step=15)
    second = run_until(url, signal.SIGINT, told=0, at_step=first + 5)
    assert second > first >= 15 and latest_step(url) == second
    commit = json.loads(store.objects[keys(store, "/commit.json", second)[0]])
    held = [{(name, str(box)) for name, box, _, _ in part["pieces"]} for part in commit["parts"]]
    assert all(held) and not held[0] & held[1]
    whole = {"params": {"a": jnp.full((16, 4), second, jnp.float32), "b": jnp.zeros((16, 4), jnp.bfloat16)}}
    restored = restore_state(url, second, cases.abstract(cases.mesh(data=4, tensor=2), whole))
    assert cases.raw(restored)["params/a"] == cases.raw(whole)["params/a"]
    assert verify(url)[-1] == (second, None) and not [key for key in store.objects if "/writing/" in key]
