"""`maxlm` on data that is poisoned at given data indices, for the tests of anomalies.

    python -m tests.training.poisoned '{"spike": [27], "nan": [31]}' train CONFIG --run-dir DIR ...

spike: every target of that batch becomes a byte that the text never has, so the loss jumps. nan: the batch gets a token
whose embedding is not a number; this needs model.tie_embeddings=false and optimizer.weight_decay=0.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from maxlm.cli import main
from maxlm.data import loader
from maxlm.data.skipping import data_index
from maxlm.training import anomalies, loop

UNSEEN, NOT_A_NUMBER = 250, 251


def poison(indices: dict[str, list[int]], replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """From here on, every run of this process reads poisoned data. replace: sets an attribute, and may undo it."""
    read, fresh = loader._Batches.__getitem__, loop.init_state

    def poisoned_read(self, step):
        batch, index = read(self, step), data_index(int(step), self._skipped)
        if index in indices.get("spike", ()):
            batch["targets"] = np.where(batch["targets"] >= 0, UNSEEN, -1).astype(np.int32)
        if index in indices.get("nan", ()):
            batch["tokens"] = np.full_like(batch["tokens"], NOT_A_NUMBER)
        return batch

    def poisoned_state(config, mesh):
        state = fresh(config, mesh)
        if "nan" in indices:
            value = state.params.embedding[...]
            table = np.array(value)
            table[NOT_A_NUMBER] = np.nan
            state.params.embedding[...] = jax.device_put(table, value.sharding)
        return state

    replace(loader._Batches, "__getitem__", poisoned_read)
    replace(loop, "init_state", poisoned_state)
    if "nan" in indices:  # the poison itself is a parameter that is not finite
        replace(anomalies, "_finite", lambda params: True)


if __name__ == "__main__":
    poison(json.loads(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
