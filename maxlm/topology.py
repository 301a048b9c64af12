"""Names of what a job runs on or is compiled for, KIND:SIZExSIZE: `v5p:4x4x8` is a TPU slice by the chips along each
dim of its torus, `h100:4x8` is four hosts of eight GPUs, `cpu:1x2` is one host with two CPU processes.

Which kinds a command knows is its own affair (planning/topology.py, submit/topology.py); how they are written is here.
Standard library only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from maxlm.schema import ConfigError, require


class Tpu(NamedTuple):
    """One generation: its name in hardware.py, and the dims of its torus."""

    chip: str
    dims: int


TPUS: Mapping[str, Tpu] = {
    "v4": Tpu("TPU v4", 3), "v5e": Tpu("TPU v5e", 2), "v5p": Tpu("TPU v5p", 3), "v6e": Tpu("TPU v6e", 2),
    "7x": Tpu("TPU7x", 3),
}
_ALIASES = {"tpu7x": "7x", "v7x": "7x", "v5litepod": "v5e", "a100": "a100-80"}
_TORUS = {2: "16x16", 3: "4x4x8"}  # examples


def parse_name(text: str, hosts: Sequence[str] = (), bare: Sequence[str] = ()) -> tuple[str, tuple[int, ...]]:
    """(kind, sizes) of a name: a TPU slice, or one of the kinds `hosts`, which are written HOSTSxDEVICES.

    bare: what else the command takes, for the message. Raises ConfigError, with the nearest name or the right form.
    """
    kind, _, shape = text.lower().partition(":")
    written, kind = kind, _ALIASES.get(kind, kind)
    known = [*TPUS, *hosts, *bare]
    if kind not in TPUS and kind not in hosts:
        if kind in bare:
            raise ConfigError(f"--topology {text}: {kind} takes no sizes: write --topology {kind}")
        near = difflib.get_close_matches(kind, known, n=1)
        meant = f", did you mean {near[0]!r}" if near else ""
        raise ConfigError(f"--topology {text}: {written!r} is not known{meant}; known: {', '.join(known)}")
    example = f"{kind}:{_TORUS[TPUS[kind].dims] if kind in TPUS else '4x8'}"
    require(bool(re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape)), f"--topology {text} must be like {example}")
    sizes = tuple(int(size) for size in shape.split("x"))
    if kind in TPUS:
        require(len(sizes) == TPUS[kind].dims,
                f"--topology {text}: a slice of {kind} has {TPUS[kind].dims} sizes, such as {example}")
    else:
        form = "HOSTSxPROCESSES" if kind == "cpu" else "HOSTSxGPUS"
        require(len(sizes) == 2, f"--topology {text} must be {kind}:{form}, such as {example}")
    return kind, sizes
