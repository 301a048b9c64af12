"""What can go wrong, drawn from a seed: which fault, to which process, at which moment.

A fault is drawn whole before anything runs, so the same seed strikes the same way; what the clock decides is only
which instruction it hits.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["kill one", "kill all", "SIGTERM one", "SIGTERM all", "hang", "pause", "cut", "blip", "damage",
               "disk full"]
Moment = Literal["step", "save", "restore"]

DESCRIPTION: dict[Kind, str] = {
    "kill one": "kill -9 of one process",
    "kill all": "kill -9 of every process",
    "SIGTERM one": "SIGTERM to one process",
    "SIGTERM all": "SIGTERM to every process",
    "hang": "SIGSTOP of one process, for good",
    "pause": "SIGSTOP, then SIGCONT",
    "cut": "network cut to one host, for good",
    "blip": "network cut to one host, healed",
    "damage": "kill -9 of all, then damage to the newest checkpoint",
    "disk full": "disk full",
}
DAMAGES = ("truncate", "flip", "delete", "empty metadata")

# (kind, moment, detail): each is drawn equally often. 'damage' and 'disk full' have variants of their own.
_ALONE: tuple[tuple[Kind, Moment, str], ...] = (
    ("kill all", "step", ""), ("kill all", "save", ""), ("kill all", "restore", ""),
    ("SIGTERM all", "step", ""), ("SIGTERM all", "save", ""), ("pause", "step", ""), ("disk full", "step", ""),
    *(("damage", "step", damage) for damage in DAMAGES),
)
_TOGETHER: tuple[tuple[Kind, Moment, str], ...] = (
    ("kill one", "step", ""), ("kill one", "save", ""), ("kill one", "restore", ""),
    ("kill all", "step", ""), ("kill all", "save", ""),
    ("SIGTERM one", "step", ""), ("SIGTERM one", "save", ""), ("SIGTERM all", "step", ""),
    ("hang", "step", ""), ("hang", "save", ""), ("cut", "step", ""), ("cut", "save", ""), ("blip", "step", ""),
    ("disk full", "step", ""),
    *(("damage", "step", damage) for damage in DAMAGES),
)


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    targets: indices of the processes (hosts) that it befalls. moment: 'step', once `step` was logged; 'save', in the
    first save begun after that; 'restore', while the run is starting. delay: seconds after that moment.
    seconds: how long a fault that passes lasts. detail: the kind of damage. draw: seeds what is drawn when it strikes.
    """

    kind: Kind
    moment: Moment
    targets: tuple[int, ...]
    step: int
    delay: float
    seconds: float = 0.0
    detail: str = ""
    draw: int = 0


@dataclass(frozen=True)
class Plan:
    """One scenario: a run of `processes` processes that meets `faults` in turn. eight_bit: it multiplies in FP8 and
    keeps its moments in 8 bits."""

    index: int
    processes: int
    faults: tuple[Fault, ...]
    eight_bit: bool = False


PROCESSES = (1, 2, 1, 2, 4)  # of scenarios 0, 1, 2, 3, 4, 5 = 0 again, ...


def plan(seed: int, index: int, faults: int, steps: int, can_cut: bool) -> Plan:
    """Scenario `index` of `seed`: `faults` faults spread over a run of `steps` steps.

    Each kind is as frequent as any other over many scenarios: kinds are dealt from a shuffled deck of all of them.
    Every other round of PROCESSES computes in 8 bits. can_cut: whether networks can be cut here; where not, no cut is
    drawn.
    """
    processes = PROCESSES[index % len(PROCESSES)]
    rounds, place = divmod(index, len(PROCESSES))
    before = rounds * PROCESSES.count(processes) + PROCESSES[:place].count(processes)
    kinds = [kind for kind in (_ALONE if processes == 1 else _TOGETHER) if can_cut or kind[0] not in ("cut", "blip")]
    chosen = []
    for number in range(before * faults, (before + 1) * faults):
        deck, card = divmod(number, len(kinds))
        chosen.append(random.Random(f"{seed} {processes} {deck}").sample(kinds, len(kinds))[card])
    return Plan(index, processes, spread(f"{seed} {index}", chosen, processes, steps), eight_bit=rounds % 2 == 1)


def spread(seed: str, chosen: list[tuple[Kind, Moment, str]], processes: int, steps: int) -> tuple[Fault, ...]:
    """The chosen kinds in order, each in its own stretch of the run."""
    draw = random.Random(seed)
    stretch = (steps - 4) // len(chosen)
    faults = []
    for place, (kind, moment, detail) in enumerate(chosen):
        one = (draw.randrange(processes),)
        faults.append(Fault(
            kind, moment, tuple(range(processes)) if kind.endswith("all") or kind in ("damage", "disk full") else one,
            step=1 + place * stretch + draw.randrange(min(stretch, steps // 2)),
            delay=draw.uniform(0, {"step": 0.05, "save": 0.15, "restore": 1.5}[moment]),
            seconds=draw.uniform(0.2, 2.0), detail=detail, draw=draw.getrandbits(32),
        ))
    return tuple(faults)


# What CI runs, one fault a scenario: the commonest, and each mechanism once. Those of _SHORT_EIGHT_BIT in 8 bits.
_SHORT: tuple[tuple[int, Kind, Moment, str], ...] = (
    (1, "kill all", "step", ""), (1, "kill all", "save", ""), (1, "kill all", "restore", ""),
    (1, "SIGTERM all", "save", ""), (1, "disk full", "step", ""),
    (1, "damage", "step", "flip"), (1, "damage", "step", "truncate"), (1, "damage", "step", "empty metadata"),
    (2, "kill one", "step", ""), (2, "kill one", "save", ""), (2, "SIGTERM one", "step", ""), (2, "hang", "step", ""),
    (2, "cut", "step", ""), (2, "damage", "step", "delete"), (4, "kill one", "step", ""),
)
_SHORT_EIGHT_BIT = (1, 6, 9)


def short_plans(seed: int, steps: int, can_cut: bool) -> list[Plan]:
    """The scenarios of CI. Where networks cannot be cut, a process hangs instead: its peers see the same silence."""
    chosen = [(p, "hang" if kind == "cut" and not can_cut else kind, moment, detail)
              for p, kind, moment, detail in _SHORT]
    return [Plan(index, processes, spread(f"{seed} {index}", [fault], processes, steps), index in _SHORT_EIGHT_BIT)
            for index, (processes, *fault) in enumerate(chosen)]
