"""What counts as a spike, how much is borne, and that all of it is a function of the losses."""

import json
import random

import pytest

from maxlm.config.resilience import NonfiniteConfig, SpikeConfig
from maxlm.resilience.anomaly import AnomalyMonitor, describe, record

FEW = SpikeConfig(action="rollback", window=8, threshold=5.0, min_rise=0.2, skip_batches=3, max_rollbacks=2,
                  rollback_window=100)


def monitor(spike=FEW, nonfinite=NonfiniteConfig()):  # noqa: B008
    events = []
    return AnomalyMonitor(nonfinite, spike, events.append), events


def fed(watcher, losses, start=1):
    """The first spike, or None."""
    for step, loss in enumerate(losses, start):
        if spike := watcher.observe(step, loss, 1.0, False):
            return spike
    return None


NOISY = [2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.0, 2.0]  # median 2.0, MAD 0.05 (of 0 0 0 0 .1 .1 .2 .2), scaled 0.0741


def test_the_limit_is_median_and_scaled_mad():
    limit = 2.0 + 5.0 * 1.4826 * 0.05
    assert fed(monitor()[0], [*NOISY, limit - 1e-6]) is None
    spike = fed(monitor()[0], [*NOISY, limit + 1e-6])
    assert (spike.step, spike.median, spike.resume_at) == (9, 2.0, 6)
    assert spike.limit == pytest.approx(limit)


def test_a_flat_loss_has_a_floor_and_a_short_history_no_opinion():
    assert fed(monitor()[0], [1.0] * 8 + [1.19]) is None
    assert fed(monitor()[0], [1.0] * 8 + [1.21]).median == 1.0
    assert fed(monitor()[0], [1.0] * 7 + [100.0]) is None
    assert fed(monitor()[0], [5.0 - 0.4 * n for n in range(12)]) is None, "falling is no spike"


def test_rollback_leaves_the_spike_out_of_the_window_and_report_lets_it_in():
    watcher, _ = monitor()
    spike = fed(watcher, [*NOISY, 9.0])
    assert watcher.state()["losses"] == NOISY and spike.loss == 9.0
    watcher, events = monitor(SpikeConfig(window=8, threshold=5.0))
    assert fed(watcher, [*NOISY, *[9.0] * 20]) is None
    assert [event["step"] for event in events] == [9], "one report an episode"
    assert 1 < watcher.counts["spikes"] < 8, "by half a window later, the new level is the normal one"


def test_skips_are_borne_up_to_the_limits():
    watcher, events = monitor(nonfinite=NonfiniteConfig(max_consecutive=2, max_in_window=3, window=10))
    for step, skipped in enumerate([1, 1, 0, 1], 1):
        watcher.observe(step, float("nan"), 1.0, bool(skipped)) if skipped else watcher.observe(step, 1.0, 1.0, False)
    assert watcher.halt is None and watcher.counts["skipped_updates"] == len(events) == 3
    watcher.observe(9, float("nan"), 1.0, True)
    assert "4 of the last 10" in watcher.halt and "max_in_window" in watcher.halt
    watcher, _ = monitor(nonfinite=NonfiniteConfig(max_consecutive=2, max_in_window=3, window=10))
    for step in (1, 12, 23, 34, 45):
        watcher.observe(step, float("inf"), 1.0, True)
        watcher.observe(step + 1, 1.0, 1.0, False)
    assert watcher.halt is None, "far apart"
    for step in (60, 61, 62):
        watcher.observe(step, float("inf"), 1.0, True)
    assert "3 updates in a row" in watcher.halt and "max_consecutive" in watcher.halt


def test_repeated_rollbacks_stop_the_run():
    watcher, events = monitor()
    for number in range(3):
        spike = fed(watcher, [*NOISY, 9.0], start=1 + number)
        assert (watcher.halt is None) == (number < 2)
        if number < 2:
            watcher.rolled_back(spike, None, {"back_at": 0, "skipped_data": [6, 7, 8], "data_index": 8})
    assert "after 2 rollbacks within 100 steps" in watcher.halt
    assert [event["event"] for event in events] == ["rollback"] * 2
    assert len(watcher.state()["rollbacks"]) == 2


@pytest.mark.parametrize("seed", range(5))
def test_a_saved_monitor_decides_like_one_that_went_on(seed):
    draw = random.Random(seed)
    steps = [(draw.gauss(2, 0.1) + (draw.random() < 0.05) * 3, draw.random() < 0.1) for _ in range(200)]

    def run(saved_at):
        watcher, events = monitor(SpikeConfig(window=8, threshold=5.0), NonfiniteConfig(max_in_window=8, window=50))
        halted = None
        for step, (loss, skipped) in enumerate(steps, 1):
            watcher.observe(step, loss, 1.0, skipped)
            halted = halted or (step, watcher.halt) if watcher.halt else halted
            if step in saved_at:
                saved = json.loads(json.dumps(watcher.state()))
                watcher.restore(saved)
        return watcher.state(), events, halted

    assert run(()) == run(range(10, 200, 7)) == run(range(1, 201))


def test_events_are_rows_and_lines(tmp_path):
    watcher, events = monitor()
    watcher.observe(1, float("nan"), float("inf"), True)
    facts = {"back_at": 4, "skipped_data": [7, 8, 9], "data_index": 9}
    watcher.rolled_back(fed(watcher, [*NOISY, 9.0], 2), None, facts)
    for event in events:
        record(tmp_path, {"data_index": 0, **event})
    lines = (tmp_path / "anomalies.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert (rows[0]["event"], rows[0]["loss"], rows[0]["grad_norm"]) == ("skipped_update", "nan", "inf")
    assert rows[1]["skipped_data"] == [7, 8, 9] and rows[1]["data_index"] == 9
    assert "back to step 4, going on without data indices [7, 8, 9]" in describe(events[1])
    assert "update skipped: loss nan" in describe({"data_index": 0, **events[0]})
