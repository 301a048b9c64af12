"""Learning rates at every step against the shapes written out in Python."""

import math

import pytest

from maxlm.config import ScheduleConfig
from maxlm.training.schedule import make_schedule

PEAK, STEPS, WARMUP, FINAL = 2.0, 100, 10, 0.1


def decayed(shape, step):
    done = (step - WARMUP) / (STEPS - WARMUP)
    if shape == "constant":
        return PEAK
    if shape == "cosine":
        return PEAK * (FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2)
    if shape == "linear":
        return PEAK * (1 - done) + PEAK * FINAL * done
    left = min(1.0, (STEPS - step) / 25)
    return PEAK * left + PEAK * FINAL * (1 - left)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd"])
def test_every_step(name):
    config = ScheduleConfig(name=name, warmup_steps=WARMUP, decay_steps=25, final_fraction=FINAL)
    schedule = make_schedule(config, PEAK, STEPS)
    for step in range(STEPS + 1):
        expected = PEAK * (step + 1) / WARMUP if step < WARMUP else decayed(name, step)
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5, abs=1e-9), step
    assert float(schedule(STEPS)) == pytest.approx(PEAK if name == "constant" else PEAK * FINAL)
    assert float(schedule(STEPS + 50)) == pytest.approx(float(schedule(STEPS))), "a longer run stays at the end value"


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd"])
def test_without_warmup_the_first_step_has_the_peak(name):
    schedule = make_schedule(ScheduleConfig(name=name, warmup_steps=0, decay_steps=25), PEAK, STEPS)
    assert float(schedule(0)) == pytest.approx(PEAK)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_down_to_zero(name):
    config = ScheduleConfig(name=name, warmup_steps=WARMUP, decay_steps=25, final_fraction=0.0)
    assert float(make_schedule(config, PEAK, STEPS)(STEPS)) == pytest.approx(0.0, abs=1e-7)


def test_a_run_of_nothing_but_warmup():
    schedule = make_schedule(ScheduleConfig(name="cosine", warmup_steps=10), PEAK, 10)
    assert float(schedule(9)) == pytest.approx(PEAK)
