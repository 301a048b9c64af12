"""Batches are a pure function of (folders, weights, seed, step), whoever reads them and however."""

import json
import threading

import numpy as np
import pytest
from data_corpus import prepare_quietly, write_folder

from maxlm.config import DatasetConfig
from maxlm.data.loader import HeldoutData, TrainingData
from maxlm.data.tokenizer import ByteTokenizer
from maxlm.schema import ConfigError

SEQ_LEN, BATCH = 64, 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two prepared folders: 'big', and 'digits' whose text is digits alone."""
    root = tmp_path_factory.mktemp("data")
    write_folder(root / "text", 120)
    (root / "numbers").mkdir()
    for number in range(60):
        (root / "numbers" / f"{number:03d}.txt").write_text(str(number) * 70)
    prepare_quietly([root / "text"], root / "big", shard_rows=40)
    prepare_quietly([root / "numbers"], root / "digits")
    return root


def training(root, *names, seed=0, weights=(1.0, 1.0), batch=BATCH):
    configs = [DatasetConfig(str(root / name), weight) for name, weight in zip(names, weights, strict=False)]
    return TrainingData(configs, seq_len=SEQ_LEN, global_batch_size=batch, seed=seed)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def same(a, b):
    return all((a[name] == b[name]).all() for name in a)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_global_batch_is_the_same_for_any_number_of_processes(folders, processes):
    whole = training(folders, "big").batch(7)
    share = BATCH // processes
    parts = [training(folders, "big").batch(7, range(p * share, (p + 1) * share)) for p in range(processes)]
    assert_same(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})


@pytest.mark.parametrize("threads", [1, 4])
def test_iterating_equals_random_access(folders, threads):
    data = training(folders, "big", "digits")
    with data.iterate(5, range(4, 9), read_threads=threads, prefetch_batches=3) as stream:
        for step in range(5, 30):
            got_step, batch = next(stream)
            assert got_step == step
            assert_same(batch, data.batch(step, range(4, 9)))
            assert batch["tokens"].shape == (5, SEQ_LEN) and batch["bytes"].shape == (5,)


def test_skipped_data_is_never_read(folders):
    data, skipped = training(folders, "big"), ((3, 5), (7, 8))
    with data.iterate(2, read_threads=2, skipped=skipped) as stream:
        for step, index in ((2, 2), (3, 5), (4, 6), (5, 8), (6, 9)):
            got_step, batch = next(stream)
            assert got_step == step
            assert_same(batch, data.batch(index))


@pytest.mark.slow
def test_worker_processes_give_the_same_batches_and_end(folders):
    data = training(folders, "big")
    stream = data.iterate(3, worker_processes=2, read_threads=1, prefetch_batches=2)
    for step in range(3, 8):
        got_step, batch = next(stream)
        assert got_step == step
        assert_same(batch, data.batch(step))
    stream.close()
    import multiprocessing

    assert not multiprocessing.active_children()


def test_close_stops_the_reading_threads(folders):
    before = set(threading.enumerate())
    stream = training(folders, "big").iterate(0)
    next(stream)
    stream.close()
    stream.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive() or thread.daemon
    with pytest.raises(ValueError, match="closed"):
        next(stream)


def test_an_epoch_visits_every_row_once_and_the_next_in_another_order(folders):
    data = training(folders, "big", batch=1)

    def epoch(number):
        return [data.batch(number * data.rows + i)["tokens"].tobytes() for i in range(data.rows)]

    first, second = epoch(0), epoch(1)
    assert sorted(first) == sorted(second) and first != second
    assert len(set(first)) == data.rows


def test_seed_and_step_change_the_batch(folders):
    data = training(folders, "big")
    assert same(data.batch(0), training(folders, "big").batch(0))
    assert not same(data.batch(0), data.batch(1))
    assert not same(data.batch(0), training(folders, "big", seed=1).batch(0))
    # Neighbouring seeds must not share an order one epoch apart.
    next_epoch = training(folders, "big", batch=1).batch(data.rows)
    assert not same(next_epoch, training(folders, "big", seed=1, batch=1).batch(0))


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.5, 0.5)])
def test_mixture_weights_hold_in_every_stretch(folders, weights):
    data = training(folders, "big", "digits", weights=weights, batch=100)
    wanted = 100 * weights[1] / sum(weights)
    for step in (0, 3, 1000):
        tokens = data.batch(step)["tokens"]
        digits = ((tokens == 256) | ((tokens >= ord("0")) & (tokens <= ord("9")))).all(axis=1)
        assert abs(digits.sum() - wanted) <= 2


def test_digest_depends_on_weights_not_on_their_scale(folders):
    one = training(folders, "big", "digits", weights=(3.0, 1.0)).digest
    assert one == training(folders, "big", "digits", weights=(6.0, 2.0)).digest
    assert one != training(folders, "big", "digits").digest != training(folders, "big").digest


def test_heldout_covers_its_text_exactly(folders):
    manifest = json.loads((folders / "big" / "manifest.json").read_text())["heldout"]
    held = HeldoutData([DatasetConfig(str(folders / "big"))], seq_len=SEQ_LEN, global_batch_size=BATCH)
    batches = [held.batch(i) for i in range(held.num_batches)]
    assert all(batch["tokens"].shape == (BATCH, SEQ_LEN) for batch in batches)
    assert sum(int((batch["targets"] >= 0).sum()) for batch in batches) == manifest["tokens"] == held.tokens
    assert sum(int(batch["bytes"].sum()) for batch in batches) == manifest["bytes"] == held.bytes
    assert held.rows % BATCH and (batches[-1]["segment_ids"][held.rows % BATCH :] == 0).all()
    assert_same(
        {k: v[4:8] for k, v in batches[-1].items()}, held.batch(held.num_batches - 1, range(4, 8))
    )


def test_row_bytes_match_decoded_targets(folders):
    batch = training(folders, "big").batch(0)
    for row in range(BATCH):
        text_ids = batch["targets"][row][(batch["targets"][row] >= 0) & (batch["targets"][row] != ByteTokenizer.eot_id)]
        assert len(text_ids) == batch["bytes"][row]


def test_mistakes_are_one_line(folders, tmp_path):
    big = DatasetConfig(str(folders / "big"))
    for configs, seq_len, batch, words in [
        ([DatasetConfig(str(tmp_path / "none"))], SEQ_LEN, 4, "maxlm data prepare"),
        ([DatasetConfig(str(tmp_path))], SEQ_LEN, 4, "manifest.json"),
        ([big], 128, 4, "train.seq_len=128.*--seq-len 64"),
        ([big], SEQ_LEN, 10**6, "shorter than one batch"),
        ([], SEQ_LEN, 4, "data.path"),
    ]:
        with pytest.raises(ConfigError, match=words) as caught:
            TrainingData(configs, seq_len=seq_len, global_batch_size=batch, seed=0)
        assert "\n" not in str(caught.value)


def test_mixture_of_tokenizers_is_refused(folders, tmp_path):
    prepare_quietly([folders / "text"], tmp_path / "bpe", tokenizer="bpe:300")
    with pytest.raises(ConfigError, match="different tokenizers"):
        TrainingData([DatasetConfig(str(folders / "big")), DatasetConfig(str(tmp_path / "bpe"))], seq_len=SEQ_LEN,
                     global_batch_size=4, seed=0)
