"""Which configs can be trained together in one program (training/packed.py, `maxlm sweep --packed`)."""

from __future__ import annotations

from typing import Any

from maxlm.schema import flatten

MAY_DIFFER = ("train.seed", "optimizer.learning_rate")  # the seed decides the data order too


def packing_difference(first: Any, other: Any) -> list[str]:
    """Lines 'key: first and other' for the fields of two RunConfigs that keep them out of one program."""
    before = flatten(first)
    return [f"{key}: {before[key]!r} and {value!r}" for key, value in flatten(other).items()
            if value != before[key] and key not in MAY_DIFFER]


def on_one_device(config: Any) -> bool:
    mesh = config.mesh
    return mesh.fsdp in (1, "rest") and {mesh.data, mesh.stage, mesh.expert, mesh.context, mesh.tensor} == {1}
