"""AdamW against the algorithm in numpy, and state that keeps its types and layout, whatever the optimizer."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.checkpoint import named_leaves
from maxlm.config import OptimizerConfig, PrecisionConfig, ScheduleConfig
from maxlm.model import make_transformer
from maxlm.parallel.mesh import make_mesh
from maxlm.training.optimizer import make_optimizer
from maxlm.training.schedule import make_schedule
from maxlm.training.state import abstract_state, init_state, optimizer_of
from maxlm.training.step import abstract_batch, compile_step, train_step
from tests.training.tiny import host_batch, on, tiny_config

RATE, STEPS = 0.01, 4
SCHEDULE = ScheduleConfig(name="constant", warmup_steps=0)


@functools.cache
def parameters():
    return make_transformer(tiny_config(model=dict(num_layers=2)).model, jax.random.key(0))


def gradients(step):
    """Large ones, so that clipping acts, and small ones, so that it does not."""
    draw = np.random.default_rng(step)
    size = 0.1 if step % 2 else 0.001
    return jax.tree.map(lambda a: jnp.asarray(size * draw.normal(size=a.shape), jnp.float32), parameters())


def ours(config):
    optimizer, params = make_optimizer(config, SCHEDULE, STEPS), parameters()
    state = optimizer.init(params)
    update = jax.jit(lambda g, s, p: optimizer.update(g, s, p))
    for step in range(STEPS):
        updates, state = update(gradients(step), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return named_leaves(params), state


def in_numpy(config, clipped=True, decay_norms=False):
    """Loshchilov & Hutter's algorithm 2 with decay multiplied by the rate, in float64."""
    values = {name: np.asarray(a, np.float64) for name, a in named_leaves(parameters()).items()}
    mu, nu = ({name: np.zeros_like(a) for name, a in values.items()} for _ in range(2))
    for step in range(STEPS):
        grads = {name: np.asarray(a, np.float64) for name, a in named_leaves(gradients(step)).items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        factor = min(1.0, config.clip_norm / norm) if clipped and config.clip_norm else 1.0
        for name, g in grads.items():
            mu[name] = config.b1 * mu[name] + (1 - config.b1) * factor * g
            nu[name] = config.b2 * nu[name] + (1 - config.b2) * (factor * g) ** 2
            corrected = mu[name] / (1 - config.b1 ** (step + 1)), nu[name] / (1 - config.b2 ** (step + 1))
            decay = 0.0 if "norm" in name and not decay_norms else config.weight_decay
            step_of = corrected[0] / (np.sqrt(corrected[1]) + config.eps) + decay * values[name]
            values[name] = values[name] - RATE * step_of
    return values


def furthest(a, b):
    assert a.keys() == b.keys()
    return max(float(np.abs(np.asarray(a[name]) - np.asarray(b[name])).max()) for name in a)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_adamw_is_the_algorithm(clip_norm):
    config = OptimizerConfig(learning_rate=RATE, clip_norm=clip_norm, weight_decay=0.3)
    got, _ = ours(config)
    assert furthest(got, in_numpy(config)) < 1e-6
    assert furthest(got, in_numpy(config, decay_norms=True)) > 1e-3, "gains are not decayed"
    if clip_norm:
        assert furthest(got, in_numpy(config, clipped=False)) > 1e-4


def test_decay_skips_the_gains_alone():
    config = OptimizerConfig(learning_rate=RATE, weight_decay=0.5)
    params = parameters()
    optimizer = make_optimizer(config, SCHEDULE, STEPS)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for name, update in named_leaves(updates).items():
        assert bool((update == 0).all()) == ("norm" in name), name


@pytest.mark.parametrize(("mu", "nu"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_moments_are_stored_in_their_dtypes_and_computed_in_float32(mu, nu):
    config = OptimizerConfig(learning_rate=RATE, mu_dtype=mu, nu_dtype=nu)
    got, state = ours(config)
    moments = {kind: {leaf.dtype.name for name, leaf in named_leaves(state).items() if f"/{kind}/" in f"/{name}"}
               for kind in ("mu", "nu")}
    assert moments == {"mu": {mu}, "nu": {nu}}
    off = furthest(got, in_numpy(config))
    assert 1e-6 < off < 4e-3, "a rounded moment moves an update by less than a percent of the rate a step"


def described(tree):
    whole = lambda a: (*a.sharding.spec, *[None] * (a.ndim - len(a.sharding.spec)))  # noqa: E731
    return {name: (a.shape, a.dtype.name, whole(a), a.weak_type) for name, a in named_leaves(tree).items()}


RECIPES, DTYPES = (typing.get_args(typing.get_type_hints(kind)[field])
                   for kind, field in ((PrecisionConfig, "recipe"), (OptimizerConfig, "mu_dtype")))


@pytest.mark.parametrize(("recipe", "moments"), [*((recipe, "float32") for recipe in RECIPES),
                                                 *(("bf16", dtype) for dtype in DTYPES[1:]), ("fp8", "float8")])
@pytest.mark.parametrize("name", typing.get_args(typing.get_type_hints(OptimizerConfig)["name"]))
def test_a_step_keeps_the_types_and_layout_of_the_state(name, recipe, moments):
    """By types alone (explicit sharding carries the layout in them), so without the compiled step's own demands."""
    config = tiny_config(mesh=dict(data=2, fsdp=2, tensor=2), precision=dict(recipe=recipe),
                         optimizer=dict(name=name, mu_dtype=moments, nu_dtype=moments))
    mesh = make_mesh(config.mesh)
    step = functools.partial(
        train_step, optimizer=optimizer_of(config), schedule=make_schedule(config.schedule, 0.01, 20), microbatches=2,
        z_loss=0.0, chunks=1,
    )
    with jax.set_mesh(mesh):
        before = abstract_state(config, mesh)
        after, metrics = jax.eval_shape(step, before, abstract_batch(config, mesh))
    assert described(after) == described(before)
    assert {a.dtype.name for a in jax.tree.leaves(after.params)} == {"float32"}
    assert {a.dtype.name for a in jax.tree.leaves(metrics)} == {"float32", "int32", "uint32"}


@pytest.mark.slow
def test_a_compiled_step_keeps_them_too():
    config = tiny_config(mesh=dict(data=2, fsdp=2, tensor=2), precision=dict(recipe="bf16"),
                         optimizer=dict(nu_dtype="bfloat16"), model=dict(num_layers=2))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        state = init_state(config, mesh)
        before = described(state)
        state, metrics = compile_step(config, mesh)(state, on(mesh, host_batch(0)))
    assert described(state) == before == described(abstract_state(config, mesh))
    assert np.isfinite(float(metrics.loss))
