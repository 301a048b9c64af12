"""The section of the configuration that says how a run guards itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from maxlm.schema import check_types, not_negative, positive, require


@dataclass(frozen=True)
class NonfiniteConfig:
    """How many skipped updates a run bears: a step skips its update where the loss or gradient is not finite. The run
    stops (exit code 3, the last good state saved) at more than `max_consecutive` of them in a row, or more than
    `max_in_window` within `window` steps."""

    max_consecutive: int = 10
    max_in_window: int = 50
    window: int = 1000

    def __post_init__(self) -> None:
        check_types(self, "resilience.nonfinite")
        not_negative("resilience.nonfinite", max_consecutive=self.max_consecutive, max_in_window=self.max_in_window)
        positive("resilience.nonfinite", window=self.window)


@dataclass(frozen=True)
class SpikeConfig:
    """What counts as a jump of the loss, and what is done about it.

    A spike is a loss above median + max(threshold * 1.4826 * MAD, min_rise) of the last `window` losses (nats a token;
    MAD: median absolute deviation), once there are so many. 'report' logs it. 'rollback' goes back to the newest
    checkpoint that has not seen the last `skip_batches` batches up to and including the spike's, and trains on without
    them; more than `max_rollbacks` within `rollback_window` steps stop the run (exit code 3).
    """

    action: Literal["report", "rollback"] = "report"
    window: int = 128
    threshold: float = 10.0
    min_rise: float = 0.2
    skip_batches: int = 32
    max_rollbacks: int = 3
    rollback_window: int = 1000

    def __post_init__(self) -> None:
        check_types(self, "resilience.spike")
        positive("resilience.spike", threshold=self.threshold, min_rise=self.min_rise, skip_batches=self.skip_batches,
                 rollback_window=self.rollback_window)
        not_negative("resilience.spike", max_rollbacks=self.max_rollbacks)
        require(self.window > 2, f"resilience.spike.window={self.window} must be 3 or more losses")


@dataclass(frozen=True)
class WatchdogConfig:
    """When a run counts as hung. It is then ended with exit code 75, for whoever started it to start it again.

    A step is late after `step_factor` times the median step, but never before `step_seconds`; restoring, compiling,
    saving, or a batch of an evaluation after `phase_seconds`. Every `host_report_steps` steps each process writes how
    long its host worked for a step; one that is above `straggler_ratio` times the median of the others is named.
    """

    enabled: bool = True
    step_factor: float = 20.0
    step_seconds: float = 300.0
    phase_seconds: float = 3600.0
    host_report_steps: int = 100
    straggler_ratio: float = 2.0

    def __post_init__(self) -> None:
        check_types(self, "resilience.watchdog")
        positive("resilience.watchdog", step_seconds=self.step_seconds, phase_seconds=self.phase_seconds,
                 host_report_steps=self.host_report_steps)
        for name in ("step_factor", "straggler_ratio"):
            value = getattr(self, name)
            require(value > 1, f"resilience.watchdog.{name}={value} must be greater than 1")


@dataclass(frozen=True)
class ResilienceConfig:
    """digest_every_steps: steps between digests of parameters and optimizer state in the ledger, which has one at every
    saved step besides. corruption_check_every_steps: steps between checks for silent corruption, in which every device
    repeats its neighbour's computation; each costs about one step and a half of time (0: never).
    stop_seconds: after SIGTERM or Ctrl-C a run saves and leaves; where it has not by this many seconds (a step, compile
    or save takes longer), it leaves with what is saved. Give less than the scheduler gives before it kills."""

    digest_every_steps: int = 100
    corruption_check_every_steps: int = 0
    nonfinite: NonfiniteConfig = field(default_factory=NonfiniteConfig)
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    stop_seconds: float = 120.0

    def __post_init__(self) -> None:
        check_types(self, "resilience")
        positive("resilience", digest_every_steps=self.digest_every_steps, stop_seconds=self.stop_seconds)
        not_negative("resilience", corruption_check_every_steps=self.corruption_check_every_steps)
