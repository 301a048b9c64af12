"""metrics.jsonl, the loss curve, and held-out results against a computation by hand."""

import json
import math

import jax
import numpy as np
import pytest

from maxlm.config import MeshConfig
from maxlm.parallel.mesh import make_mesh
from maxlm.training.evaluate import Evaluation, make_evaluator, to_device
from maxlm.training.metrics import MetricsWriter, plot_loss, read_rows
from maxlm.training.state import abstract_state, init_state
from tests.training.tiny import ROWS, host_batch, leaves, placed, tiny_config


def write(run_dir, start, steps):
    writer = MetricsWriter(run_dir, start, tensorboard=False)
    for step in steps:
        writer.write({"step": step, "tokens": 10 * step, "loss": 1.0 / step})
    writer.close()


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
    write(tmp_path, 0, [1, 2, 3, 4, 5])
    write(tmp_path, 3, [4])
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3, 4]
    assert not (tmp_path / "metrics.partial").exists()


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    write(tmp_path, 0, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]
    write(tmp_path, 2, [3])
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_numbers_json_cannot_hold_are_null(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    writer.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "mfu": None})
    writer.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (row["loss"], row["grad_norm"], row["mfu"]) == (None, None, None)


def test_an_evaluation_already_written_is_known(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    writer.write({"step": 2, "tokens": 1, "eval_loss": 1.0})
    writer.close()
    resumed = MetricsWriter(tmp_path, 2, tensorboard=False)
    assert resumed.has_evaluation(2) and not resumed.has_evaluation(1)
    resumed.close()


def test_the_loss_curve_is_drawn(tmp_path):
    from matplotlib.image import imread

    plot_loss(tmp_path)  # nothing to draw yet
    blank = imread(tmp_path / "loss.png")
    write(tmp_path, 0, range(1, 20))
    plot_loss(tmp_path)
    drawn = imread(tmp_path / "loss.png")
    assert drawn.shape[0] > 300 and drawn[..., :3].std() > 0.01
    assert drawn.shape != blank.shape or (drawn != blank).any()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


class Heldout:
    """Two global batches; the last rows of the second are empty."""

    num_batches = 2

    def batch(self, index, rows):
        batch = host_batch(index) | {"bytes": np.arange(1, ROWS + 1, dtype=np.int32)}
        if index:
            batch["targets"][10:], batch["segment_ids"][10:], batch["bytes"][10:] = -1, 0, 0
        return {name: a[rows.start : rows.stop] for name, a in batch.items()}


def test_bits_per_byte_is_the_computation_by_hand():
    config = tiny_config(mesh=dict(fsdp=2, context=2), model=dict(num_layers=2), eval=dict(num_batches=0))
    mesh = make_mesh(config.mesh, jax.devices()[:4])
    with jax.set_mesh(mesh):
        params = init_state(config, mesh).params
        result = make_evaluator(config, mesh)(params, Heldout(), range(ROWS))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = placed(leaves(params), abstract_state(config, mesh).params)
        forward = jax.jit(lambda params, b: params(b["tokens"], b["positions"], b["segment_ids"]))
        hidden = [np.asarray(forward(params, to_device(batch, mesh)), np.float64) for batch in batches()]
    head = np.asarray(params.head_weight[...], np.float64)
    nats = tokens = text_bytes = 0
    for x, batch in zip(hidden, batches(), strict=True):
        logits = 20 * np.tanh(x @ head.T / 20)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        rows, places = np.nonzero(batch["targets"] >= 0)
        nats -= log_p[rows, places, batch["targets"][rows, places]].sum()
        tokens, text_bytes = tokens + len(rows), text_bytes + int(batch["bytes"].sum())
    assert (result.tokens, result.bytes) == (tokens, text_bytes)
    assert result.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / text_bytes / math.log(2), rel=1e-5)


def batches():
    return [Heldout().batch(index, range(ROWS)) for index in range(2)]


def test_nothing_held_out_is_no_number():
    empty = Evaluation(0.0, 0, 0)
    assert math.isnan(empty.loss) and math.isnan(empty.bits_per_byte)
