"""Every attention implementation that a CPU can run, against attention written out in numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from naive_attention import naive_attention, seen_BTS

from maxlm.kernels.attention import attention, choose_attention, reference
from maxlm.kernels.attention.reference import reference_attention
from maxlm.kernels.attention.tpu import splash_attention
from maxlm.schema import ConfigError

SCALE = 0.3
CASES = {  # H, G, window, softcap
    "plain": (2, 2, None, 0.0),
    "grouped": (4, 2, None, 0.0),
    "one key head": (4, 1, None, 0.0),
    "window": (2, 2, 37, 0.0),
    "soft cap": (2, 1, None, 1.5),
    "all": (4, 2, 37, 1.5),
}


def inputs(T, H, G, B=2, K=8, documents=3, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(rng.normal(size=(B, T, heads, K)), dtype) for heads in (H, G, G, H))
    segments = np.sort(rng.integers(1, documents + 1, size=(B, T)), axis=1)
    segments[-1, -T // 5 :] = 0  # padding
    return q, k, v, dout * jnp.asarray(segments > 0, dtype)[:, :, None, None], jnp.asarray(segments, jnp.int32)


def largest_error(function, T, H, G, window, softcap, *, twin_segments=None, dtype=jnp.float32):
    """Over values and gradients at real tokens; `twin_segments` computes with other documents than are expected."""
    q, k, v, dout, segments = inputs(T, H, G, dtype=dtype)
    used = segments if twin_segments is None else twin_segments(segments)

    @jax.jit
    def both(q, k, v, dout):
        attend = partial(function, window=window, softcap=softcap, scale=SCALE)
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, used), q, k, v)
        return (out, *pull(dout))

    got = both(q, k, v, dout)
    args = (np.asarray(x, np.float64) for x in (q, k, v))
    want, _, grads = naive_attention(
        *args, seen_BTS(segments, window), scale=SCALE, softcap=softcap, dout_BTHK=np.asarray(dout, np.float64)
    )
    assert got[0].dtype == q.dtype and all(bool(jnp.isfinite(g).all()) for g in got)
    real = np.asarray(segments > 0)[:, :, None, None]
    pairs = zip(got, (want, *grads), strict=True)
    return max(np.abs(np.where(real, np.asarray(g, np.float64) - w, 0)).max() for g, w in pairs)


splash_on_cpu = partial(splash_attention, interpret=True)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_reference_is_attention(case):
    assert largest_error(reference_attention, 100, *case) < 2e-5  # two blocks of queries, of 64 and 36


@pytest.mark.parametrize("case", [CASES["plain"], CASES["all"]], ids=["plain", "all"])
def test_long_rows_are_computed_in_pieces_with_the_same_result(monkeypatch, case):
    monkeypatch.setattr(reference, "CHUNK", 48)
    assert largest_error(reference_attention, 130, *case) < 2e-5


@pytest.mark.parametrize("case", [CASES["plain"], CASES["one key head"], CASES["all"]], ids=["plain", "mqa", "all"])
def test_splash_is_attention(case):
    assert largest_error(splash_on_cpu, 128, *case) < 2e-5


def test_bfloat16_differs_by_its_rounding_alone():
    assert largest_error(reference_attention, 100, *CASES["all"], dtype=jnp.bfloat16) < 0.06


@pytest.mark.parametrize("function", [reference_attention, splash_on_cpu], ids=["reference", "splash"])
@pytest.mark.parametrize(
    "twin",
    [
        {"twin_segments": lambda s: jnp.ones_like(s)},
        {"twin_segments": lambda s: jnp.roll(s, 1, axis=1)},
        {"window": 36},
        {"softcap": 0.0},
    ],
    ids=["no boundaries", "boundaries one token late", "window one token short", "no soft cap"],
)
def test_a_perturbed_twin_differs(function, twin):
    H, G, window, softcap = CASES["all"]
    kwargs = {k: v for k, v in twin.items() if k != "twin_segments"}
    perturbed = lambda *args, **given: function(*args, **{**given, **kwargs})  # noqa: E731
    assert largest_error(perturbed, 128, H, G, window, softcap, twin_segments=twin.get("twin_segments")) > 0.01


def test_memory_of_long_rows_is_bounded():
    """Four times the length takes at most about four times the memory, not sixteen."""

    def temporaries(T):
        q, k = (jax.ShapeDtypeStruct((1, T, heads, 8), jnp.float32) for heads in (2, 1))
        segments = jax.ShapeDtypeStruct((1, T), jnp.int32)
        loss = lambda *args: reference_attention(*args, window=None, softcap=0.0, scale=1.0).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, segments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 5 * temporaries(2048)


@pytest.mark.parametrize("shape", [(2, 1, 2, 1, 1, 2), (1, 1, 8, 1, 1, 1), (1, 1, 1, 1, 1, 1)], ids=str)
def test_sharded_equals_unsharded(shape):
    q, k, v, dout, segments = inputs(100, 4, 2, B=8)
    attend = partial(attention, window=37, softcap=0.0, implementation="reference")

    @jax.jit
    def both(q, k, v, dout, segments):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segment_ids_BT=segments), q, k, v)
        return (out, *pull(dout))

    want = both(q, k, v, dout, segments)
    mesh = jax.make_mesh(
        shape, ("data", "stage", "fsdp", "expert", "context", "tensor"), axis_types=(AxisType.Explicit,) * 6,
        devices=jax.devices()[: int(np.prod(shape))],
    )
    with jax.set_mesh(mesh):
        rows = P(("data", "fsdp"), None)
        heads = NamedSharding(mesh, P(*rows, "tensor", None))
        placed = [jax.device_put(x, heads) for x in (q, k, v, dout)]
        got = both(*placed, jax.device_put(segments, NamedSharding(mesh, rows)))
        assert all(g.sharding.is_equivalent_to(heads, 4) for g in got)
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="whole rows"):
            attend(jax.device_put(q, NamedSharding(mesh, P(None, "data"))), k, v, segment_ids_BT=segments)


def choose(requested, platform, **changes):
    given = {"head_dim": 64, "seq_len": 4096, "softcap": 0.0, "compute_dtype": "bfloat16", **changes}
    return choose_attention(requested, platform=platform, **given)


def test_auto_takes_the_fast_path_or_says_why_not():
    assert [choose("auto", p)[0] for p in ("cpu", "gpu", "tpu")] == ["reference", "cudnn", "splash"]
    assert [choose("reference", p)[0] for p in ("cpu", "gpu", "tpu")] == ["reference"] * 3
    for platform, change, word in [
        ("gpu", {"compute_dtype": "float32"}, "precision.recipe"),
        ("gpu", {"softcap": 30.0}, "model.attention_softcap=30.0"),
        ("gpu", {"head_dim": 100}, "model.head_dim"),
        ("tpu", {"seq_len": 1000}, "train.seq_len"),
        ("gpu", {"seq_len": 1000, "deterministic": True}, "compute.deterministic"),
    ]:
        name, reason = choose("auto", platform, **change)
        assert name == "reference" and word in reason and "is not used because" in reason


def test_a_deterministic_run_on_a_gpu_has_its_own_backward_pass():
    chosen = [choose(requested, p, deterministic=True)[0] for requested, p in (
        ("auto", "gpu"), ("cudnn", "gpu"), ("auto", "tpu"), ("auto", "cpu"))]
    assert chosen == ["cudnn_deterministic", "cudnn_deterministic", "splash", "reference"]


@pytest.mark.parametrize(
    ("requested", "platform", "change"),
    [("cudnn", "cpu", {}), ("splash", "gpu", {}), ("cudnn", "gpu", {"softcap": 1.0}), ("splash", "tpu", {"seq_len": 9})]
)
def test_a_request_that_cannot_be_honoured_names_the_field(requested, platform, change):
    with pytest.raises(ConfigError, match=f"^compute.attention='{requested}' cannot run: .*set it to 'auto'"):
        choose(requested, platform, **change)


def test_an_unknown_implementation_is_an_error():
    q, k, v, _, segments = inputs(16, 2, 2)
    with pytest.raises(ValueError, match="'flash' is not one of"):
        attention(q, k, v, segment_ids_BT=segments, window=None, softcap=0.0, implementation="flash")
