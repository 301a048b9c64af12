"""Runs scenarios a few at a time, each lane a process that forks the runs it strikes, and hands back what came of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import shutil
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.chaos.faults import Plan
from tests.chaos.hosts import Hosts
from tests.chaos.processes import fork, wait
from tests.chaos.scenario import Scenario, Strike
from tests.chaos.setting import Setting

Result = tuple[Plan, list[Strike]]


def run_all(plans: Sequence[Plan], setting: Setting, folder: Path, lanes: int, networked: bool,
            changes: tuple[str, ...] = ()) -> Iterator[Result]:
    """Each plan and its strikes, as they end. The logs of a scenario with problems stay in `folder`, the others go.

    networked: give each process a host of its own. changes: see Scenario.
    """
    needed = max(plan.processes for plan in plans)
    hosts = [Hosts(folder, lane, needed, networked) for lane in range(lanes)]
    try:
        for processes, eight_bit in sorted({(plan.processes, plan.eight_bit) for plan in plans}):
            setting.make_reference(processes, eight_bit, hosts[0])
        turns = _turns(len(plans))
        pipes = {}
        for lane in hosts:
            read, write = os.pipe()
            process = fork(lambda lane=lane, write=write: _lane(
                plans, turns, write, setting, lane, folder, changes), folder / "lanes.log")
            os.close(write)
            pipes[read] = process
        yield from _results(plans, pipes, folder)
    finally:
        for lane in hosts:
            lane.close()


def _turns(count: int) -> int:
    """A pipe that holds the numbers of the scenarios to run: whoever is free reads the next."""
    read, write = os.pipe()
    os.write(write, b"".join(number.to_bytes(2, "big") for number in range(count)))
    os.close(write)
    return read


def _lane(plans: Sequence[Plan], turns: int, out: int, setting: Setting, hosts: Hosts, folder: Path,
          changes: tuple[str, ...]) -> int:
    while number := os.read(turns, 2):
        position = int.from_bytes(number, "big")
        plan = plans[position]
        place = folder / f"scenario{plan.index}"
        place.mkdir()
        strikes = _safely(Scenario(plan, setting, hosts, place, changes))
        if any(strike.problems for strike in strikes):
            shutil.copytree(place, folder / "failed" / place.name)
        line = {"position": position, "strikes": [dataclasses.asdict(strike) for strike in strikes]}
        os.write(out, json.dumps(line).encode() + b"\n")
    return 0


def _safely(scenario: Scenario) -> list[Strike]:
    """A mistake of the harness is a failure of this scenario, not the end of the others."""
    try:
        return scenario.run()
    except Exception:
        traceback.print_exc()
        scenario.strikes[-1].problems.append(("exit", f"the harness failed: {traceback.format_exc()[-400:]}"))
        return scenario.strikes


def _results(plans: Sequence[Plan], pipes: dict[int, int], folder: Path) -> Iterator[Result]:
    partial = dict.fromkeys(pipes, b"")
    while pipes:
        for pipe in select.select(list(pipes), [], [])[0]:
            content = os.read(pipe, 1 << 16)
            *lines, partial[pipe] = (partial[pipe] + content).split(b"\n")
            for line in map(json.loads, lines):
                plan = plans[line["position"]]
                yield plan, [Strike(**{**strike, "fault": fault})
                             for strike, fault in zip(line["strikes"], plan.faults, strict=True)]
            if not content:
                os.close(pipe)
                if code := wait(pipes.pop(pipe)):
                    raise RuntimeError(f"a lane of the harness ended with {code}: see {folder / 'lanes.log'}")
