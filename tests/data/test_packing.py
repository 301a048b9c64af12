"""Packing: every token is predicted exactly once, nothing that fits is cut, and rows survive their binary form."""

import time

import numpy as np
import pytest

from maxlm.data.packing import Pieces, best_fit, cut_documents, fill_rows
from maxlm.data.rows import RowFormat, token_dtype

EOT = 0


def random_lengths(seed, count=400, low=2, high=90):
    return np.random.default_rng(seed).integers(low, high, count)


def packed_batch(lengths, seq_len, pieces=None):
    """A batch of documents in which every token of the stream has its own id, and stands for id % 5 bytes."""
    fmt = RowFormat(seq_len, 1 << 20, EOT)
    stream = np.arange(1, lengths.sum() + 1, dtype=np.uint32)
    pieces = pieces or cut_documents(lengths, fmt.capacity)
    placement = best_fit(pieces.lengths, fmt.capacity)
    records = fill_rows(pieces, placement, np.arange(len(pieces.lengths)), stream, (stream % 5).astype(np.int32), fmt)
    return fmt.decode([record.tobytes() for record in records])


def predictions_wanted(lengths):
    """(input, target) ids: every token but a document's first is predicted from the token before it."""
    firsts = np.cumsum(lengths) - lengths + 1
    targets = np.setdiff1d(np.arange(1, lengths.sum() + 1), firsts)
    return np.stack([targets - 1, targets], axis=1)


def predictions_made(batch):
    made = batch["targets"] >= 0
    pairs = np.stack([batch["tokens"][made], batch["targets"][made]], axis=1)
    return pairs[np.argsort(pairs[:, 1], kind="stable")]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("seq_len", [1, 7, 32, 200])
def test_every_token_is_predicted_exactly_once(seq_len, seed):
    lengths = random_lengths(seed)
    np.testing.assert_array_equal(predictions_made(packed_batch(lengths, seq_len)), predictions_wanted(lengths))


def test_chunks_that_do_not_overlap_lose_predictions():
    lengths = random_lengths(0)
    right = cut_documents(lengths, 33)
    wrong = Pieces(right.starts, np.maximum(1, right.lengths - 1))
    assert len(predictions_made(packed_batch(lengths, 32, wrong))) < len(predictions_wanted(lengths))


def test_nothing_that_fits_is_cut():
    lengths = random_lengths(1, high=120)
    pieces = cut_documents(lengths, 65)
    offsets = np.cumsum(lengths) - lengths
    for offset, length in zip(offsets, lengths, strict=True):
        mine = pieces.lengths[(pieces.starts >= offset) & (pieces.starts < offset + length)]
        assert len(mine) == (1 if length <= 65 else -(-(length - 1) // 64))


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_not_overfull_and_waste_is_small(seed):
    lengths = random_lengths(seed, count=3000, high=129)
    placement = best_fit(lengths, 129)
    filled = np.bincount(placement.rows, lengths, placement.num_rows)
    assert filled.max() <= 129 and filled.min() > 0
    # No packing needs fewer rows than the tokens fill, nor than there are pieces longer than half a row.
    assert placement.num_rows <= 1.01 * max(lengths.sum() / 129, (lengths > 129 / 2).sum()) + 1
    # Pieces of a row lie side by side: each begins where another ends, or at column 0.
    ends = {(row, end) for row, end in zip(placement.rows, placement.columns + lengths, strict=True)}
    begins = zip(placement.rows, placement.columns, strict=True)
    assert all(column == 0 or (row, column) in ends for row, column in begins)


def test_best_fit_is_the_textbook_algorithm():
    lengths, capacity = random_lengths(5, count=200, high=60), 64
    free, rows = [], {}
    for piece in np.argsort(-lengths, kind="stable"):
        fits = [room for room in free if room >= lengths[piece]]
        if not fits:
            free.append(capacity)
            fits = [capacity]
        rows[piece] = min(fits)
        free[free.index(min(fits))] -= lengths[piece]
    placement = best_fit(lengths, capacity)
    assert placement.num_rows == len(free)
    assert {p: capacity - c for p, c in enumerate(placement.columns)} == rows


def test_packing_is_deterministic_and_not_quadratic():
    lengths = random_lengths(2, count=100_000, high=2049)
    began = time.perf_counter()
    first = best_fit(lengths, 2049)
    assert time.perf_counter() - began < 5
    np.testing.assert_array_equal(first.rows, best_fit(lengths, 2049).rows)


def test_boundaries_are_masked_and_positions_restart():
    batch = packed_batch(np.array([5, 3, 4]), 15)
    np.testing.assert_array_equal(batch["segment_ids"], [[1] * 5 + [2] * 4 + [3] * 3 + [0] * 3])
    np.testing.assert_array_equal(batch["positions"], [[*range(5), *range(4), *range(3), 0, 0, 0]])
    np.testing.assert_array_equal(
        batch["targets"], [[2, 3, 4, 5, -1, 10, 11, 12, -1, 7, 8, -1, -1, -1, -1]]
    )
    np.testing.assert_array_equal(batch["tokens"][0, 12:], [EOT] * 3)


def test_row_bytes_are_those_of_its_targets():
    batch = packed_batch(random_lengths(3), 32)
    made = batch["targets"] >= 0
    np.testing.assert_array_equal(batch["bytes"], np.where(made, batch["targets"] % 5, 0).sum(axis=1))


def test_empty_record_is_an_empty_row():
    batch = RowFormat(16, 300, 256).decode([b""])
    assert (batch["segment_ids"] == 0).all() and (batch["targets"] == -1).all() and (batch["bytes"] == 0).all()
    assert (batch["tokens"] == 256).all()
    assert all(batch[k].dtype == np.int32 for k in batch)


def test_stored_type_holds_the_vocabulary():
    assert token_dtype(1 << 16).itemsize == 2 and token_dtype((1 << 16) + 1).itemsize == 4
    with pytest.raises(ValueError):
        RowFormat(16, 300, 256).decode([b"short"])
