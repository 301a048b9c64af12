"""Documents into rows: chunks of long documents, best-fit packing of the rest.

A document is [EOT] + tokens + [EOT]. A row holds C = seq_len + 1 of them, of which seq_len are predicted. A document
longer than a row is cut into chunks that overlap by one token, so that every token is predicted exactly once; what is
shorter is never cut. Pieces are packed best-fit decreasing (Ding et al. 2024, arXiv:2404.10830, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from maxlm.data.rows import RowFormat


@dataclass(frozen=True)
class Pieces:
    """Where each piece lies in a token stream: `starts` and `lengths`, int64 [N]."""

    starts: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Placement:
    """Where each piece lies in the rows: `rows` and `columns`, int64 [N]; `num_rows` in all."""

    rows: np.ndarray
    columns: np.ndarray
    num_rows: int


def cut_documents(lengths_N: np.ndarray, capacity: int) -> Pieces:
    """Pieces of consecutive documents of `lengths_N` tokens (their two EOTs included, so at least 2 each).

    Chunk k of a long document starts at token k * (capacity - 1): its first token is the last target of chunk k - 1.
    """
    lengths_N = np.asarray(lengths_N, np.int64)
    assert capacity >= 2 and (lengths_N >= 2).all()
    stride = capacity - 1
    chunks_N = np.maximum(1, -(-(lengths_N - 1) // stride))
    offsets_N = np.cumsum(lengths_N) - lengths_N
    first_chunk_N = np.cumsum(chunks_N) - chunks_N
    document = np.repeat(np.arange(len(lengths_N)), chunks_N)
    chunk = np.arange(len(document)) - first_chunk_N[document]
    begin = chunk * stride
    return Pieces(offsets_N[document] + begin, np.minimum(capacity, lengths_N[document] - begin))


def best_fit(lengths_N: np.ndarray, capacity: int) -> Placement:
    """Best-fit decreasing: each piece, longest first, goes to the fullest row it fits in, or opens a row.

    Rows are kept by their free space, and a bit set of the free spaces that occur answers 'smallest that fits', so the
    cost is N log N for the sort and a constant a piece. Equal lengths keep their order: the result is deterministic.
    """
    lengths_N = np.asarray(lengths_N, np.int64)
    assert ((0 < lengths_N) & (lengths_N <= capacity)).all()
    rows = np.empty(len(lengths_N), np.int64)
    columns = np.zeros(len(lengths_N), np.int64)
    order = np.argsort(-lengths_N, kind="stable")
    num_full = int((lengths_N == capacity).sum())
    rows[order[:num_full]] = np.arange(num_full)
    num_rows = num_full
    rows_by_free: list[list[int]] = [[] for _ in range(capacity + 1)]
    occurring = 0
    for piece, length in zip(order[num_full:].tolist(), lengths_N[order[num_full:]].tolist(), strict=True):
        fitting = occurring >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_free[free].pop()
            if not rows_by_free[free]:
                occurring ^= 1 << free
        else:
            free, row = capacity, num_rows
            num_rows += 1
        rows[piece], columns[piece] = row, capacity - free
        if free > length:
            rows_by_free[free - length].append(row)
            occurring |= 1 << (free - length)
    return Placement(rows, columns, num_rows)


def fill_rows(
    pieces: Pieces,
    placement: Placement,
    chosen: np.ndarray,
    stream: np.ndarray,
    stream_bytes: np.ndarray,
    fmt: RowFormat,
) -> np.ndarray:
    """Records [R, record_bytes] of rows 0..R-1, from the pieces `chosen` that `placement` puts there.

    stream: token ids; stream_bytes: UTF-8 bytes of text that each of them stands for (0 for EOT), both [tokens].
    """
    starts, lengths = pieces.starts[chosen], pieces.lengths[chosen]
    rows, columns = placement.rows[chosen], placement.columns[chosen]
    shape = (placement.num_rows, fmt.capacity)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    source = np.repeat(starts, lengths) + within
    target = np.repeat(rows * fmt.capacity + columns, lengths) + within
    tokens = np.full(shape, fmt.eot_id, stream.dtype)
    tokens.reshape(-1)[target] = stream[source]
    # A piece's first token is input only: of a chunk, it was the target of the chunk before.
    text_bytes = np.where(within > 0, stream_bytes[source], 0)
    bytes_R = np.bincount(np.repeat(rows, lengths), text_bytes, placement.num_rows).astype(np.int64)
    flags = np.zeros(shape, np.bool_)
    flags[rows, columns] = True
    used_R = np.bincount(rows, lengths, placement.num_rows).astype(np.int64)
    return fmt.encode(tokens, flags, used_R, bytes_R)
