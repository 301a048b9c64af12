"""Damage of every kind is found, named in one line and set aside; what is restored is what was saved."""

import os
import pathlib
import random
import shutil

import checkpoint_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from maxlm.checkpoint import (
    Checkpointer,
    CheckpointError,
    IntegrityError,
    chunks,
    integrity,
    restore_state,
    tree_digest,
    verify,
)


def state(step):
    words = np.random.default_rng(step).integers(0, 2**31, 1 << 18, dtype=np.int32)
    return {"params": {"large": jnp.asarray(words), "small": jnp.full(5, step, jnp.int32)}}


def like(step=0, meta=None):
    return cases.abstract(cases.mesh(fsdp=1), state(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpointer(folder, keep_last=9) as checkpointer:
        for step in (10, 20, 30):
            checkpointer.save(step, state(step), {"step": step})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def largest(step):
    return max((file for file in step.glob("state/**/*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip(file, at=None):
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    file.write_bytes(data)


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


DAMAGE = {
    "truncated array file": lambda step: truncate(largest(step)),
    "flipped bit in an array file": lambda step: flip(largest(step)),
    "missing array file": lambda step: largest(step).unlink(),
    "missing manifest": lambda step: (step / "manifest.json").unlink(),
    "flipped bit in the manifest": lambda step: flip(step / "manifest.json"),
    "zero-length manifest": lambda step: os.truncate(step / "manifest.json", 0),
    "zero-length meta": lambda step: os.truncate(step / "meta/meta.json", 0),
    "flipped bit in the meta": lambda step: flip(step / "meta/meta.json"),
    "zero-length array metadata": lambda step: os.truncate(step / "state/_METADATA", 0),
    "zero-length step metadata": lambda step: os.truncate(step / "_CHECKPOINT_METADATA", 0),
    "missing meta": lambda step: (step / "meta/meta.json").unlink(),
    "missing commit": lambda step: (step / "commit_success.txt").unlink(),
    "missing state": lambda step: shutil.rmtree(step / "state"),
    "nothing but the folder": lambda step: [shutil.rmtree(step), step.mkdir()],
}


def newest(folder, strict=False):
    lines = []
    with Checkpointer(folder, keep_last=9) as checkpointer:
        return checkpointer.restore_newest(like, strict=strict, say=lines.append), lines


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_set_aside_and_the_one_before_is_used(folder, kind):
    DAMAGE[kind](folder / "30")
    assert [(step, damage is None) for step, damage in verify(folder)] == [(10, True), (20, True), (30, False)]
    for read in (lambda: restore_state(folder, None, like()), lambda: tree_digest(folder)):  # readers rename nothing
        with pytest.raises(IntegrityError, match=str(folder / "30")):
            read()
    with pytest.raises(IntegrityError, match="--strict refuses"):
        newest(folder, strict=True)
    before = {file.relative_to(folder / "30") for file in (folder / "30").rglob("*")}
    found, lines = newest(folder)
    assert (found.step, found.meta) == (20, {"step": 20}) and cases.raw(found.state) == cases.raw(state(20))
    (line,) = lines
    assert line.startswith("checkpoint 30 is damaged (") and line.endswith("set aside as 30.damaged")
    assert {file.relative_to(folder / "30.damaged") for file in (folder / "30.damaged").rglob("*")} == before
    assert newest(folder)[1] == []


def test_any_flipped_bit_of_any_file_is_found(folder):
    draw = random.Random(0)
    for file in [file for file in (folder / "30").rglob("*") if file.is_file()]:
        if str(file.relative_to(folder / "30")) in integrity._WRITTEN_LATER:
            continue  # by Orbax, which never reads them again
        at = draw.randrange(file.stat().st_size)
        flip(file, at)
        assert verify(folder)[-1][1], f"byte {at} of {file}"
        flip(file, at)
    assert [damage for _, damage in verify(folder)] == [None] * 3


def test_a_large_file_says_where(folder, monkeypatch):
    monkeypatch.setattr(integrity, "BLOCK_BYTES", 1 << 16)
    with Checkpointer(folder, keep_last=9) as checkpointer:
        checkpointer.save(40, state(40), {})
    file = largest(folder / "40")
    flip(file, 3 * (1 << 16) + 5)
    name = file.relative_to(folder / "40")
    assert integrity.damage(folder / "40") == f"{name} differs from its checksum between bytes 196608 and 262143"
    shares = [integrity.damage(folder / "40", (i, 3)) for i in range(3)]  # as three processes share the work
    assert sorted(map(bool, shares)) == [False, False, True]


def test_several_in_a_row_and_all(folder):
    flip(largest(folder / "30"))
    truncate(largest(folder / "20"))
    found, lines = newest(folder)
    assert found.step == 10 and [line[:13] for line in lines] == ["checkpoint 30", "checkpoint 20"]
    flip(largest(folder / "10"))
    for _ in range(2):  # a second start must not train from the beginning either
        with pytest.raises(IntegrityError, match=r"no good checkpoint is left in .*10.damaged.*another --run-dir"):
            newest(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["10.damaged", "20.damaged", "30.damaged"]


def test_nothing_saved_is_not_damage(tmp_path):
    assert newest(tmp_path / "new") == (None, [])


def test_a_step_set_aside_can_be_saved_and_damaged_again(folder):
    for count in (1, 2):
        flip(largest(folder / "30"))
        with Checkpointer(folder, keep_last=9) as checkpointer:
            assert checkpointer.restore_newest(like, say=lambda line: None).step == 20
            assert checkpointer.save(30, state(30), {"step": 30})
        assert len(list(folder.glob("30.damaged*"))) == count
        assert cases.raw(restore_state(folder, 30, like())) == cases.raw(state(30))


def test_chunks_are_found_in_any_tree(tmp_path):
    """TensorStore writes what is read straight from its files: trees of several levels, chunks within the tree."""
    base = {"driver": "ocdbt", "base": f"file://{tmp_path}/state/",
            "config": {"max_inline_value_bytes": 300, "max_decoded_node_bytes": 900}}
    arrays = {f"params/w{i:02d}": np.random.default_rng(i).random((5, 6)).astype(np.float32) for i in range(30)}
    for name, array in arrays.items():
        spec = {"driver": "zarr", "kvstore": {**base, "path": f"{name}/"},
                "metadata": {"shape": [5, 6], "chunks": [2, 6], "dtype": "<f4", "compressor": None}}
        ts.open(spec, create=True).result().write(array).result()
    large = np.arange(4000, dtype=np.int32)
    spec = {"driver": "zarr", "kvstore": {**base, "path": "large/"},
            "metadata": {"shape": [4000], "chunks": [1000], "dtype": "<i4", "compressor": None}}
    ts.open(spec, create=True).result().write(large).result()
    integrity.write_manifest(tmp_path)
    index = {name: ["float32", [5, 6]] for name in arrays} | {"large": ["int32", [4000]]}
    boxes = {name: {((0, 5), (0, 6)), ((1, 4), (2, 3))} for name in arrays} | {"large": {((500, 2500),)}}
    table = chunks.table(tmp_path)
    assert table.in_tree and any(chunk.file for chunk in table.arrays["large"].values())
    for name, found in chunks.read(tmp_path, table, index, boxes):
        for box, part in found.items():
            expected = (arrays | {"large": large})[name][tuple(slice(*edges) for edges in box)]
            assert part.dtype == expected.dtype and np.array_equal(part, expected), (name, box)
        boxes.pop(name)
    assert not boxes
    del table.arrays["large"][(2000, 3000),]
    with pytest.raises(IntegrityError, match="chunks of large are missing"):
        next(chunks.read(tmp_path, table, {"large": index["large"]}, {"large": {((500, 2500),)}}))


def test_orbax_reads_what_was_saved(saved):
    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in cases.raw(state(20))}
    found = ocp.PyTreeCheckpointHandler().restore(saved / "20/state", restore_args=as_numpy)
    assert {name: np.asarray(array).tobytes() for name, array in found.items()} == {
        name: data for name, (_, _, data) in cases.raw(state(20)).items()
    }


def test_what_may_not_be_read_is_no_damage(folder, monkeypatch):
    def refuse(path, number):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(integrity, "_crc_of_block", refuse)
    with pytest.raises(CheckpointError, match="may not be read: make it readable") as caught:
        newest(folder)
    assert not isinstance(caught.value, IntegrityError)
    assert sorted(p.name for p in folder.iterdir()) == ["10", "20", "30"]


def test_a_checkpoint_without_checksums_is_of_an_older_maxlm(folder):
    (folder / "30/manifest.json").unlink()
    meta = folder / "30/meta/meta.json"
    meta.write_text(meta.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(CheckpointError, match="is of format 1, this maxlm reads 2"):
        newest(folder)
    assert (folder / "30").is_dir()


def test_the_manifest_names_every_file(saved):
    step = pathlib.Path(saved) / "30"
    files = {str(file.relative_to(step)) for file in step.rglob("*") if file.is_file()}
    assert set(integrity.read_manifest(step)) == files - {"manifest.json", *integrity._WRITTEN_LATER}
    assert all(size == (step / name).stat().st_size for name, (size, _) in integrity.read_manifest(step).items())
    assert jax.process_count() == 1
