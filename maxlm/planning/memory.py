"""Bytes of a device's memory by kind, from the compiler's own assignment of buffers.

libtpu writes that assignment before it generates code; `Compiled.memory_analysis()` of the finished program says the
same to 1 part in 100,000 (tests/planning/test_compile.py).
"""

from __future__ import annotations

import re

_ALLOCATION = re.compile(r"^allocation \d+: size (?P<size>\d+)(?:, color (?P<color>\d+))?, page \d+,? ?(?P<what>.*)$")


def assigned_bytes(buffer_assignment: str) -> dict[str, int]:
    """{'arguments', 'temporaries', 'constants'}: bytes in a device's main memory (color 0) that a program holds.
    Outputs that live in their arguments' memory are not counted again. Raises ValueError where the text has no
    allocation."""
    found = {"arguments": 0, "temporaries": 0, "constants": 0}
    lines = 0
    for line in buffer_assignment.splitlines():
        allocation = _ALLOCATION.match(line)
        if allocation is None:
            continue
        lines += 1
        if allocation["color"] not in (None, "0") or "thread-local" in allocation["what"]:
            continue
        kind = ("arguments" if allocation["what"].startswith("parameter") else
                "constants" if allocation["what"].startswith("constant") else "temporaries")
        found[kind] += int(allocation["size"])
    if not lines:
        raise ValueError("no allocation in this buffer assignment")
    return found
