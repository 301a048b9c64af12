"""Training with FP8 products: what stays the same, and what does not."""

import functools

import numpy as np
import pytest
from tiny import Run, furthest, run_steps, tiny_config


@functools.cache
def step(recipe: str, first: int = 0, mesh: tuple = (), unroll: int | str = 1, window: int = 7, sites: tuple = (),
         experts: int = 0, remat: str = "none") -> Run:
    sparse = dict(num_experts=experts, experts_per_token=2, expert_dim=32) if experts else {}
    eight = dict(fp8_sites=sites) if sites else {}
    config = tiny_config(precision=dict(recipe=recipe, plain_first_layers=first) | eight, remat=dict(policy=remat),
                         mesh=dict(mesh), compute=dict(layer_unroll=unroll), model=dict(sliding_window=window) | sparse)
    return run_steps(config, devices=8 if mesh else 1, steps=1)


def apart(a: Run, b: Run) -> float:
    """How far two steps from the same start end from each other, relative to how far they went."""
    moved = lambda run, other: np.sqrt(sum(  # noqa: E731
        np.sum((x - y).astype(np.float64) ** 2) for x, y in zip(run, other, strict=True) if x.dtype == np.float32))
    return moved(a.last, b.last) / moved(b.last, b.first)


@pytest.mark.parametrize("recipe", ["fp8", *(pytest.param(recipe, marks=pytest.mark.slow)
                                            for recipe in ("fp8_rowwise", "fp8_block"))])
def test_a_step_is_near_bf16s(recipe):
    assert 0.01 < apart(step(recipe), step("bf16")) < 0.25
    assert apart(step(recipe, window=2), step("bf16")) > 0.4  # another model is further


@pytest.mark.slow
def test_layers_that_stay_plain_are_bf16s():
    """All four of them: the same bits. The first two: nearer than none."""
    assert furthest(step("fp8", first=4).last, step("bf16").last) == 0
    assert 0 < apart(step("fp8", first=2), step("bf16")) < apart(step("fp8"), step("bf16"))


@pytest.mark.parametrize("how", [
    dict(mesh=(("fsdp", 2), ("context", 2), ("tensor", 2))), pytest.param(dict(unroll="all"), marks=pytest.mark.slow)
], ids=["a mesh", "unrolled"])
def test_how_it_is_computed_changes_rounding_alone(how):
    """The same model (another one is 0.4 away, above), and in 8 bits here too; tests/numerics compares closely."""
    assert apart(step("fp8", **how), step("fp8")) < 0.25
    assert apart(step("fp8", **how), step("bf16", **how)) > 5 * apart(step("bf16", **how), step("bf16"))


@pytest.mark.slow
def test_experts_are_a_site():
    """They and nothing else in 8 bits, here and on a mesh, recomputed; tests/model compares closely."""
    plain, fp8 = step("bf16", experts=8), step("fp8", experts=8, sites=("experts",))
    assert 0.01 < apart(fp8, plain) < 0.25
    mesh = (("expert", 2), ("fsdp", 2), ("tensor", 2))
    assert 0.01 < apart(step("fp8", experts=8, sites=("experts",), mesh=mesh, remat="names"), plain) < 0.25
