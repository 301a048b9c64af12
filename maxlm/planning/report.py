"""The report of a compile: one record for programs, one table for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from maxlm.config import RunConfig
from maxlm.flops import training_flops_per_token
from maxlm.hardware import Chip, chip_of
from maxlm.planning import analytic
from maxlm.planning.compiled import Compiled, cache_folder, compile_for, identity, versions
from maxlm.planning.cost import Costs
from maxlm.planning.hlo import parse
from maxlm.planning.rates import MATRIX_UNIT
from maxlm.planning.roofline import Peaks, Roofline, Timeline
from maxlm.planning.topology import Target, usable_bytes
from maxlm.planning.traffic import Layout, Traffic, by_axis
from maxlm.training.throughput import ARITHMETIC

_UNREAD = 0.02  # of the useful FLOPs, what a compiler may do without a product
_NO_PEAKS = Peaks(float("inf"), float("inf"))


def compile_report(config: RunConfig, target: Target, *, codegen: bool = False, fresh: bool = False) -> dict[str, Any]:
    """The record of `maxlm compile`. What was compiled before, with the same config, versions and source, is read from
    the cache; attached devices are always asked. Raises ConfigError."""
    kept = None if target.attached else cache_folder() / f"{identity(config, target, codegen)}.json"
    if kept is not None and kept.exists() and not fresh:
        return json.loads(kept.read_text()) | {"cached": True}
    record = judge(config, target, compile_for(config, target, codegen=codegen))
    if kept is not None:
        write_atomically(kept, record)
    return record


def write_atomically(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(record, indent=2) + "\n")
    new.rename(path)


def judge(config: RunConfig, target: Target, compiled: Compiled) -> dict[str, Any]:
    """The record of a compiled step. Of a chip that is not in hardware.py no time is estimated."""
    facts = compiled.facts
    chip = target.chip or chip_of(facts["device_kind"])
    devices = len(facts["coords"])
    per_chip = chip.devices_per_chip if chip else 1
    program = facts.get("memory", {}).get("generated_code", 0)
    kinds = {
        "parameters": facts["parameter_bytes"],
        "optimizer": facts["optimizer_bytes"],
        "batch_and_other": compiled.memory["arguments"] - facts["parameter_bytes"] - facts["optimizer_bytes"],
        "temporaries": compiled.memory["temporaries"] + compiled.memory["constants"],
        "program": program,
    }
    kinds = {name: value * per_chip for name, value in kinds.items()}
    needed = sum(kinds.values())
    room = usable_bytes(chip) if chip else None
    tokens = config.train.global_batch_size * config.train.seq_len
    flops = training_flops_per_token(config.model, config.train.seq_len) * tokens
    return {
        "topology": target.name, "slices": target.slices, "device_kind": facts["device_kind"], "devices": devices,
        "chips": devices // per_chip, "mesh": facts["axes"], "kernels": facts["kernels"],
        "fits": None if room is None else needed <= room,
        "bytes_per_chip": needed, "hbm_bytes": room, "bytes_by_kind": kinds,
        "flops_per_step": flops, "tokens_per_step": tokens,
        **estimate(config, target, compiled, chip, flops),
        "lower_seconds": facts["lower_seconds"], "compile_seconds": facts["compile_seconds"],
        "machine_code": bool(program) or target.attached, "versions": versions(), "cached": False,
    }


def estimate(config: RunConfig, target: Target, compiled: Compiled, chip: Chip | None, flops: float) -> dict[str, Any]:
    """The part of the record that is about collectives and time."""
    if not compiled.hlo:
        return {"collective_bytes": {}, "collectives": {}, "step_seconds_estimate": None, "roofline": None,
                "tokens_per_second_per_chip_estimate": None, "mfu_estimate": None, "dominating_term": None,
                "executed_flops_per_device": None, "warnings": ["the compiler refused it before it wrote a program"]}
    module, facts = parse(compiled.hlo), compiled.facts
    layout = Layout(facts["axes"], tuple(map(tuple, facts["coords"])), tuple(facts["slices"]))
    devices, per_chip = len(layout.coords), chip.devices_per_chip if chip else 1
    lanes = MATRIX_UNIT.get(chip.name, 1) if chip else 1
    fp8 = (chip.peak("fp8") or 0.0) / chip.peak_flops["bf16"] if chip else 1.0
    costs = Costs(module, lanes=lanes, rows_used=rows_used(config, facts["axes"]), fp8=max(1.0, fp8))
    peaks = Peaks(chip.peak_flops["bf16"] / per_chip, chip.hbm_bytes_per_second / per_chip) if chip else _NO_PEAKS
    step = Roofline(module, costs, Traffic(module, layout, chip, target), peaks).step()
    seconds, roofline, words = None, None, None
    if chip and target.shape:
        seconds, roofline, words = step.seconds, terms(step), in_words(step)
    elif chip and facts["axes"]["stage"] == 1:  # of a GPU the program's kernels say little about their time
        found = analytic.estimate(config, chip, facts["axes"])
        seconds, roofline, words = found.seconds, analytic_terms(found), _largest(found)
    peak = chip.peak(ARITHMETIC[config.precision.recipe]) if chip else None
    tokens, table = config.train.global_batch_size * config.train.seq_len, by_axis(step.collectives)
    rate = tokens / seconds / (devices / per_chip) if seconds else None
    return {
        "collective_bytes": {axis: {kind: row["bytes"] for kind, row in kinds.items()}
                             for axis, kinds in table.items()},
        "collectives": table,
        "step_seconds_estimate": seconds,
        "tokens_per_second_per_chip_estimate": rate,
        "mfu_estimate": flops / seconds / (peak * devices / per_chip) if seconds and peak else None,
        "roofline": roofline,
        "dominating_term": words,
        "executed_flops_per_device": step.flops,
        "warnings": [*unread(config, facts["axes"], step.flops * devices, flops),
                     *(unjudged(facts["axes"]) if chip and not target.shape else []), *warnings(step)],
    }


def unread(config: RunConfig, axes: dict[str, int], executed: float, useful: float) -> list[str]:
    """A line where the program makes fewer products than its config needs: some are in calls that are not known.
    Experts that have room for less than an even load leave useful ones out: then for that part."""
    moe = config.model.moe
    room = moe.capacity_factor or (moe.buffer_factor if axes["expert"] > 1 else 0.0) or 1.0
    if executed > (1 - _UNREAD) * min(1.0, room) * useful:
        return []
    return [f"of {useful:.4g} useful FLOPs a step {executed:.4g} were found in the program: executed_flops_per_device "
            "is too low, for products are in calls that planning/libraries.py does not know"]


def unjudged(axes: dict[str, int]) -> list[str]:
    """Why a GPU's step has no time, where it has none."""
    told = "mesh.stage: the calibrated model knows no stages, so no time is estimated on GPUs"
    return [told] if axes["stage"] > 1 else []


def rows_used(config: RunConfig, axes: dict[str, int]) -> float:
    """Of the rows that experts have room for, the part that an even load fills."""
    experts = axes["expert"]
    if config.model.num_experts == 0 or experts == 1:
        return 1.0
    return 1.0 / (config.model.moe.buffer_factor or config.model.moe.capacity_factor or experts)


def terms(step: Timeline) -> dict[str, float]:
    return {
        "compute_seconds": step.compute_seconds,
        "hbm_seconds": step.memory_seconds,
        "ici_seconds": step.total("ici_seconds"),
        "dcn_seconds": step.total("dcn_seconds"),
        "exposed_collective_seconds": sum(step.exposed.values()),
        **{f"exposed_over_{axis}_seconds": waited for axis, waited in step.exposed.items() if waited},
    }


def analytic_terms(found: analytic.Estimate) -> dict[str, float]:
    return {f"{kind}_seconds": seconds for kind, seconds in found.kinds.items()} | {
        "exposed_collective_seconds": found.exposed_seconds}


def _largest(found: analytic.Estimate) -> str:
    kind = max(found.kinds, key=found.kinds.__getitem__)
    name = {"gemm": "matrix products", "fp8": "8-bit matrix products", "grouped": "experts' products",
            "memory": "memory traffic"}.get(kind, kind)
    return f"{name}: {found.kinds[kind] / found.seconds:.0%} of the step, by the calibrated model"


def in_words(step: Timeline) -> str:
    waited = sum(step.exposed.values())
    working = step.seconds - waited
    if waited > working:
        axis = max(step.exposed, key=step.exposed.__getitem__)
        return f"collectives over {axis}: {step.exposed[axis] / step.seconds:.0%} of the step is waiting for them"
    bound = "matrix products" if step.compute_seconds >= step.memory_seconds else "memory traffic"
    busy = max(step.compute_seconds, step.memory_seconds)
    return (f"{bound}: {min(1.0, busy / step.seconds):.0%} of the step at the chip's peak; "
            f"{waited / step.seconds:.0%} is waiting for collectives")


def warnings(step: Timeline) -> list[str]:
    """What a person should know of the collectives that the compiler chose."""
    padded: dict[str, float] = {}
    for collective, times in step.collectives:
        if collective.padded:
            padded[collective.axis] = padded.get(collective.axis, 0.0) + times * collective.wire_bytes
    return [f"over {axis} {moved / 1e9:.2f} GB a step are all-reduces of zero-padded buffers, twice the bytes of the "
            "gather that they stand for: give mesh.tensor (or context) 2 or more devices"
            for axis, moved in padded.items() if moved > 1e6]
