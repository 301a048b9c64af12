"""Sweeps as data: points are tables of config keys, built with product and zip, and trials are whole configs.

A point maps dotted config keys to values, and may say with keys of its own what is not config: NAME, BRANCH_OF and
FROM_STEP (a run that starts from another's checkpoint), COLUMNS (what else its row of runs.jsonl says).
A file of configs/sweeps/ has `sweep() -> Sweep`. Standard library only, like the configs.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maxlm.config import DatasetConfig, RunConfig
from maxlm.flops import parameter_count, training_flops_per_token
from maxlm.overrides import call_in_file, with_values
from maxlm.schema import ConfigError, require

Point = Mapping[str, Any]
NAME, BRANCH_OF, FROM_STEP, COLUMNS = "name", "branch_of", "from_step", "columns"
_OWN_KEYS = {NAME, BRANCH_OF, FROM_STEP, COLUMNS}
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,119}")


@dataclass(frozen=True)
class Trial:
    """One run. With `branch_of` it goes on from that trial's checkpoint of `from_step`."""

    name: str
    config: RunConfig
    swept: Mapping[str, Any]  # the keys of its point
    branch_of: str | None = None
    from_step: int = 0
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """Trials, and what their time is predicted with: the model FLOP/s that a device reaches (None: a share of its
    chip's peak, or of the rate of a matrix product where the chip is not known), the least seconds of a step, and those
    before the first step."""

    trials: tuple[Trial, ...]
    flops_per_second: float | None = None
    step_seconds: float = 0.0
    startup_seconds: float = 30.0

    def __post_init__(self) -> None:
        require(len(self.trials) > 0, "this sweep has no runs")
        names = [trial.name for trial in self.trials]
        twice = {name for name in names if names.count(name) > 1}
        require(not twice, f"two runs of the sweep are called {', '.join(sorted(twice))}: give their points a 'name'")
        for trial in self.trials:
            require(_SAFE_NAME.fullmatch(trial.name) is not None,
                    f"the name {trial.name!r} of a run must be letters, digits and ._=+- and at most 120 of them")
            require(trial.branch_of is None or trial.branch_of in names,
                    f"run {trial.name} branches off {trial.branch_of!r}, which is not a run of the sweep")


def load_sweep(path: str | Path) -> Sweep:
    """What `sweep()` of the Python file at `path` returns. Raises ConfigError, naming file and line."""
    built = call_in_file(Path(path), "sweep", "a maxlm.scaling.grid.Sweep")
    require(isinstance(built, Sweep), f"{path}: sweep() must return a Sweep, not {type(built).__name__}")
    return built


def trials(base: RunConfig, points: Iterable[Point]) -> tuple[Trial, ...]:
    """`base` changed by each point. A point without a name is called by its values."""
    made = []
    for point in points:
        unknown = [key for key in point if "." not in key and key not in _OWN_KEYS]
        require(not unknown, f"a point of the sweep has the key {unknown[:1]}: config keys read section.field, and "
                             f"others are {', '.join(sorted(_OWN_KEYS))}")
        swept = {key: value for key, value in point.items() if key not in _OWN_KEYS}
        name = point.get(NAME) or _name(swept)
        try:
            config = with_values(base, swept)
        except ConfigError as error:
            raise ConfigError(f"run {name}: {error}") from None
        made.append(Trial(name, config, swept, point.get(BRANCH_OF), point.get(FROM_STEP, 0), point.get(COLUMNS, {})))
    return tuple(made)


def _name(swept: Point) -> str:
    """'hidden_dim=128-learning_rate=0.001'"""
    shown = (f"{key.rsplit('.', 1)[-1]}={value:g}" if isinstance(value, float) else f"{key.rsplit('.', 1)[-1]}={value}"
             for key, value in swept.items())
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", "-".join(shown)) or "base"


def values(key: str, *choices: Any) -> list[Point]:
    """A point for each value of one config key."""
    return [{key: choice} for choice in choices]


def product(*axes: Iterable[Point]) -> list[Point]:
    """Every combination of one point from each axis. Raises ConfigError where two say the same key."""
    return [_merged(points) for points in itertools.product(*(list(axis) for axis in axes))]


def zipped(*axes: Iterable[Point]) -> list[Point]:
    """The first points of all axes together, then the second ones, and so on; all axes are equally long."""
    axes = tuple(list(axis) for axis in axes)
    require(len({len(axis) for axis in axes}) <= 1, f"zipped axes have {', '.join(str(len(a)) for a in axes)} points: "
                                                    "they must be equally long")
    return [_merged(points) for points in zip(*axes, strict=True)]


def _merged(points: Sequence[Point]) -> Point:
    merged: dict[str, Any] = {}
    for point in points:
        joined = {NAME: "-".join(p[NAME] for p in (merged, point) if NAME in p),
                  COLUMNS: {**merged.get(COLUMNS, {}), **point.get(COLUMNS, {})}}
        both = (merged.keys() & point.keys()) - joined.keys()
        require(not both, f"two axes of the sweep both set {', '.join(sorted(both))}")
        merged = {**merged, **point, **{key: value for key, value in joined.items() if value}}
    return merged


def flops_per_step(config: RunConfig) -> float:
    """Model FLOPs of one training step, in the convention of maxlm/flops.py."""
    train = config.train
    return train.global_batch_size * train.seq_len * training_flops_per_token(config.model, train.seq_len)


def isoflop(base: RunConfig, budgets: Sequence[float], sizes: Sequence[Point], *, warmup_fraction: float | None = None,
            fewest_steps: int = 1) -> list[Point]:
    """Every model size at every compute budget: `train.num_steps` is solved from the FLOPs of a step.

    With `warmup_fraction` the warm-up is that share of a run's steps, else it stays as it is. Raises ConfigError where
    a run would have fewer than `fewest_steps` steps: very short runs are not on the curve of the longer ones.
    """
    points = []
    for budget, size in itertools.product(budgets, sizes):
        config = with_values(base, {key: value for key, value in size.items() if key not in _OWN_KEYS}
                             | {"train.num_steps": 10**9})
        steps = round(budget / flops_per_step(config))
        params = parameter_count(config.model).total
        name = f"c{budget:.3g}-n{params:.3g}".replace("e+0", "e").replace("e+", "e")
        require(steps >= fewest_steps, f"run {name} of the isoFLOP ladder would have {steps} steps, below "
                                       f"{fewest_steps}: leave this size out, lower train.global_batch_size, or raise "
                                       "the budget")
        length = {"train.num_steps": steps}
        if warmup_fraction is not None:
            length["schedule.warmup_steps"] = max(1, round(warmup_fraction * steps))
        points.append(_merged([size, {NAME: name, COLUMNS: {"budget": budget}}, length]))
    return points


def batch_sizes(base: RunConfig, *sizes: int) -> list[Point]:
    """Batch sizes at the base's number of tokens: the steps, and warm-up and decay with them, are scaled."""
    train, schedule = base.train, base.schedule
    scaled = lambda steps, size: max(1, round(steps * train.global_batch_size / size)) if steps else 0  # noqa: E731
    return [{"train.global_batch_size": size, "train.num_steps": scaled(train.num_steps, size),
             "schedule.warmup_steps": scaled(schedule.warmup_steps, size),
             "schedule.decay_steps": scaled(schedule.decay_steps, size), NAME: f"batch{size}"} for size in sizes]


def rate_by_batch(base: RunConfig, rates: Sequence[float], sizes: Sequence[int]) -> list[Point]:
    """The grid of learning rates and batch sizes at a fixed number of tokens."""
    named = [{"optimizer.learning_rate": float(rate), NAME: f"lr{rate:.3g}"} for rate in rates]
    return product(named, batch_sizes(base, *sizes))


def trunk_and_branches(base: RunConfig, lengths: Sequence[int], *, decay_fraction: float = 0.2,
                       save_every: int | None = None, name: str = "") -> list[Point]:
    """One run at a constant rate, and for each of `lengths` (steps in all) a branch that decays from its checkpoint.

    A branch decays over the last `decay_fraction` of its steps, rounded so that it begins at a multiple of `save_every`
    (default: a twentieth of the shortest). It costs its decay alone, so a ladder of k lengths costs about one run and k
    decays (Hu et al. 2024, arXiv:2404.06395, section 4). The trunk has no row in runs.jsonl: its rate never fell.
    """
    require(len(lengths) > 0 and 0 < decay_fraction < 1, "trunk_and_branches needs lengths and 0 < decay_fraction < 1")
    every = max(1, min(lengths) // 20) if save_every is None else save_every
    starts = [max(every, round((1 - decay_fraction) * length / every) * every) for length in lengths]
    require(all(start < length for start, length in zip(starts, lengths, strict=True)),
            f"trunk_and_branches: save_every={every} is too coarse for a run of {min(lengths)} steps")
    prefix = f"{name}-" if name else ""
    trunk: Point = {NAME: f"{prefix}trunk", "schedule.name": "constant", "schedule.decay_steps": 0,
                    "train.num_steps": max(starts), "checkpoint.every_steps": every, "checkpoint.keep_every": every}
    return [trunk, *(
        {NAME: f"{prefix}steps{length}", BRANCH_OF: trunk[NAME], FROM_STEP: start, "schedule.name": "wsd",
         "schedule.decay_steps": length - start, "train.num_steps": length}
        for start, length in zip(starts, lengths, strict=True)
    )]


def mixtures(folders: Mapping[str, str], shares: Sequence[Sequence[float]]) -> list[Point]:
    """Runs on mixtures of prepared folders, given as {name: path}: each of `shares` has a weight for every folder.
    Rows of runs.jsonl get a column `share_NAME` for each, which sum to 1."""
    points = []
    for number, weights in enumerate(shares):
        require(len(weights) == len(folders) and min(weights) >= 0 and sum(weights) > 0,
                f"mixture {number} must have {len(folders)} weights of 0 or more, not all 0")
        total = sum(weights)
        drawn = [(name, path, weight / total) for (name, path), weight in zip(folders.items(), weights, strict=True)]
        points.append({
            NAME: f"mixture{number:03d}", COLUMNS: {f"share_{name}": share for name, _, share in drawn},
            "data.path": None, "data.source": None,
            "data.mixture": tuple(DatasetConfig(path, share) for _, path, share in drawn if share),
        })
    return points


def dirichlet(count: int, concentration: Sequence[float], seed: int = 0) -> list[tuple[float, ...]]:
    """`count` draws of shares from a Dirichlet distribution, as RegMix samples its mixtures (arXiv:2407.01492, 3.1)."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        gammas = [draw.gammavariate(alpha, 1.0) for alpha in concentration]
        made.append(tuple(gamma / math.fsum(gammas) for gamma in gammas))
    return made
