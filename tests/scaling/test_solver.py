"""The solver against cases with a known minimum, and what it must leave alone."""

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.scaling.solver import DELTA, LEAST, Sum, huber, solve

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


def test_a_coefficient_whose_best_value_is_0_holds_nothing_up():
    """Losses that bend the other way than an offset can make them: the optimum is that of the line without one, and a
    start with hardly any offset finds its way back where there is one."""
    offset = Sum(lambda theta, x: (theta[0], theta[1] - theta[2] * x["x"]), (0, 1))
    starts = np.array([[-1.0, -0.5, 0.3], [LEAST, 0.0, 1.0]])
    target = 0.5 - 0.3 * SLOPES["x"] - 0.1 * SLOPES["x"] ** 2
    found = solve(offset, SLOPES, target, starts, max_iterations=60)
    without = solve(line, SLOPES, target, np.zeros((1, 2))).objective[0]
    assert found.converged.all() and np.allclose(found.objective / without, 1, rtol=0, atol=1e-9)
    assert found.theta[:, 0].max() < -15
    bent = np.log(0.6 + 0.4 * np.exp(-0.7 * SLOPES["x"]))
    assert np.allclose(np.exp(solve(offset, SLOPES, bent, starts).theta), np.exp([np.log(0.6), np.log(0.4), 0.7]))


def test_a_sum_is_solved_as_any_other_function():
    model = Sum(lambda theta, x: (theta[0], theta[1] - theta[2] * x["x"]), (0, 1))
    target = np.log(0.6 + 0.4 * np.exp(-0.7 * SLOPES["x"])) + 0.02 * np.cos(9 * SLOPES["x"])
    starts = np.array([[-0.5, -1.0, 0.5]])
    found, wanted = (solve(f, SLOPES, target, starts) for f in (model, lambda theta, x: model(theta, x)))
    other = solve(model, SLOPES, target + 0.001, starts)
    assert np.isclose(found.objective[0], wanted.objective[0], rtol=1e-9)
    assert np.allclose(found.theta, wanted.theta, atol=1e-5) and not np.allclose(other.theta, wanted.theta, atol=1e-5)


def test_huber_is_continuous_at_delta():
    values = huber(jnp.array([0.5 * DELTA, DELTA, 1.0]))
    assert np.allclose(values, [DELTA**2 / 8, DELTA**2 / 2, DELTA * (1 - DELTA / 2)], rtol=1e-5)


def test_float64_stays_inside():
    solve(line, SLOPES, SLOPES["x"], np.zeros((1, 2)))
    assert jnp.ones(1).dtype == jnp.float32 and not jax.config.jax_enable_x64
