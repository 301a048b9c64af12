"""Learning rate as a function of the step."""

from __future__ import annotations

import optax

from maxlm.config import ScheduleConfig


def make_schedule(config: ScheduleConfig, peak: float, num_steps: int) -> optax.Schedule:
    """Linear warm-up to `peak`, then the named shape, reaching `final_fraction * peak` at `num_steps`.

    The first of `warmup_steps` steps has the rate peak / warmup_steps: no step is spent at a rate of 0.
    """
    warmup, final = config.warmup_steps, config.final_fraction * peak
    after = num_steps - warmup
    shape = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, max(after, 1), alpha=config.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, final, max(after, 1)),
        "wsd": lambda: optax.linear_schedule(peak, final, config.decay_steps, after - config.decay_steps),
    }[config.name]()
    if warmup == 0:
        return shape
    ramp = optax.linear_schedule(peak / warmup, peak + peak / warmup, warmup)  # peak * (step + 1) / warmup
    return optax.join_schedules([ramp, shape], [warmup])
