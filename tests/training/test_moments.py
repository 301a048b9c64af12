"""Moments of 8 and 16 bits: what is stored, what it does to a run, and that meshes and resume do not change it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from maxlm.checkpoint import named_leaves
from maxlm.cli import main
from maxlm.config import OptimizerConfig, ScheduleConfig
from maxlm.model.parameter import matrix
from maxlm.parallel.mesh import make_mesh
from maxlm.parallel.sharding import STORAGE, spec
from maxlm.schema import ConfigError
from maxlm.training.moments import Rounding, block_exponents, block_of, decode, encode
from maxlm.training.optimizer import make_optimizer
from maxlm.training.state import abstract_state, init_state
from tests.training.runs import prepared, train, write_config
from tests.training.tiny import furthest, leaves, run_steps, tiny_config

SHAPES = {("embed", "mlp"): (3, 32, 200), ("heads", None, "embed"): (2, 4, 40, 16), ("norm",): (300,),
          ("vocab", "embed"): (257, 8), ("expert_embed",): (8,)}
STEP = 2.0**-3  # from one code to the next, relative, at most


def values(shape, signed, spread=2.0):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * np.exp(spread * rng.normal(size=shape))
    return jnp.asarray(x if signed else x**2, jnp.float32)


def random16(shape, seed):
    return jax.random.bits(jax.random.key(seed), shape, jnp.uint32) & 0xFFFF


@functools.partial(jax.jit, static_argnums=(1, 2))
def stored(x, dims, signed, bits):
    block = block_of(dims, x.shape)
    exponents = block_exponents(x, block, signed)
    return decode(encode(x, exponents, block, signed, bits), exponents, block, signed), exponents


@pytest.mark.parametrize("signed", [True, False], ids=["mu", "nu"])
@pytest.mark.parametrize("dims", list(SHAPES), ids=str)
def test_codes_are_near_and_their_mean_is_nearer(dims, signed):
    x = values(SHAPES[dims], signed)
    draws = [stored(x, dims, signed, random16(x.shape, seed)) for seed in range(64)]
    assert draws[0][1].size <= x.size / 8 + 1 and draws[0][0].dtype == jnp.float32
    window = np.abs(x) > np.abs(x).max() * 2.0**-13
    for got, _ in draws:
        assert (np.abs(got - x) <= STEP * np.abs(x))[window].all()
    # 64 draws are 8 times as near as one; a bias of a twentieth of a step would show.
    away = lambda a: np.sqrt(np.mean((np.asarray((a - x) / x)[window]) ** 2))  # noqa: E731
    once, mean = away(draws[0][0]), away(sum(got for got, _ in draws) / 64)
    assert mean < once / 5


def test_nothing_but_zero_is_a_second_moment_of_zero():
    x = jnp.asarray([[1e8, 1e-3, 1e-20, 1e-38, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]], jnp.float32)
    for seed in range(8):
        got, _ = stored(x, (None, None), False, random16(x.shape, seed))
        assert ((got > 0) == (x > 0)).all() and (got >= x * (1 - STEP)).all()
    got, _ = stored(x, (None, None), True, random16(x.shape, 0))
    assert (got[0, 2:] == 0).all(), "a first moment may be"


def average(dtype, stochastic, b2=0.999, steps=1500):
    """A moving average from 1 towards 1/4 over `steps` steps, in storage: (its mean, the exact value)."""
    rounding, key = Rounding(dtype, False, stochastic), jax.random.key(0)
    start = {"nu": nnx.Param(jnp.ones((8, 256), jnp.float32), dims=("embed", "mlp"))}

    def step(count, kept):
        moved = jax.tree.map(lambda x: b2 * x + (1 - b2) * 0.25, rounding.load(kept))
        return rounding.store(moved, jax.random.fold_in(key, count))

    kept = jax.jit(lambda: jax.lax.fori_loop(0, steps, step, rounding.store(start, key)))()
    return float(jnp.mean(rounding.load(kept)["nu"][...])), 0.25 + 0.75 * b2**steps


def test_an_average_moves_where_rounding_is_stochastic_and_stands_still_where_it_is_not():
    for dtype in ("float8", "bfloat16"):
        got, want = average(dtype, True)
        assert got == pytest.approx(want, rel=0.02), dtype
    assert average("bfloat16", False)[0] > 0.9


def regression(steps=300, **moments):
    """Loss of a noisy linear regression whose inputs differ in size, after Adam with such moments."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(size=64)).astype(np.float32)
    target = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
    config = OptimizerConfig(learning_rate=0.02, b2=0.99, weight_decay=0.0, clip_norm=0.0, **moments)
    optimizer = make_optimizer(config, ScheduleConfig(name="linear", warmup_steps=10, final_fraction=0.0), steps)
    params = {"w": matrix(nnx.Rngs(0), (64, 32), ("embed", "mlp"), 0.1, (0,), (1,))}

    def loss(params, x):
        return jnp.mean((x @ (params["w"][...] - target)) ** 2)

    def step(index, carry):
        params, state = carry
        x = jax.random.normal(jax.random.key(index), (16, 64)) * sizes[None]
        updates, state = optimizer.update(jax.grad(loss)(params, x), state, params)
        return jax.tree.map(jnp.add, params, updates), state

    params, _ = jax.jit(lambda: jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params))))()
    return float(jnp.mean(sizes[:, None] ** 2 * (params["w"][...] - target) ** 2))


def test_it_converges_as_with_float32():
    exact = regression()
    packed = regression(mu_dtype="float8", nu_dtype="float8")
    rounded = regression(mu_dtype="bfloat16", nu_dtype="bfloat16", stochastic_rounding=True)
    broken = regression(mu_dtype="float8", nu_dtype="float8", b1=0.0, eps=1.0)
    assert abs(packed - exact) < 0.1 * exact and abs(rounded - exact) < 0.1 * exact
    assert abs(broken - exact) > 0.5 * exact, "another optimizer is further"


FLOAT8 = dict(mu_dtype="float8", nu_dtype="float8")
MESH = dict(data=2, fsdp=2, tensor=2)


def test_codes_are_the_same_bits_on_a_mesh():
    mesh = make_mesh(tiny_config(mesh=MESH).mesh)
    for dims, shape in {("embed", "mlp"): (3, 32, 64), ("heads", None, "embed"): (2, 4, 40, 16)}.items():
        x = values(shape, True)
        for rounding in (Rounding("float8", True, True), Rounding("bfloat16", True, True)):
            keep = jax.jit(lambda x, rounding=rounding, dims=dims: rounding.store(
                {"w": nnx.Param(x, dims=dims)}, jax.random.key(3)))
            alone = leaves(keep(x))
            with jax.set_mesh(mesh):
                spread = keep(jax.device_put(x, NamedSharding(mesh, spec(dims, STORAGE, x.ndim))))
            assert all(a.tobytes() == b.tobytes() for a, b in zip(alone, leaves(spread), strict=True))


@pytest.mark.slow
def test_a_mesh_trains_like_one_device():
    """Rounding the sums of gradients in another order moves single codes, and so an element of the update by a few
    percent of the rate."""
    alone = run_steps(tiny_config(optimizer=FLOAT8), devices=1)
    spread = run_steps(tiny_config(optimizer=FLOAT8, mesh=MESH), devices=8, start=alone.first)
    exact = run_steps(tiny_config(), devices=1)
    assert np.abs(np.subtract(alone.losses, spread.losses)).max() < 0.01
    assert np.abs(np.subtract(alone.losses, exact.losses)).max() < 0.05
    assert furthest(alone.last[:3], exact.last[:3]) > 1e-4, "and it is not float32's"


@pytest.mark.parametrize(("moments", "factor"), [(FLOAT8, 4), (dict(mu_dtype="float8", nu_dtype="bfloat16"), 8 / 3)])
def test_the_state_is_smaller(moments, factor):
    def size(**optimizer):
        config = tiny_config(model=dict(hidden_dim=256, mlp_dim=1024, head_dim=64, vocab_size=1024),
                             optimizer=optimizer, mesh=dict(fsdp=1))
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        with jax.set_mesh(mesh):
            return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(abstract_state(config, mesh).opt_state))

    assert 0.97 * factor < size() / size(**moments) <= factor


def test_a_mesh_that_would_split_a_block_is_refused():
    config = tiny_config(optimizer=FLOAT8, mesh=dict(fsdp=1, tensor=8),
                         model=dict(num_heads=8, num_kv_heads=8, mlp_dim=72))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match=r"mu_dtype='float8' keeps .* use bfloat16"):
        init_state(config, mesh)


def test_rounding_without_anything_to_round_is_refused():
    with pytest.raises(ConfigError, match="stochastic_rounding is for bfloat16"):
        OptimizerConfig(stochastic_rounding=True)


@pytest.mark.slow
@pytest.mark.parametrize("moments", [
    ("optimizer.mu_dtype=float8", "optimizer.nu_dtype=float8"),
    ("optimizer.mu_dtype=bfloat16", "optimizer.nu_dtype=bfloat16", "optimizer.stochastic_rounding=true"),
    ("optimizer.mu_dtype=float8", "optimizer.name=muon"),
], ids=["float8", "bfloat16", "muon"])
def test_resume_is_bit_exact(tmp_path, capsys, moments):
    config = write_config(tmp_path / "tiny.py", prepared(tmp_path / "data"))
    digests = []
    for name, lengths in (("whole", (6,)), ("parts", (2, 4, 6)), ("other seed", (6,))):
        seed = ("train.seed=1",) if name == "other seed" else ()
        for steps in lengths:
            assert train(config, tmp_path / name, *moments, *seed, f"train.num_steps={steps}",
                         "schedule.name=constant", "mesh.data=2") == 0
        capsys.readouterr()
        assert main(["checkpoint", "digest", str(tmp_path / name)]) == 0
        digests.append(capsys.readouterr().out.splitlines()[-1])
    assert digests[0] == digests[1] != digests[2]


def test_names_and_types_of_what_is_kept():
    config = tiny_config(optimizer=FLOAT8, model=dict(num_layers=2), mesh=dict(fsdp=1))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        kept = named_leaves(abstract_state(config, mesh).opt_state)
    kinds = {name.split("/")[-4 if "layers" in name else -2] for name in kept} & {"codes", "exponents"}
    assert {a.dtype.name for name, a in kept.items() if "codes" in name or "exponents" in name} == {"uint8"}
    assert kinds and {a.dtype.name for a in kept.values()} == {"uint8", "int32"}
