"""A damaged prepared folder is found before training, in one line."""

import json
import shutil

import pytest
from data_corpus import prepare_quietly, write_folder

from maxlm.config import DatasetConfig
from maxlm.data.loader import TrainingData
from maxlm.schema import ConfigError


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    root = tmp_path_factory.mktemp("manifest")
    write_folder(root / "text", 40)
    prepare_quietly([root / "text"], root / "out")
    return root / "out"


@pytest.fixture
def folder(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "out")


def open_training(folder, verify=False):
    return TrainingData([DatasetConfig(str(folder))], seq_len=64, global_batch_size=4, seed=0, verify=verify)


def edit(folder, change):
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))


def truncate(folder):
    shard = folder / "train-00000.arrayrecord"
    shard.write_bytes(shard.read_bytes()[:-1000])


DAMAGE = {
    "half a manifest": (lambda f: (f / "manifest.json").write_text('{"version": 1, "dig'), "not JSON"),
    "binary manifest": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\0"), "not JSON"),
    "not a table": (lambda f: (f / "manifest.json").write_text("[]"), "corrupted"),
    "field missing": (lambda f: edit(f, lambda v: v.pop("train")), "corrupted"),
    "unknown field": (lambda f: edit(f, lambda v: v.update(extra=1)), "corrupted"),
    "other end token": (lambda f: edit(f, lambda v: v.update(eot_id=3)), "digest"),
    "newer version": (lambda f: edit(f, lambda v: v.update(version=99)), "version 99"),
    "shard missing": (lambda f: (f / "train-00000.arrayrecord").unlink(), "missing"),
    "shard truncated": (truncate, "bytes, its manifest says"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_when_opened(folder, name):
    open_training(folder)
    damage, words = DAMAGE[name]
    damage(folder)
    with pytest.raises(ConfigError, match=words) as caught:
        open_training(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_flipped_bit_is_found_by_verify(folder):
    shard = folder / "train-00000.arrayrecord"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    open_training(folder)
    with pytest.raises(ConfigError, match="SHA-256"):
        open_training(folder, verify=True)
