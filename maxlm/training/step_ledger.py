"""What the loop tells the ledger: digests of the state, and the bits that each step gave."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from maxlm import __version__
from maxlm.config import RunConfig
from maxlm.hardware import compiler_options
from maxlm.resilience import Ledger, RunStopped, lineage_of
from maxlm.schema import to_dict
from maxlm.training.digest import hex_digest, tree_digest
from maxlm.training.state import TrainState
from maxlm.training.step import StepMetrics

# Sections that decide neither what is computed nor in which order, and two that are named on their own.
_NOT_COMPUTED = ("data", "mesh", "checkpoint", "eval", "logging", "resilience")
STATE = ("params", "optimizer")


def environment_of(config: RunConfig, mesh: Mesh, data_digest: str) -> dict[str, Any]:
    """What must be equal for two runs of a step from one state to give the same bits, as JSON values."""
    sections = {name: value for name, value in to_dict(config).items() if name not in _NOT_COMPUTED}
    return {
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "device": mesh.devices.flat[0].device_kind,
        "processes": jax.process_count(),
        "jax": jax.__version__,
        "maxlm": __version__,
        "data": data_digest,
        "training": lineage_of([sections]),
    }


class StepLedger:
    """The ledger of one start of a run. Every process makes one and calls it alike; process 0 writes.

    Nothing here waits for the device, except `begin` and `meta`.
    """

    def __init__(self, config: RunConfig, run_dir: Path, mesh: Mesh, data_digest: str):
        self._every = config.resilience.digest_every_steps
        self._ledger = Ledger(run_dir) if jax.process_index() == 0 else None
        self._environment = environment_of(config, mesh, data_digest)
        self._digests = StateDigests(mesh)
        self._pending: dict[int, tuple[int, dict[str, jax.Array] | None]] = {}
        self._known: tuple[int, dict[str, str]] = (-1, {})  # a step, and digests of its state

    @property
    def highest_step(self) -> int:
        """The highest step that any start of this run has finished."""
        return self._ledger.highest_step if self._ledger else 0

    def begin(self, step: int, state: TrainState, saved: dict[str, Any] | None) -> None:
        """The run goes on from `state`, that of `step`. saved: the `meta` that its checkpoint keeps, None for a fresh
        state. Raises RunStopped where the state is not what was saved."""
        digests = self._restored(step, state, saved)
        self._lineage = [*saved["lineage"]] if saved else []
        if not self._lineage or self._lineage[-1]["environment"] != self._environment:
            self._lineage.append({"from_step": step, "environment": self._environment})
        if self._ledger:
            chain = saved["chain"] if saved else None
            self._ledger.start(step, lineage_of(self._lineage), self._environment, chain=chain, **digests)

    def dispatched(self, step: int, index: int, state: TrainState, *, saving: bool) -> None:
        """The device was given `step`, made of batch `index`, whose result is `state`."""
        due = saving or step % self._every == 0
        self._pending[step] = index, self._digests(state) if due else None

    def finished(self, step: int, metrics: StepMetrics) -> None:
        """The metrics of `step` are here, on the host."""
        index, digests = self._pending.pop(step)
        values = bits_of(metrics)
        if digests is not None:
            self._known = step, in_hex(digests)
            values |= self._known[1]
        if self._ledger:
            self._ledger.step(step, index=index, **values)

    def meta(self, step: int, state: TrainState) -> dict[str, Any]:
        """What the checkpoint of `step` keeps for `begin`. The ledger is in its file by then."""
        if self._known[0] != step:
            self._known = step, self._digests.read(state)
        if self._ledger:
            self._ledger.flush()
        return {**self._known[1], "lineage": self._lineage, "chain": self._ledger.chain if self._ledger else None}

    def rollback(self, to: int, skipped: list[int], state: TrainState, saved: dict[str, Any] | None) -> None:
        """The run goes back to `state`, that of step `to`, and leaves out the batches of the indices `skipped` from
        there on. saved, and what is raised: as in `begin`."""
        self._pending.clear()
        self._restored(to, state, saved)
        if self._ledger:
            self._ledger.rollback(to, skipped)

    def _restored(self, step: int, state: TrainState, saved: dict[str, Any] | None) -> dict[str, str]:
        """The digests of `state`, which are those that were saved."""
        digests = self._digests.read(state)
        other = [name for name in STATE if saved and saved[name] != digests[name]]
        if other:
            raise RunStopped(
                f"the checkpoint of step {step} does not hold what was saved: its {' and '.join(other)} has digest "
                f"{digests[other[0]]} on the device, {saved[other[0]]} when it was saved; move it out of the "
                "checkpoints folder, and the same command goes on from the one before"
            )
        self._known = step, digests
        return digests

    def close(self) -> None:
        if self._ledger:
            self._ledger.close()


def bits_of(metrics: StepMetrics) -> dict[str, str]:
    """What a step's line says of its metrics, which are on the host."""
    return {"batch": hex_digest(metrics.batch_digest), "loss": float(metrics.loss).hex(),
            "grad_norm": float(metrics.grad_norm).hex()}


class StateDigests:
    """Digests of `params` and `optimizer`, computed on the devices of `mesh`."""

    def __init__(self, mesh: Mesh):
        options = compiler_options(mesh.devices.flat[0].platform)

        @functools.partial(jax.jit, compiler_options=options)
        def digests(state: TrainState) -> dict[str, jax.Array]:
            return {"params": tree_digest(state.params), "optimizer": tree_digest(state.opt_state)}

        self._digests = digests

    def __call__(self, state: TrainState) -> dict[str, jax.Array]:
        """A uint32 [2] digest of each, which the device will have."""
        return self._digests(state)

    def read(self, state: TrainState) -> dict[str, str]:
        """Their hexadecimal digits; waits for the device."""
        return in_hex(self(state))


def in_hex(digests: dict[str, jax.Array]) -> dict[str, str]:
    """Waits for the digests of `StateDigests`."""
    return {name: hex_digest(value) for name, value in jax.device_get(digests).items()}
