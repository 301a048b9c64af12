"""What each process of a run found, made known to all of them. Every process must make the same calls in order."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from maxlm.checkpoint.layout import CheckpointError


def gather(value: Any) -> list[Any]:
    """Every process's `value` (anything JSON holds), by process index, on every process."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(own.size)).reshape(-1)
    padded = np.zeros(1 << int(lengths.max()).bit_length(), np.uint8)  # few sizes, so few programs are compiled
    padded[: own.size] = own
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]


def of_first(value: Any) -> Any:
    """Process 0's `value`: network file systems may show others an older folder."""
    return gather(value if jax.process_index() == 0 else None)[0]


def first_of(value: Any) -> Any:
    """The first process's `value` that is not None, or None."""
    return next((found for found in gather(value) if found is not None), None)


def on_all(look: Callable[[], Any]) -> list[Any]:
    """What `look` (which must hold no collective) returns on every process, by process index, on every process.

    A CheckpointError of one is raised on all, so that none waits for another.
    """
    value, refusal = None, None
    try:
        value = look()
    except CheckpointError as error:
        if jax.process_count() == 1:
            raise
        refusal = str(error)
    found = gather([value, refusal])
    for _, text in found:
        if text is not None:
            raise CheckpointError(text)
    return [value for value, _ in found]
