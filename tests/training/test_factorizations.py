"""However 8 devices are spread over the axes of the mesh, they train what one device trains.

The model has a dense layer and one with experts, grouped queries, packed documents and a sliding window.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import numpy as np
import pytest

from maxlm.config import AXES
from maxlm.kernels.attention import ring
from maxlm.parallel.context import token_index
from maxlm.parallel.mesh import check_divisible, make_mesh
from maxlm.training import loss as loss_module
from maxlm.training.state import abstract_state, init_state
from maxlm.training.step import compile_step
from tests.training.tiny import furthest, host_batch, leaves, on, placed, tiny_config

DEVICES, STEPS = 8, 10
ROUNDING = 1e-4  # of parameters and moments after all steps; float32, weights up to 1
MODEL = dict(
    num_heads=16, num_kv_heads=8, head_dim=4, layer_pattern=["local"], num_experts=8,
    experts_per_token=2, expert_dim=16,
    moe=dict(scores="sigmoid", bias_rate=1e-2, num_groups=4, groups_per_token=2, weight_scale=2.5, shared_experts=1,
             dense_layers=1, balance_loss=1e-2, balance_over="sequence"),
)
JITTER = 0.1


def factorizations(devices, axes):
    """Every mesh of that many devices: a size for each axis."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for sizes in itertools.product(divisors, repeat=len(axes)):
        if math.prod(sizes) == devices:
            yield dict(zip(axes, sizes, strict=True))


WAYS = ("ring", "all_gather", "all_to_all")  # of attention, in turns where rows are split
_turns = itertools.cycle(WAYS)
TABLE = [(mesh, next(_turns) if mesh["context"] > 1 else "auto") for mesh in factorizations(DEVICES, AXES)]
QUICK = [dict.fromkeys(AXES, 1) | mesh for mesh in (dict(fsdp=2, context=2, tensor=2), dict(expert=2, context=4))]


def named(mesh, way):
    words = [f"{axis}{n}" for axis, n in mesh.items() if n > 1]
    marks = [] if mesh in QUICK else [pytest.mark.slow] if sampled(mesh) else [pytest.mark.slow, pytest.mark.exhaustive]
    return pytest.param(mesh, way, id="-".join([*words, way]), marks=marks)


def sampled(mesh):
    """A quarter of the table, spread over it: what CI has time for."""
    return TABLE.index(next(case for case in TABLE if case[0] == mesh)) % 4 == 1


def settings(layers, jitter, mesh=None, way="auto", **sections):
    model = MODEL | {"num_layers": layers, "moe": MODEL["moe"] | {"jitter": jitter}}
    return tiny_config(model=model, mesh=mesh or {}, compute=dict(context_attention=way), **sections)


class Step(NamedTuple):
    """Loss and choices of a step, [sparse layers, experts], and the state it left."""

    loss: float
    chosen: np.ndarray
    state: list[np.ndarray]


def trained(config, devices, start) -> list[Step]:
    mesh, steps = make_mesh(config.mesh, jax.devices()[:devices]), []
    check_divisible(mesh, config)
    with jax.set_mesh(mesh):
        state, step = placed(start, abstract_state(config, mesh)), compile_step(config, mesh)
        for index in range(STEPS):
            state, metrics = step(state, on(mesh, host_batch(index)))
            steps.append(Step(float(metrics.loss), np.asarray(metrics.load.chosen_E), leaves(state)))
    return steps


@functools.cache
def single_device(layers, jitter) -> tuple[list[np.ndarray], list[Step]]:
    """From weights of the size of trained ones, so that tokens differ in their experts."""
    config = settings(layers, jitter)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        start = leaves(init_state(config, mesh))
    start = [10 * a if a.ndim > 2 and a.dtype == np.float32 else a for a in start]
    return start, trained(config, 1, start)


def away(mesh, way, jitter=None, **sections):
    """How far losses and states (Adam's moments hold all gradients) are from a single device's, at most.

    Where a token's experts have scores equal but for rounding it may take another, and from there on the two runs are
    of different models: they are compared up to there, if that is a few tokens, and not in the first three steps."""
    stages = mesh.get("stage", 1)
    jitter = (JITTER if stages == 1 else 0.0) if jitter is None else jitter  # which each microbatch draws for itself
    layers = 1 + stages  # a dense one, and a sparse one a stage
    start, expected = single_device(layers, jitter)
    steps, worst = trained(settings(layers, jitter, mesh, way, **sections), DEVICES, start), 0.0
    for index, (ours, theirs) in enumerate(zip(steps, expected, strict=True)):
        if 0 < np.abs(ours.chosen - theirs.chosen).sum() <= 8 and index >= 3:
            break
        worst = max(worst, abs(ours.loss - theirs.loss), furthest(ours.state, theirs.state))
    return worst


def test_the_table_has_every_mesh():
    assert len(TABLE) == 56  # 3 factors of 2 fall on 6 axes
    assert all(sum(way == used for _, used in TABLE) == 7 for way in WAYS)


@pytest.mark.parametrize(("mesh", "way"), [named(*case) for case in TABLE])
def test_a_mesh_trains_what_one_device_trains(mesh, way):
    assert away(mesh, way) < ROUNDING * mesh["stage"]  # models of more stages are deeper, and rounding grows


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ring", "all_gather", "all_to_all"])
def test_microbatches_remat_and_unrolled_layers_do_not_matter(way):
    assert away(dict(data=2, fsdp=1, context=2, tensor=2), way, jitter=0.0, train=dict(grad_accumulation=2),
                remat=dict(policy="names")) < ROUNDING


def chunk_late(device, length, ways):
    return token_index((device + 1) % ways, length, ways)


@pytest.mark.slow
@pytest.mark.parametrize("twin", ["positions", "order", "balance"])
def test_a_perturbed_twin_trains_something_else(twin, monkeypatch):
    if twin == "positions":
        monkeypatch.setattr(ring, "token_index", chunk_late)
    if twin == "order":
        monkeypatch.setattr(loss_module, "balanced_order", lambda batch: batch)
    if twin == "balance":  # each part of a row balanced by itself
        monkeypatch.setattr(jax.lax, "psum", lambda x, axes, psum=jax.lax.psum: (
            x if axes == "context" else psum(x, axes)))
    assert away(dict(data=2, fsdp=1, context=4, tensor=1), "ring") > 5 * ROUNDING
