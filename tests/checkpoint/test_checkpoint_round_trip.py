"""What is saved comes back bit for bit, under stable names, on any mesh."""

import functools

import checkpoint_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.checkpoint import (
    Checkpointer,
    CheckpointError,
    array_digest,
    latest_step,
    named_leaves,
    read_meta,
    restore_state,
    tree_digest,
)

MESHES = {"fsdp=8": {"fsdp": 8}, "data=4 tensor=2": {"data": 4, "tensor": 2}, "one device": {"fsdp": 1}}


def save(folder, state, step=0, **meta):
    with Checkpointer(folder, keep_last=1) as checkpointer:
        assert checkpointer.save(step, state, meta)


def test_names_are_readable_and_free_of_classes():
    assert list(named_leaves(cases.make_state())) == [
        "opt_state/1/0/count",
        *(f"opt_state/1/0/{m}/layers_{i}/{w}" for m in ("mu", "nu") for i in (0, 1) for w in ("q_proj", "scale")),
        *(f"params/layers_{i}/{w}" for i in (0, 1) for w in ("q_proj", "scale")),
        "step",
    ]


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two leaves of the state are called 'a/b'"):
        named_leaves({"a/b": 1, "a": {"b": 2}})


@pytest.mark.parametrize("saved_on", MESHES)
def test_restore_is_bit_exact_on_every_mesh(tmp_path, saved_on):
    state = cases.make_state()
    save(tmp_path, cases.place(cases.mesh(**MESHES[saved_on]), state), step=7)
    for axes in MESHES.values():
        like = cases.abstract(cases.mesh(**axes), state)
        restored = restore_state(tmp_path, 7, like)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert cases.raw(restored) == cases.raw(state)
        for leaf, target in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
            assert leaf.sharding == target.sharding
    assert tree_digest(tmp_path) == array_digest(named_leaves({"params": state["params"]}))


def test_every_bit_pattern_survives(tmp_path):
    words = np.array([0x7FC00001, 0xFFC12345, 0x7F800000, 0x80000000, 0x00000001, 0x807FFFFF], np.uint32)
    state = {
        "params": {
            "float32": jnp.asarray(words.view(np.float32)),
            "bfloat16": jax.lax.bitcast_convert_type(jnp.arange(65536, dtype=jnp.uint32).astype(jnp.uint16),
                                                     jnp.bfloat16),
            "int32": jnp.asarray([-(2**31), -1, 0, 2**31 - 1], jnp.int32),
            "scalar": jnp.float32(-0.0),
        },
        "host": np.arange(5, dtype=np.float64),
    }
    expected = cases.raw(state)
    save(tmp_path, state)
    del state["host"]  # float64 does not exist on these devices; a section may be left out
    assert cases.raw(restore_state(tmp_path, None, cases.abstract(cases.mesh(fsdp=1), state))) == {
        name: value for name, value in expected.items() if name != "host"
    }
    assert tree_digest(tmp_path) == array_digest(named_leaves({"params": state["params"]}))


def test_digest_sees_one_flipped_bit_and_a_rename(tmp_path):
    state = cases.make_state()
    arrays = {n: np.asarray(x) for n, x in named_leaves({"params": state["params"]}).items()}
    name = "params/layers_1/q_proj"
    flipped = arrays[name].copy()
    flipped.view(np.uint32)[3, 3] ^= 1
    renamed = {n.replace("layers_1", "layers_2"): x for n, x in arrays.items()}
    reshaped = {**arrays, name: arrays[name].reshape(8, 16)}
    digests = {array_digest(x) for x in (arrays, {**arrays, name: flipped}, renamed, reshaped)}
    assert len(digests) == 4


def test_digest_reads_in_pieces(tmp_path, monkeypatch):
    save(tmp_path, cases.make_state())
    whole = tree_digest(tmp_path)
    monkeypatch.setattr("maxlm.checkpoint.digest._READ_BYTES", 600)
    assert tree_digest(tmp_path) == whole


def test_state_may_be_donated_and_overwritten_at_once(tmp_path):
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    host = np.zeros(1000, np.float32)
    state = {"params": {"w": cases.place(cases.mesh(fsdp=8), jnp.zeros((512, 512)))}, "host": host}
    with Checkpointer(tmp_path, keep_last=9) as checkpointer:
        for step in range(3):
            checkpointer.save(step, state, {})
            host += 1
            for _ in range(20):  # many buffers are freed and reused while the save is being written
                state = advance(state)
            state = {**state, "params": {"w": state["params"]["w"] - 19}, "host": host}
    for step in range(3):
        target = cases.abstract(cases.mesh(fsdp=1), {"params": {"w": jnp.zeros((512, 512))}, "host": host})
        restored = restore_state(tmp_path, step, target)
        assert set(np.unique(restored["params"]["w"])) == set(np.unique(restored["host"])) == {float(step)}


def test_meta_comes_back_as_it_was(tmp_path):
    meta = {"config": {"model": {"num_layers": 2}}, "data": {"digest": "ab", "step": 3}, "versions": {"jax": "x"}}
    state = {"params": {"w": jnp.ones(3)}}
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        assert checkpointer.latest_step() is None
        checkpointer.save(3, state, meta)
        checkpointer.save(4, state, {})
        assert checkpointer.restore_meta(3) == meta
        assert checkpointer.restore_meta() == read_meta(tmp_path) == {}
        assert checkpointer.latest_step() == latest_step(tmp_path) == 4
        with pytest.raises(TypeError):  # at once, not in the background
            checkpointer.save(5, state, {"config": object()})


def _rename(state):
    state["params"].layers_2 = state["params"].layers_1
    del state["params"].layers_1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(step=jnp.zeros(2, jnp.int32)), r"step is int32\[\] in the checkpoint, int32\[2\] here"),
        (lambda s: s.update(step=jnp.float32(0)), r"step is int32\[\] in the checkpoint, float32\[\] here"),
        (_rename, "params/layers_1/q_proj is in the checkpoint only"),
        (_rename, "params/layers_2/q_proj is missing from the checkpoint"),
        (lambda s: s.update(ema=jnp.zeros(2)), "ema is missing from the checkpoint"),
    ],
)
def test_another_state_is_refused_with_the_first_differences(tmp_path, change, message):
    save(tmp_path, cases.make_state(), step=5)
    other = cases.make_state()
    change(other)
    with pytest.raises(CheckpointError, match=message) as caught:
        restore_state(tmp_path, 5, cases.abstract(cases.mesh(fsdp=1), other))
    assert "\n" not in str(caught.value) and str(tmp_path / "5") in str(caught.value)


def test_params_alone_can_be_restored(tmp_path):
    state = cases.make_state()
    save(tmp_path, state)
    params = {"params": state["params"]}
    assert cases.raw(restore_state(tmp_path, None, cases.abstract(cases.mesh(fsdp=2), params))) == cases.raw(params)


def test_missing_step_and_unplaced_target_say_so(tmp_path):
    state = {"params": {"w": jnp.ones(3)}}
    like = cases.abstract(cases.mesh(fsdp=1), state)
    with pytest.raises(CheckpointError, match="no complete checkpoint in .*: check the path"):
        restore_state(tmp_path, None, like)
    save(tmp_path, state, step=4)
    with pytest.raises(CheckpointError, match="no complete checkpoint of step 5 .*choose one of: 4"):
        restore_state(tmp_path, 5, like)
    with pytest.raises(ValueError, match="'params/w' needs a concrete sharding"):
        restore_state(tmp_path, 4, jax.eval_shape(functools.partial(jax.tree.map, jnp.negative), state))


@pytest.mark.parametrize("make", [lambda: jax.random.key(0), lambda: "text", lambda: jnp.zeros((0, 4)), object])
def test_what_is_no_array_of_numbers_is_refused(tmp_path, make):
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        with pytest.raises(CheckpointError, match="state leaf 'odd', .* cannot be saved"):
            checkpointer.save(0, {"odd": make()}, {})
