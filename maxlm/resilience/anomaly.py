"""What a run does about losses that are not finite and losses that jump.

The step itself skips an update whose loss or gradient is not finite (training/step.py). The monitor here sees each
step's metrics, in order and one step late, and decides from them alone: every process decides alike, and so does a run
that was killed and started again, because all that the monitor knows is saved with each checkpoint.

A loss is a spike where it is above median + max(threshold * 1.4826 * MAD, min_rise) of the losses before it; 1.4826
scales the median absolute deviation to a standard deviation for normal noise (Hampel 1974). Rolling back goes to a
checkpoint from before the offending batches and trains on without them. Which batches those are follows from the
spike's step alone, so it trains the same whichever checkpoint it goes back to.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maxlm.config.resilience import NonfiniteConfig, SpikeConfig

FILE = "anomalies.jsonl"
MAD_TO_DEVIATION = 1.4826


@dataclass(frozen=True)
class Spike:
    """A loss above its limit, both in nats a token. `resume_at`: the last step that has not seen the offending
    batches."""

    step: int
    loss: float
    median: float
    limit: float
    resume_at: int


@dataclass
class _History:
    """What the monitor knows, in values that JSON keeps exactly. Steps count from 1, the first finished one."""

    losses: list[float] = field(default_factory=list)  # the last `window` good ones
    skipped_steps: list[int] = field(default_factory=list)
    consecutive: int = 0
    in_spike: bool = False
    rollbacks: list[int] = field(default_factory=list)  # steps of the spikes rolled back from
    skipped_updates: int = 0
    spikes: int = 0


class AnomalyMonitor:
    """Sees every step's metrics and says what to do. `state()` is what a checkpoint must carry.

    report: called with each event, a dict with `event` ('skipped_update', 'spike' or 'rollback'), `step`, and figures.
    halt: None, or the reason why the run must save what is good and stop.
    """

    def __init__(self, nonfinite: NonfiniteConfig, spike: SpikeConfig, report: Callable[[dict[str, Any]], None]):
        self._nonfinite, self._spike, self._report = nonfinite, spike, report
        self._history = _History()
        self.halt: str | None = None

    @property
    def counts(self) -> dict[str, int]:
        """How many updates were skipped, and how many spikes trained on, on the way to the present state."""
        return {"skipped_updates": self._history.skipped_updates, "spikes": self._history.spikes}

    def observe(self, step: int, loss: float, grad_norm: float, skipped: bool) -> Spike | None:
        """Takes in the metrics of `step`, which follows the last one observed. The spike to roll back from, if any."""
        if skipped:
            self._observe_skip(step, loss, grad_norm)
            return None
        seen, policy = self._history, self._spike
        seen.consecutive = 0
        spike = self._spike_of(step, loss)
        if spike is not None and policy.action == "rollback":
            self._check_rollbacks(spike)
            return spike
        if spike is not None:
            seen.spikes += 1
            if not seen.in_spike:  # one report an episode
                self._report({"event": "spike", **dataclasses.asdict(spike)})
        seen.in_spike = spike is not None
        seen.losses = [*seen.losses, loss][-policy.window :]
        return None

    def rolled_back(self, spike: Spike, saved: dict[str, Any] | None, facts: dict[str, Any]) -> None:
        """The run is back at an earlier step, with whose checkpoint `saved` was stored (None: at step 0). `facts` go
        into the report."""
        rollbacks = [*self._history.rollbacks, spike.step]
        self.restore(saved)
        self._history.rollbacks = rollbacks
        self._report({"event": "rollback", **dataclasses.asdict(spike), **facts})

    def state(self) -> dict[str, Any]:
        return dataclasses.asdict(self._history)

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Knows what the monitor knew whose `state()` was saved; nothing for None."""
        self._history = _History(**saved or {})

    def _observe_skip(self, step: int, loss: float, grad_norm: float) -> None:
        seen, policy = self._history, self._nonfinite
        seen.skipped_updates += 1
        seen.consecutive += 1
        seen.skipped_steps = [s for s in [*seen.skipped_steps, step] if s > step - policy.window]
        self._report({"event": "skipped_update", "step": step, "loss": loss, "grad_norm": grad_norm})
        if self.halt:  # the step that was under way when the first reason was seen
            return
        if seen.consecutive > policy.max_consecutive:
            self.halt = f"{seen.consecutive} updates in a row were skipped (resilience.nonfinite.max_consecutive)"
        elif len(seen.skipped_steps) > policy.max_in_window:
            self.halt = (f"{len(seen.skipped_steps)} of the last {policy.window} updates were skipped "
                         "(resilience.nonfinite.max_in_window)")

    def _spike_of(self, step: int, loss: float) -> Spike | None:
        policy, losses = self._spike, self._history.losses
        if len(losses) < policy.window:
            return None
        median = statistics.median(losses)
        deviation = MAD_TO_DEVIATION * statistics.median(abs(earlier - median) for earlier in losses)
        limit = median + max(policy.threshold * deviation, policy.min_rise)
        return Spike(step, loss, median, limit, max(0, step - policy.skip_batches)) if loss > limit else None

    def _check_rollbacks(self, spike: Spike) -> None:
        policy = self._spike
        recent = sum(step > spike.step - policy.rollback_window for step in self._history.rollbacks)
        if recent >= policy.max_rollbacks:
            self.halt = (f"the loss jumped to {spike.loss:.4f} at step {spike.step} after {recent} rollbacks within "
                         f"{policy.rollback_window} steps (resilience.spike.max_rollbacks)")


def record(run_dir: Path, event: dict[str, Any]) -> None:
    """Appends an event and the time to RUN_DIR/anomalies.jsonl. Numbers that are not finite become text."""
    row = {key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
           for key, value in event.items()}
    with (run_dir / FILE).open("a") as file:
        file.write(json.dumps({**row, "time": time.time()}) + "\n")


def describe(event: dict[str, Any]) -> str:
    """An event in one line for people."""
    if event["event"] == "skipped_update":
        return (f"step {event['step']}  update skipped: loss {event['loss']}, gradient norm {event['grad_norm']}, "
                f"data index {event['data_index']}")
    what = (f"step {event['step']}  loss {event['loss']:.4f} is above {event['limit']:.4f} "
            f"(median {event['median']:.4f}), data index {event['data_index']}")
    if event["event"] == "spike":
        return what
    return f"{what}: back to step {event['back_at']}, going on without data indices {event['skipped_data']}"
