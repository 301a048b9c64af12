"""`maxlm replay`: makes a step of a run again, and says whether data, computation or storage differs from the ledger.

The run is taken up at the nearest checkpoint before the step, and every step from there on is compared with its line in
the ledger, bit for bit, up to the first difference. What differs first is the cause:
    storage      the checkpoint does not hold what was saved (digests computed on the device, then and now)
    data         another batch, or a shard that the batch is read from is not what its manifest says
    computation  the same state and batch gave another loss, gradient norm or state
    environment  the same, but this machine or configuration is not the run's, so that rounding may differ
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from maxlm.checkpoint import CheckpointError, complete_steps, read_meta, restore_state
from maxlm.config import AXES, RunConfig
from maxlm.data.folders import datasets_of
from maxlm.data.loader import TrainingData
from maxlm.data.manifest import load_manifest
from maxlm.data.places import RowPlaces, altered_shards
from maxlm.parallel.mesh import make_mesh
from maxlm.resilience import read_ledger
from maxlm.resilience.ledger import COMPARED
from maxlm.schema import ConfigError, from_dict
from maxlm.training.evaluate import local_rows, to_device
from maxlm.training.saved_run import CHECKPOINTS, CONFIG_FILE, DATA
from maxlm.training.state import TrainState, abstract_state, init_state
from maxlm.training.step import compile_step
from maxlm.training.step_ledger import STATE, StateDigests, bits_of, environment_of


@dataclass(frozen=True)
class Difference:
    """What differs first. `step`: the step whose line does, or that of the checkpoint."""

    cause: str
    step: int
    detail: str


def replay(run_dir: Path, step: int, *, hash_shards: bool = True) -> dict[str, Any]:
    """Makes `step` again and compares. hash_shards: also read the shards that its batch comes from, whole.

    Returns `step`, `from_checkpoint` (0: from the start), `agrees`, and, where it does not agree, `cause`, `at_step`
    and `detail`; `ledger_lines_altered`, and `made_again_differently`, steps that the run itself noticed. Raises
    ConfigError where the run or the devices do not allow it.
    """
    reading = read_ledger(run_dir)
    lines = {line["step"]: line for line in reading.steps()}  # of a step made again, the last
    if step not in lines:
        known = f"it has steps {min(lines)} to {max(lines)}" if lines else "it has none"
        raise ConfigError(f"--step {step} is not in the ledger of {run_dir}: {known}")
    start = max((s for s in complete_steps(run_dir / CHECKPOINTS) if s < step), default=0)
    missing = [number for number in range(start + 1, step) if number not in lines]
    if missing:
        raise ConfigError(f"the ledger of {run_dir} has no line of step {missing[0]}, which leads to --step {step}")
    found = _Replay(run_dir, start, lines, reading.records).compare(step, hash_shards)
    result = {"step": step, "from_checkpoint": start, "agrees": found is None}
    if found:
        result |= {"cause": found.cause, "at_step": found.step, "detail": found.detail}
    again = [record["step"] for record in reading.records if record["kind"] == "nondeterminism"]
    return result | {"ledger_lines_altered": reading.damaged, "made_again_differently": again}


class _Replay:
    """A run, taken up again at step `start`."""

    def __init__(self, run_dir: Path, start: int, lines: dict[int, dict[str, Any]], records: list[dict[str, Any]]):
        self.checkpoints, self.start, self.lines = run_dir / CHECKPOINTS, start, lines
        self.meta = read_meta(self.checkpoints, start) if start else {}
        self.first = next((r for r in records if r["kind"] == "start" and r["step"] == 0), {})
        self.run_dir = run_dir

    def compare(self, step: int, hash_shards: bool) -> Difference | None:
        """The first difference up to `step`."""
        environment = self.lines[step]["environment"]
        self.config, self.mesh = self._config(environment)
        train = self.config.train
        folders = datasets_of(self.config.data, train.seq_len, self.run_dir / DATA)
        sizes = {"seq_len": train.seq_len, "global_batch_size": train.global_batch_size}
        try:
            self.data = TrainingData(folders, **sizes, seed=train.seed, stages=self.config.data.weights_by_step())
        except ConfigError as error:
            for folder in folders:
                load_manifest(folder.path)  # raises for a folder that is not prepared data: the user's mistake
            return Difference("data", step, str(error))
        with jax.set_mesh(self.mesh):
            self.digests, self.rows = StateDigests(self.mesh), local_rows(self.mesh, train.global_batch_size)
            here = environment_of(self.config, self.mesh, self.data.digest)
            self.elsewhere = [name for name in here if here[name] != environment.get(name)]
            try:
                found = self._differing_start() or self._differing_data(step, hash_shards)
            except CheckpointError as error:
                return Difference("storage", self.start, str(error))
            if found:
                return found
            self.step_function = compile_step(self.config, self.mesh)
            found, gave = self._steps_to(step)
            if found and found.cause == "computation":
                return self._judged(found, gave)
            return found

    def _config(self, environment: dict[str, Any]) -> tuple[RunConfig, Mesh]:
        """The config and mesh that the step was made with. What may change on resume is in config.json if it was
        changed after the checkpoint."""
        candidates = [self.meta["config"]] if self.meta else []
        candidates.append(json.loads((self.run_dir / CONFIG_FILE).read_text()))
        found = [_on_mesh(from_dict(RunConfig, values), environment["mesh"]) for values in candidates]
        same = [(config, mesh) for config, mesh in found
                if environment_of(config, mesh, "")["training"] == environment["training"]]
        return (same or found)[0]

    def _state(self) -> TrainState:
        """A fresh copy of the state to start from: the step consumes it."""
        if not self.start:
            return init_state(self.config, self.mesh)
        return restore_state(self.checkpoints, self.start, abstract_state(self.config, self.mesh))

    def _differing_start(self) -> Difference | None:
        digests = self.digests.read(self._state())
        for where, before in (("when it was saved", self.meta.get("ledger", {})),
                              ("in the ledger", self.lines[self.start] if self.start in self.lines else self.first)):
            other = [name for name in STATE if name in before and before[name] != digests[name]]
            if other and self.start:
                return Difference("storage", self.start, f"the checkpoint's {' and '.join(other)} has digest "
                                  f"{digests[other[0]]}, and had {before[other[0]]} {where}")
            if other:
                return Difference("environment" if self.elsewhere else "computation", 0,
                                  f"the initial {' and '.join(other)} has digest {digests[other[0]]}, and had "
                                  f"{before[other[0]]} {where}" + self._where())
        return None

    def _differing_data(self, step: int, hash_shards: bool) -> Difference | None:
        """Whether the data is another as a whole, or the shards of the step's batch were altered."""
        saved = self.lines[step]["environment"].get("data")
        if saved != self.data.digest:
            return Difference("data", step, f"the manifest of the prepared data has digest {self.data.digest[:12]}, "
                              f"and had {str(saved)[:12]} when the step was made")
        return self._altered(step) if hash_shards else None

    def _altered(self, step: int) -> Difference | None:
        train = self.config.train
        places = RowPlaces(self.data.datasets, global_batch_size=train.global_batch_size, seed=train.seed,
                           stages=self.config.data.weights_by_step()).of_batch(self.lines[step]["index"])
        altered = altered_shards(places)
        if not altered:
            return None
        rows = "; ".join(
            f"{path} is not what its manifest says, and gives row " +
            ", ".join(f"{row} (record {places[row].record})" for row in positions)
            for path, positions in altered.items()
        )
        return Difference("data", step, f"batch {self.lines[step]['index']}: {rows}")

    def _steps_to(self, step: int) -> tuple[Difference | None, dict[str, str]]:
        """Makes the steps up to `step` or the first difference. Returns it, and what the last step made gave."""
        state, gave = self._state(), {}
        for number in range(self.start + 1, step + 1):
            line = self.lines[number]
            batch = to_device(self.data.batch(line["index"], self.rows), self.mesh)
            state, metrics = self.step_function(state, batch)
            gave = bits_of(jax.device_get(metrics))
            if "params" in line:
                gave |= self.digests.read(state)
            other = [name for name in COMPARED if name in line and line[name] != gave[name]]
            if other:
                return self._explained(number, other, gave), gave
        return None, gave

    def _explained(self, number: int, other: list[str], gave: dict[str, str]) -> Difference:
        line = self.lines[number]
        if "batch" in other:
            return self._altered(number) or Difference(
                "data", number, f"batch {line['index']} has digest {gave['batch']}, and had {line['batch']}; its "
                "shards are what their manifest says, so the run was fed another batch")
        was = ", ".join(f"{name} {gave[name]} (was {line[name]})" for name in other)
        return Difference("environment" if self.elsewhere else "computation", number,
                          f"the same state and batch give {was}" + self._where())

    def _judged(self, found: Difference, gave: dict[str, str]) -> Difference:
        """A difference in computation, after making the steps once more."""
        _, again = self._steps_to(found.step)
        verdict = ("; made twice here, it gives the same both times: the run's own computation went wrong"
                   if again == gave else "; made twice here, it differs again: the computation is not deterministic")
        return dataclasses.replace(found, detail=found.detail + verdict)

    def _where(self) -> str:
        return f"; but another {', '.join(self.elsewhere)} than the run's" if self.elsewhere else ""


def _on_mesh(config: RunConfig, sizes: dict[str, int]) -> tuple[RunConfig, Mesh]:
    """`config` on a mesh of these axis sizes, over the first devices here."""
    count, here = math.prod(sizes.values()), len(jax.devices())
    if count > here:
        raise ConfigError(f"the step was made on {count} devices ({sizes}), and here are {here}: replay it where there "
                          "are as many")
    mesh = dataclasses.replace(config.mesh, **dict.fromkeys(AXES, 1) | sizes)
    return dataclasses.replace(config, mesh=mesh), make_mesh(mesh, jax.devices()[:count])
