"""`maxlm train` in several real processes: the same tokens, the same files, the same numbers."""

import numpy as np
import pytest

from maxlm.checkpoint import tree_digest
from maxlm.checkpoint.durable import opened
from tests.multiprocess.launch import train
from tests.training.runs import prepared, rows_of, timeless, write_config, write_texts

SETTINGS = ("logging.sample_prompt=",)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    return write_config(folder / "tiny.py", prepared(folder / "data"))


def last_state(run):
    """Every array of the checkpoint of the last step, by name."""
    durable = opened(run / "checkpoints")
    return durable.arrays(6, durable.document(6)["arrays"])


def test_two_processes_train_to_the_end(config, tmp_path):
    """Process 0 alone writes and reports; the numbers are one process's, up to the order in which gloo sums."""
    run = tmp_path / "run"
    ends = train(config, run, *SETTINGS, processes=2, devices=2)
    assert "held-out text after 6 steps" in ends[0].out and "held-out" not in ends[1].out
    assert ends[1].error == ""
    assert {"config.json", "metrics.jsonl", "loss.png", "DONE", "checkpoints"} <= {path.name for path in run.iterdir()}
    alone = tmp_path / "alone"
    train(config, alone, *SETTINGS, processes=1, devices=4)
    assert [(row["step"], row["tokens"]) for row in rows_of(run)] == [
        (row["step"], row["tokens"]) for row in rows_of(alone)
    ]
    for row, expected in zip(timeless(run), timeless(alone), strict=True):
        np.testing.assert_allclose(list(row.values()), list(expected.values()), rtol=1e-5)
    ours, theirs = last_state(run), last_state(alone)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.slow
def test_rows_are_split_between_processes(config, tmp_path):
    """Each process reads whole rows, and its devices hold a part of each; the numbers are those of other meshes."""
    together, apart = tmp_path / "together", tmp_path / "apart"
    train(config, together, *SETTINGS, "mesh.context=4", processes=2, devices=2)
    train(config, apart, *SETTINGS, processes=1, devices=4)
    for row, expected in zip(timeless(together), timeless(apart), strict=True):
        np.testing.assert_allclose(list(row.values()), list(expected.values()), rtol=1e-5)
    ours, theirs = last_state(together), last_state(apart)  # where a gradient is nearly 0, Adam enlarges rounding
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=5e-5, err_msg=name)


@pytest.mark.slow
def test_same_mesh_same_bytes_whatever_the_processes(config, tmp_path):
    """Four devices in two processes or in four: gloo sums in the order of devices, so no bit differs, in parameters,
    losses and evaluations. One process sums in XLA's own order, and so do two runs of it."""
    digests = {}
    for processes, devices in ((2, 2), (4, 1)):
        run = tmp_path / f"{processes}"
        train(config, run, *SETTINGS, processes=processes, devices=devices)
        digests[processes] = tree_digest(run / "checkpoints")
        again = tmp_path / f"{processes}-again"
        train(config, again, *SETTINGS, processes=processes, devices=devices)
        assert tree_digest(again / "checkpoints") == digests[processes]
    assert digests[2] == digests[4]
    two, four = (timeless(tmp_path / name) for name in ("2", "4"))
    assert two == four and [row["step"] for row in four if "eval_loss" in row] == [3, 6]
    assert (tmp_path / "4" / "DONE").exists()


@pytest.mark.slow
def test_a_source_is_prepared_once_and_a_sample_is_drawn(tmp_path):
    """Process 0 prepares `data.source`, the others wait for it; parameters spread over processes are sampled from."""
    texts = write_texts(tmp_path / "texts")
    config = write_config(tmp_path / "tiny.py", tmp_path / "unused")
    config.write_text(config.read_text().replace(f"path={str(tmp_path / 'unused')!r}", f"source={str(texts)!r}"))
    run = tmp_path / "run"
    ends = train(config, run, "data.heldout_fraction=0.2", "train.num_steps=2", processes=2, devices=1)
    assert (run / "data" / "manifest.json").exists()
    assert (run / "sample.txt").read_text().startswith("the ")
    assert "sample" not in ends[1].out


