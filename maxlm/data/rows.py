"""The binary record of one packed row, and its vectorised decoding into a batch.

Legend: R rows, C = seq_len + 1 tokens a row holds, T = seq_len, N documents or pieces.

A record has a fixed size, so a batch decodes as one array:
    uint32      tokens used (the rest of the row is padding)
    uint32      UTF-8 bytes of source text that the row's targets cover
    ceil(C/8)   bytes: bit c is set where a segment (a document, or a chunk of a long one) starts
    C           tokens, little-endian uint16 (vocabulary up to 65,536) or uint32
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_HEADER_BYTES = 8
Batch = dict[str, np.ndarray]


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest stored type that holds every token id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True)
class RowFormat:
    """Encodes and decodes rows of `seq_len` predictions. `eot_id` fills padding."""

    seq_len: int
    vocab_size: int
    eot_id: int

    @property
    def capacity(self) -> int:
        return self.seq_len + 1

    @property
    def _mask_bytes(self) -> int:
        return (self.capacity + 7) // 8

    @property
    def record_bytes(self) -> int:
        return _HEADER_BYTES + self._mask_bytes + self.capacity * token_dtype(self.vocab_size).itemsize

    def encode(
        self, tokens_RC: np.ndarray, starts_RC: np.ndarray, used_R: np.ndarray, bytes_R: np.ndarray
    ) -> np.ndarray:
        """Records [R, record_bytes] uint8 of rows given as tokens, segment-start flags, lengths and text bytes."""
        records = np.empty((len(tokens_RC), self.record_bytes), np.uint8)
        header = np.stack([used_R, bytes_R], axis=1).astype("<u4")
        records[:, :_HEADER_BYTES] = header.view(np.uint8)
        body = _HEADER_BYTES + self._mask_bytes
        records[:, _HEADER_BYTES:body] = np.packbits(starts_RC, axis=1)
        records[:, body:] = np.ascontiguousarray(tokens_RC, token_dtype(self.vocab_size)).view(np.uint8)
        return records

    def decode(self, records: Sequence[bytes]) -> Batch:
        """Batch of int32 arrays [B, T] (tokens, targets, segment_ids, positions) and bytes [B].

        A target is -1 where its segment differs from its input's and on padding. A record of no bytes gives an empty
        row: segment 0, targets -1, bytes 0. Raises ValueError for a record of another size.
        """
        blank = bytes(self.record_bytes)
        raw = np.frombuffer(b"".join(record or blank for record in records), np.uint8)
        raw = raw.reshape(len(records), self.record_bytes)
        header = raw[:, :_HEADER_BYTES].copy().view("<u4").astype(np.int32)
        body = _HEADER_BYTES + self._mask_bytes
        starts_BC = np.unpackbits(raw[:, _HEADER_BYTES:body], axis=1, count=self.capacity)
        tokens_BC = raw[:, body:].copy().view(token_dtype(self.vocab_size)).astype(np.int32)

        columns_C = np.arange(self.capacity, dtype=np.int32)
        padding_BC = columns_C >= header[:, :1]
        segments_BC = np.cumsum(starts_BC, axis=1, dtype=np.int32)
        segments_BC[padding_BC] = 0
        tokens_BC[padding_BC] = self.eot_id
        first_BC = np.maximum.accumulate(columns_C * starts_BC, axis=1)
        positions_BC = columns_C - first_BC
        positions_BC[padding_BC] = 0
        same_BT = (segments_BC[:, 1:] == segments_BC[:, :-1]) & ~padding_BC[:, 1:]
        return {
            "tokens": np.ascontiguousarray(tokens_BC[:, :-1]),
            "targets": np.where(same_BT, tokens_BC[:, 1:], np.int32(-1)),
            "segment_ids": np.ascontiguousarray(segments_BC[:, :-1]),
            "positions": np.ascontiguousarray(positions_BC[:, :-1], np.int32),
            "bytes": np.ascontiguousarray(header[:, 1]),
        }
