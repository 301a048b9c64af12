"""The solver against cases with a known minimum, and what it must leave alone."""

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.scaling.solver import DELTA, huber, solve

SLOPES = {"x": np.linspace(-1, 1, 25)}


def line(theta, columns):
    return theta[0] + theta[1] * columns["x"]


def test_a_sum_of_absolute_values_passes_through_the_majority():
    """Sixteen points on a line and nine far above it: least squares is pulled away, the Huber fit is not."""
    target = 2 + 3 * SLOPES["x"]
    target[::3] += 5
    found = solve(line, SLOPES, target, np.zeros((1, 2)))
    assert found.converged.all()
    assert np.abs(found.theta[0] - [2, 3]).max() < 2 * DELTA
    assert np.abs(np.polyfit(SLOPES["x"], target, 1) - [3, 2]).max() > 1


def test_weights_count_rows():
    random = np.random.default_rng(0)
    target = random.normal(size=25)
    counts = random.integers(0, 3, size=25)
    weighted = solve(line, SLOPES, target, np.zeros((1, 2)), counts[None]).objective[0]
    repeated = {"x": np.repeat(SLOPES["x"], counts)}
    wanted = solve(line, repeated, np.repeat(target, counts), np.zeros((1, 2))).objective[0]
    assert np.isclose(weighted, wanted, rtol=1e-9)


def test_a_parameter_that_is_not_free_stays():
    target = 2 + 3 * SLOPES["x"]
    found = solve(line, SLOPES, target, np.array([[0.0, 1.0]]), free=np.array([1, 0]))
    assert found.theta[0, 1] == 1.0 and abs(found.theta[0, 0] - 2) < 0.2


def test_many_problems_are_solved_as_one_alone():
    random = np.random.default_rng(1)
    targets, starts = random.normal(size=(70, 25)), random.normal(size=(70, 2))
    together = solve(line, SLOPES, targets, starts)
    alone = solve(line, SLOPES, targets[66], starts[66:67])
    assert np.allclose(together.objective[66], alone.objective[0], rtol=1e-9)


def test_huber_is_continuous_at_delta():
    values = huber(jnp.array([0.5 * DELTA, DELTA, 1.0]))
    assert np.allclose(values, [DELTA**2 / 8, DELTA**2 / 2, DELTA * (1 - DELTA / 2)], rtol=1e-5)


def test_float64_stays_inside():
    solve(line, SLOPES, SLOPES["x"], np.zeros((1, 2)))
    assert jnp.ones(1).dtype == jnp.float32 and not jax.config.jax_enable_x64
