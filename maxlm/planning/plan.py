"""`maxlm plan`: the layouts that the analytic model likes best, confirmed by real compiles, and ranked by those."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from maxlm.config import RunConfig
from maxlm.planning.compiled import CompileError
from maxlm.planning.report import compile_report
from maxlm.planning.search import Candidate, candidates, why_none
from maxlm.planning.table import share
from maxlm.planning.topology import Target
from maxlm.schema import ConfigError, require

PER_MESH = 2  # compiles of one mesh: its best microbatch and remat, and the next best
HOPEFUL = 1.1  # of the memory that a chip has: the analytic model is mostly within a tenth of the compiler


@dataclass
class Confirmed:
    """A candidate and what its compile said; `refused` where the compiler took it for no program at all."""

    candidate: Candidate
    record: dict[str, Any] | None
    refused: str = ""

    @property
    def fits(self) -> bool:
        return self.record is not None and bool(self.record["fits"])


@dataclass
class _Search:
    """What is known while compiles come in: of each remat policy, how far memory was off the analytic model's."""

    target: Target
    waiting: list[Candidate]
    correction: dict[str, float] = field(default_factory=dict)
    taken: dict[tuple[int, ...], int] = field(default_factory=dict)

    def next(self) -> Candidate | None:
        for place, candidate in enumerate(self.waiting):
            off = self.correction.get(candidate.config.remat.policy, 1 / HOPEFUL)
            expected = candidate.expected.memory_bytes * off
            if expected <= self.target.usable_bytes and self.taken.get(candidate.mesh, 0) < PER_MESH:
                self.taken[candidate.mesh] = self.taken.get(candidate.mesh, 0) + 1
                return self.waiting.pop(place)
        return None

    def learn(self, confirmed: Confirmed) -> None:
        if confirmed.record is None:
            return
        off = confirmed.record["bytes_per_chip"] / confirmed.candidate.expected.memory_bytes
        policy = confirmed.candidate.config.remat.policy
        self.correction[policy] = max(self.correction.get(policy, 0.0), off)
        if not confirmed.fits:  # it does not count among a mesh's compiles: a leaner one may fit
            self.taken[confirmed.candidate.mesh] -= 1


def plan(config: RunConfig, target: Target, *, confirm: int = 4, most: int = 10, seconds: float = 240.0,
         jobs: int | None = None, tell: Callable[[str], None] = lambda line: None) -> list[Confirmed]:
    """Compiles candidates, best first and `jobs` at a time, until `confirm` of them fit, `most` were tried or `seconds`
    have passed; fitting ones first, fastest first. Layouts that use the host's memory are asked where no other can fit.
    Raises ConfigError where none can, saying what would."""
    require(not target.attached, f"--topology={target.name}: plan is for TPU slices; judge meshes of attached devices "
                                 "with maxlm compile or bench")
    found, asked_host = candidates(config, target), False
    search, confirmed, clock = _Search(target, _hopeful(found, target)), [], time.monotonic()
    tell(f"{len(found):,} layouts, {len(search.waiting):,} may fit on the chips alone")
    workers = jobs or max(1, min(4, os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        running: dict[Future, Candidate] = {}
        while True:
            tried = len(confirmed) + len(running)  # as many again are tried with the host's memory
            enough = sum(c.fits for c in confirmed) + len(running) >= confirm or tried >= most * (1 + asked_host)
            late = time.monotonic() - clock > seconds
            candidate = None if enough or late or len(running) >= workers else search.next()
            if candidate is not None:
                running[pool.submit(_compile, candidate, target)] = candidate
                continue
            if not (late or running or asked_host or any(c.fits for c in confirmed)):
                asked_host, offloaded = True, candidates(config, target, offload=True)
                search.waiting = _hopeful(offloaded, target)
                if not search.waiting and not confirmed:
                    raise ConfigError(why_none(config, target, found + offloaded))
                tell(f"nothing fits on the chips alone; {len(search.waiting):,} layouts may with the host's memory")
                continue
            if not running:
                if late and not asked_host and not any(c.fits for c in confirmed):
                    tell("time is up: layouts with the host's memory were not tried")
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                del running[future]
                confirmed.append(future.result())
                search.learn(confirmed[-1])
                tell(_told(confirmed[-1], config))
    return sorted(confirmed, key=lambda c: (not c.fits, c.record["step_seconds_estimate"] if c.fits else math.inf))


def _hopeful(found: list[Candidate], target: Target) -> list[Candidate]:
    return [c for c in found if c.expected.memory_bytes <= HOPEFUL * target.usable_bytes]


def _compile(candidate: Candidate, target: Target) -> Confirmed:
    try:
        return Confirmed(candidate, compile_report(candidate.config, target))
    except (CompileError, ConfigError) as error:
        return Confirmed(candidate, None, str(error))


def _told(confirmed: Confirmed, given: RunConfig) -> str:
    record, layout = confirmed.record, confirmed.candidate.overrides(given)
    if record is None:
        return f"refused: {layout}: {confirmed.refused}"
    size = f"{record['bytes_per_chip'] / 1e9:.1f} GB"
    if not record["fits"]:
        return f"does not fit: {size}: {layout}"
    return f"fits: {size}, {record['step_seconds_estimate']:.3g} s, MFU {share(record['mfu_estimate'])}: {layout}"


def ranked(confirmed: list[Confirmed], given: RunConfig) -> list[dict[str, Any]]:
    """The table as plain values, best first."""
    return [{
        "set": c.candidate.overrides(given), "values": dict(c.candidate.values), "rows_per_device": c.candidate.rows,
        "analytic_step_seconds": c.candidate.expected.seconds,
        "analytic_bytes_per_chip": c.candidate.expected.memory_bytes, "refused": c.refused,
        **({} if c.record is None else {key: c.record[key] for key in (
            "fits", "bytes_per_chip", "hbm_bytes", "step_seconds_estimate", "tokens_per_second_per_chip_estimate",
            "mfu_estimate", "dominating_term", "compile_seconds", "cached")}),
    } for c in confirmed]
