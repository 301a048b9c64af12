"""Weights that change during a run: rows stay a function of the step, and no folder starts again."""

from itertools import pairwise

import grain
import pytest
from data_corpus import prepare_quietly, write_folder

from maxlm.config import DataConfig, DatasetConfig, RunConfig, StageConfig, training_difference
from maxlm.data.loader import TrainingData
from maxlm.data.mixture import _counts, _parts
from maxlm.schema import ConfigError, from_dict, to_dict

SEQ_LEN, BATCH = 64, 8
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three prepared folders without a document in common."""
    folder = tmp_path_factory.mktemp("stages")
    for number, name in enumerate(NAMES):
        write_folder(folder / f"{name}-text", 60, first=1000 * number)
        prepare_quietly([folder / f"{name}-text"], folder / name, shard_rows=16)
    return folder


def mixture(root, *weights):
    return tuple(DatasetConfig(str(root / name), weight) for name, weight in zip(NAMES, weights, strict=True) if weight)


def staged(root, first, *stages):
    """Weights of the three folders at the start, then (first step, weights) for each stage."""
    base = tuple(DatasetConfig(str(root / name), weight) for name, weight in zip(NAMES, first, strict=True))
    later = tuple(StageConfig(step, mixture(root, *weights)) for step, weights in stages)
    return DataConfig(mixture=base, stages=later)


def data_of(config, seed=0):
    return TrainingData(config.mixture, seq_len=SEQ_LEN, global_batch_size=BATCH, seed=seed,
                        stages=config.weights_by_step())


def rows(data, steps, name="tokens"):
    return [row.tobytes() for step in steps for row in data.batch(step)[name]]


def source_of(root, data):
    """Which folder each row of training came from, by its bytes."""
    table = {}
    for name in NAMES:
        alone = TrainingData([DatasetConfig(str(root / name))], seq_len=SEQ_LEN, global_batch_size=1, seed=0)
        table |= {alone.batch(i)["tokens"][0].tobytes(): name for i in range(alone.rows)}
    return table


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.7, 9.3), (0.2, 0.5, 0.3)])
def test_the_rule_is_grains(weights):
    """So that adding a stage changes nothing of what comes before it."""
    index = grain.MapDataset.range(1 << 40)
    mixed = grain.MapDataset.mix([index.map(lambda n, i=i: (i, n)) for i in range(len(weights))], list(weights))
    parts = _parts(weights)
    for n in [*range(200), 123_456_789]:
        before, after = _counts(n, parts), _counts(n + 1, parts)
        assert [b - a for a, b in zip(before, after, strict=True)].count(1) == 1 and sum(before) == n
        chosen = next(i for i in range(len(parts)) if before[i] != after[i])
        assert mixed[n] == (chosen, before[chosen])


def test_a_stage_changes_nothing_before_it(root):
    plain = data_of(staged(root, (3.0, 1.0, 2.0)))
    with_stage = data_of(staged(root, (3.0, 1.0, 2.0), (5, (0, 1.0, 1.0))))
    assert rows(plain, range(5)) == rows(with_stage, range(5))
    assert rows(plain, range(5, 7)) != rows(with_stage, range(5, 7))
    assert plain.digest != with_stage.digest


def test_weights_hold_in_each_stage_and_folders_go_on(root):
    data = data_of(staged(root, (1.0, 1.0, 0.0), (4, (1.0, 0, 3.0)), (9, (0, 0, 1.0)), (11, (1.0, 1.0, 0))))
    table = source_of(root, data)
    drawn = {name: [] for name in NAMES}
    half = (0.5, 0.5, 0)
    for first, end, shares in ((0, 4, half), (4, 9, (0.25, 0, 0.75)), (9, 11, (0, 0, 1)), (11, 14, half)):
        stage = rows(data, range(first, end))
        for name, share in zip(NAMES, shares, strict=True):
            mine = [row for row in stage if table[row] == name]
            assert abs(len(mine) - share * BATCH * (end - first)) <= 1, (first, name)
            drawn[name] += mine
    for name, mine in drawn.items():
        epoch = len([row for row, source in table.items() if source == name])
        assert len(set(mine[:epoch])) == min(epoch, len(mine)), f"{name} gave a row twice within its epoch"


def test_any_step_alone_equals_reading_up_to_it(root):
    """Resume in a stage, at its edge, and by any number of processes."""
    data = data_of(staged(root, (1.0, 1.0, 0.0), (3, (1.0, 0, 3.0)), (6, (1.0, 1.0, 1.0))))
    whole = [rows(data, [step]) for step in range(9)]
    for start in (0, 2, 3, 4, 6, 8):
        with data.iterate(start, range(2, 5), prefetch_batches=2) as stream:
            for step in range(start, 9):
                got, batch = next(stream)
                assert got == step and [row.tobytes() for row in batch["tokens"]] == whole[step][2:5]
    assert all(a != b for a, b in pairwise(whole))


def test_stages_survive_json_and_decide_what_is_trained(root):
    config = RunConfig(data=staged(root, (1.0, 1.0, 0.0), (3, (1.0, 0, 3.0))))
    assert from_dict(RunConfig, to_dict(config)) == config
    moved = RunConfig(data=staged(root / "elsewhere", (1.0, 1.0, 0.0), (3, (1.0, 0, 3.0))))
    assert training_difference(config, moved) == []
    for stage in ((4, (1.0, 0, 3.0)), (3, (1.0, 0, 2.0))):
        assert training_difference(config, RunConfig(data=staged(root, (1.0, 1.0, 0.0), stage))) != []


@pytest.mark.parametrize(
    "make, complaint",
    [
        (lambda r: staged(r, (1, 1, 1), (5, (1, 0, 0)), (5, (0, 1, 0))), "must ascend from stage to stage, not 5, 5"),
        (lambda r: staged(r, (1, 1, 1), (5, (1, 0, 0)), (3, (0, 1, 0))), "must ascend from stage to stage, not 5, 3"),
        (lambda r: staged(r, (1, 1, 1), (0, (1, 0, 0))), "data.stages.from_step=0 must be greater than 0"),
        (lambda r: staged(r, (1, 1, 1), (5, (0, 0, 0))), "from step 5: all weights are 0"),
        (lambda r: staged(r, (0, 0, 0), (5, (1, 1, 1))), "data.mixture: all weights are 0"),
        (lambda r: staged(r, (1, 1, 0), (5, (1, 1, 0))), "c has weight 0 in every stage"),
        (lambda r: staged(r, (1, 1, 0)), "c has weight 0 in every stage"),
        (lambda r: DataConfig(mixture=(DatasetConfig("a"),), stages=(StageConfig(5, (DatasetConfig("z"),)),)),
         "data.stages from step 5: 'z' is not a folder of data.mixture (a)"),
        (lambda r: DataConfig(mixture=(DatasetConfig("a"),), stages=(StageConfig(5, (DatasetConfig("a"),) * 2),)),
         "a folder is named twice"),
        (lambda r: DataConfig(path="a", stages=(StageConfig(5, (DatasetConfig("a"),)),)), "needs data.mixture"),
        (lambda r: DatasetConfig("a", -1.0), "data.mixture.weight=-1.0 must be 0 or greater"),
    ],
)
def test_mistakes_are_one_line(root, make, complaint):
    with pytest.raises(ConfigError) as caught:
        make(root)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)
