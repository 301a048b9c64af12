"""Arrays put together from pieces that lie, in whole or in part, in units which are read and checked one at a time.

A unit is what has a checksum of its own: a block of a file (chunks.py), an object of a store (parts.py). Every unit is
read once, into the memory where the arrays will stand, several at a time and not far ahead of the consumer.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from maxlm.checkpoint import pieces
from maxlm.checkpoint.leaves import Box, aligned_empty

Target = tuple[slice, np.ndarray]  # these bytes of a unit belong there


class Cut(NamedTuple):
    """The bytes `source` of a unit are the bytes `target` of the piece `box` of the array `name`, which has `size`."""

    name: str
    box: Box
    size: int
    source: slice
    target: slice


def gather(
    index: Mapping[str, list[Any]], covers: Mapping[str, Mapping[Box, list[Box]]], units: Mapping[Any, list[Cut]],
    fetch: Callable[[Any, list[Target]], None], *, at_once: int,
) -> Iterator[tuple[str, dict[Box, np.ndarray]]]:
    """Each array's boxes (the keys of its `covers`, whose values are the pieces that fill them) once all its units are
    read, in the order of `units`.

    fetch: called in a thread with a unit, also one without cuts, and where its bytes go; it raises where they are not
    what was written.
    """
    left = Counter(cut.name for cuts in units.values() for cut in cuts)
    buffers: dict[str, dict[Box, np.ndarray]] = {name: {} for name in index}

    def targets(cuts: list[Cut]) -> Iterator[Target]:
        for cut in cuts:
            held = buffers[cut.name]
            if cut.box not in held:
                held[cut.box] = aligned_empty([cut.size], np.dtype(np.uint8))
            yield cut.source, held[cut.box][cut.target]

    work = ((unit, list(targets(cuts))) for unit, cuts in units.items())
    for cuts, _ in zip(units.values(), in_order(lambda item: fetch(*item), work, at_once=at_once), strict=True):
        for cut in cuts:
            left[cut.name] -= 1
            if not left[cut.name]:
                yield cut.name, _assembled(np.dtype(index[cut.name][0]), covers[cut.name], buffers.pop(cut.name))


def in_order(function: Callable[[Any], Any], items: Iterable[Any], *, at_once: int) -> Iterator[Any]:
    """`map` with `at_once` calls in flight in threads; it runs no further ahead of its consumer."""
    waiting: deque[Any] = deque()
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= at_once:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _assembled(dtype: np.dtype, covers: Mapping[Box, list[Box]], held: dict[Box, np.ndarray]) -> dict[Box, np.ndarray]:
    parts = {}
    for need, chosen in covers.items():
        if chosen == [need]:
            parts[need] = pieces.shaped(held[need], dtype, need)
            continue
        parts[need] = aligned_empty([stop - start for start, stop in need], dtype)
        for box in chosen:
            pieces.assemble(parts[need], need, box, pieces.shaped(held[box], dtype, box))
    return parts
