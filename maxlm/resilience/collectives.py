"""Which collectives a compiled program holds, in order and by mesh axis, read from its HLO text.

JAX does not tell which collective a device is in. What can be known of a program that hangs is the list of those that
it may be in: text order is the order in which XLA scheduled them within one computation (a loop's body is one).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from maxlm.parallel.device_groups import axes_crossed

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
_OPERATION = re.compile(rf" = (?P<type>.+?) (?P<kind>{_KINDS})(-start)?\(")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_SOURCE = re.compile(r'op_name="(?P<name>[^"]*)"')


def collectives(hlo: str, axes: Mapping[str, int]) -> list[dict[str, Any]]:
    """One dict a collective: `kind`, `over` (the mesh axes it crosses), `type` of its result, `source` (the JAX
    operation it came from), `computation` (where it is, 'ENTRY' for the program itself).

    axes: sizes of the mesh's axes, in the order in which the mesh numbers its devices. A collective among a single
    device each is left out.
    """
    found, computation = [], ""
    for line in hlo.splitlines():
        if opening := _COMPUTATION.match(line):
            computation = "ENTRY" if opening["entry"] else opening["name"]
        if not (operation := _OPERATION.search(line)):
            continue
        over = axes_crossed(line, axes)
        if over:
            source = _SOURCE.search(line)
            found.append({"kind": operation["kind"], "over": over, "type": operation["type"],
                          "source": source["name"] if source else "", "computation": computation})
    return found
