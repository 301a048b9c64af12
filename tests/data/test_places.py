"""A row's place is where its record is read from."""

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from data_corpus import prepare_quietly, write_folder

from maxlm.config import DatasetConfig
from maxlm.data.loader import TrainingData
from maxlm.data.places import RowPlaces, altered_shards

SETTINGS = {"global_batch_size": 8, "seed": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    for number, name in enumerate("ab"):
        write_folder(root / f"{name}-text", 60, first=1000 * number)
        prepare_quietly([root / f"{name}-text"], root / name, shard_rows=16)
    return [DatasetConfig(str(root / "a"), 2.0), DatasetConfig(str(root / "b"), 1.0)]


@pytest.mark.parametrize(("count", "stages"), [(1, ()), (2, ()), (2, ((0, (2.0, 1.0)), (4, (1.0, 3.0))))],
                         ids=["one folder", "a mixture", "stages"])
def test_places_are_where_the_rows_are(folders, count, stages):
    data = TrainingData(folders[:count], seq_len=64, stages=stages, **SETTINGS)
    of_rows = RowPlaces(data.datasets, stages=stages, **SETTINGS)
    for index in (0, 3, 5, 40):  # in a later epoch too
        places = of_rows.of_batch(index)
        records = [bytes(ArrayRecordReader(place.path).read([place.record])[0]) for place in places]
        for name, expected in data.batch(index).items():
            np.testing.assert_array_equal(data.row_format.decode(records)[name], expected)
    assert altered_shards(places) == {}
