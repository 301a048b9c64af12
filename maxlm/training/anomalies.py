"""What the loop tells the anomaly monitor, and which data a run leaves out because of what it said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from maxlm.config import RunConfig
from maxlm.data.skipping import Skipped, data_index, skip
from maxlm.resilience import AnomalyMonitor, RunStopped, Spike
from maxlm.resilience.anomaly import FILE, describe, record
from maxlm.training.step import StepMetrics


class StepAnomalies:
    """The anomalies of one start of a run. Every process makes one and calls it alike; process 0 writes.

    latest_step: says the newest checkpoint's step, once nothing is being written. line: shows a line to people.
    skipped: the data that rollbacks left out.
    """

    def __init__(self, config: RunConfig, run_dir: Path, latest_step: Callable[[], int | None],
                 line: Callable[[str], None]):
        self._run_dir, self._latest_step, self._line = run_dir, latest_step, line
        self._monitor = AnomalyMonitor(config.resilience.nonfinite, config.resilience.spike, self._report)
        self.skipped: Skipped = ()

    @property
    def counts(self) -> dict[str, int]:
        """`skipped_updates` and `spikes` so far, for a row of metrics."""
        return self._monitor.counts

    @property
    def halted(self) -> bool:
        """Whether the run must save what is good and stop."""
        return self._monitor.halt is not None

    def begin(self, meta: dict[str, Any]) -> None:
        """The run goes on from a checkpoint with this `meta` (empty for a fresh state)."""
        self._monitor.restore(meta.get("anomalies"))
        self.skipped = tuple((first, stop) for first, stop in meta.get("data", {}).get("skipped", ()))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps as `anomalies` in its `meta`; `skipped` is kept beside it."""
        return self._monitor.state()

    def data_index(self, step: int) -> int:
        """The data index that the step with index `step`, counted from 0, reads."""
        return data_index(step, self.skipped)

    def finished(self, step: int, metrics: StepMetrics) -> Spike | None:
        """The metrics of `step` are here, on the host. The spike to roll back from, if any."""
        return self._monitor.observe(step, float(metrics.loss), float(metrics.grad_norm), bool(metrics.skipped))

    def check_state(self, step: int, params: Any) -> None:
        """Raises RunStopped where parameters that are about to be saved are not finite, whatever made them so."""
        if not _finite(params):
            self._monitor.halt = f"there are parameters after step {step} that are not finite, so they are not saved"
            self.check()

    def check(self) -> None:
        """Raises RunStopped where the run must stop."""
        if self.halted:
            newest = self._latest_step()
            saved = "no checkpoint was made yet" if newest is None else f"the last good state is saved as step {newest}"
            raise RunStopped(
                f"{self._monitor.halt}; {saved}. Look at the batches named in {self._run_dir / FILE}, lower "
                "optimizer.learning_rate, or raise that limit"
            )

    def batches_of(self, spike: Spike) -> list[int]:
        """The data indices that are to be left out because of `spike`."""
        return [self.data_index(step) for step in range(spike.resume_at, spike.step)]

    def rolled_back(self, spike: Spike, back_at: int, meta: dict[str, Any]) -> None:
        """The run is at step `back_at` again, whose checkpoint has this `meta`, and goes on without those data."""
        batches, where = self.batches_of(spike), self.data_index(spike.step - 1)
        self.skipped = skip(self.skipped, batches)
        self._monitor.rolled_back(spike, meta.get("anomalies"),
                                  {"data_index": where, "back_at": back_at, "skipped_data": batches})

    def _report(self, event: dict[str, Any]) -> None:
        event = {"data_index": self.data_index(event["step"] - 1), **event}
        if jax.process_index() == 0:
            record(self._run_dir, event)
            self._line(describe(event))


@jax.jit
def _finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(tree)]).all()
