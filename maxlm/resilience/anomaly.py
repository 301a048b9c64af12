"""What a run does about losses that are not finite and losses that jump.

The step itself skips an update whose loss or gradient is not finite (training/step.py). The monitor here sees each
step's metrics, in order and one step late, and decides from them alone: every process decides alike, and so does a run
that was killed and started again, because all that the monitor knows is saved with each checkpoint.

A loss is a spike where it is above median + max(threshold * 1.4826 * MAD, min_rise) of the losses before it; 1.4826
scales the median absolute deviation to a standard deviation for normal noise (Hampel 1974). Rolling back goes to a
checkpoint from before the offending batches, goes on without them, and thereby trains the same whichever checkpoint it
started from.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maxlm.config.resilience import NonfiniteConfig, SpikeConfig

FILE = "anomalies.jsonl"
MAD_TO_DEVIATION = 1.4826


@dataclass(frozen=True)
class Spike:
    """A loss, in nats a token, above its limit; and the last step whose state has not seen the offending batches."""

    step: int
    loss: float
    median: float
    limit: float
    resume_at: int


class AnomalyMonitor:
    """Sees every step's metrics and says what to do. `state()` is what a checkpoint must carry, plain JSON values.

    `halt` is None, or the reason why the run must save what is good and stop.
    """

    def __init__(self, nonfinite: NonfiniteConfig, spike: SpikeConfig, report: Callable[[dict[str, Any]], None]):
        self._nonfinite, self._spike, self._report = nonfinite, spike, report
        self._losses: deque[float] = deque(maxlen=spike.window)
        self._skipped_steps: deque[int] = deque(maxlen=nonfinite.max_in_window + 1)
        self._consecutive = 0
        self._in_spike = False
        self._rollbacks: list[int] = []  # the steps of the spikes
        self.skipped_updates = self.spikes = 0
        self.halt: str | None = None

    @property
    def rollbacks(self) -> int:
        return len(self._rollbacks)

    def observe(self, step: int, loss: float, grad_norm: float, skipped: bool) -> Spike | None:
        """Takes in the metrics of `step`, which follows the last one observed. The spike to roll back from, if any."""
        if skipped:
            self._observe_skip(step, loss, grad_norm)
            return None
        self._consecutive = 0
        spike = self._spike_of(step, loss)
        if spike is None or self._spike.action == "report":
            self._losses.append(loss)
        if spike is None:
            self._in_spike = False
            return None
        return self._observe_spike(spike)

    def _observe_skip(self, step: int, loss: float, grad_norm: float) -> None:
        policy = self._nonfinite
        self.skipped_updates += 1
        self._consecutive += 1
        self._skipped_steps.append(step)
        recent = sum(step - policy.window < earlier for earlier in self._skipped_steps)
        self._report({"event": "skipped_update", "step": step, "loss": loss, "grad_norm": grad_norm})
        if self._consecutive > policy.max_consecutive:
            self.halt = f"{self._consecutive} updates in a row were skipped (resilience.nonfinite.max_consecutive)"
        elif recent > policy.max_in_window:
            self.halt = (f"{recent} of the last {policy.window} updates were skipped "
                         "(resilience.nonfinite.max_in_window)")

    def _spike_of(self, step: int, loss: float) -> Spike | None:
        policy = self._spike
        if len(self._losses) < policy.window:
            return None
        median = statistics.median(self._losses)
        deviation = MAD_TO_DEVIATION * statistics.median(abs(earlier - median) for earlier in self._losses)
        limit = median + max(policy.threshold * deviation, policy.min_rise)
        if loss <= limit:
            return None
        return Spike(step, loss, median, limit, max(0, step - policy.skip_batches))

    def _observe_spike(self, spike: Spike) -> Spike | None:
        policy = self._spike
        self.spikes += 1
        if policy.action == "report":
            if not self._in_spike:  # one report an episode
                self._report(_row("spike", spike))
            self._in_spike = True
            return None
        recent = sum(spike.step - policy.rollback_window < earlier for earlier in self._rollbacks)
        if recent >= policy.max_rollbacks:
            self._report(_row("spike", spike))
            self.halt = (f"the loss jumped to {spike.loss:.4f} at step {spike.step} after {recent} rollbacks within "
                         f"{policy.rollback_window} steps (resilience.spike.max_rollbacks)")
        return spike

    def rolled_back(self, spike: Spike, saved: dict[str, Any] | None, **facts: Any) -> None:
        """The run is back at an earlier step, whose checkpoint holds `saved` (None: at step 0)."""
        rollbacks = [*self._rollbacks, spike.step]
        self.restore(saved)
        self._rollbacks = rollbacks
        self._report(_row("rollback", spike) | facts)

    def state(self) -> dict[str, Any]:
        return {
            "losses": list(self._losses), "skipped_steps": list(self._skipped_steps), "consecutive": self._consecutive,
            "in_spike": self._in_spike, "rollbacks": self._rollbacks, "skipped_updates": self.skipped_updates,
            "spikes": self.spikes,
        }

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Becomes what `state()` returned; a fresh monitor for None."""
        self.__init__(self._nonfinite, self._spike, self._report)
        if saved is None:
            return
        self._losses.extend(saved["losses"])
        self._skipped_steps.extend(saved["skipped_steps"])
        self._consecutive, self._in_spike = saved["consecutive"], saved["in_spike"]
        self._rollbacks = list(saved["rollbacks"])
        self.skipped_updates, self.spikes = saved["skipped_updates"], saved["spikes"]
