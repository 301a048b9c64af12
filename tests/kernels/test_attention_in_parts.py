"""Attention over rows that `context` splits, in a ring and with gathered keys, against attention in numpy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from naive_attention import naive_attention, seen_BTS
from test_attention import CASES, SCALE, choose, inputs

from maxlm.config import AXES
from maxlm.kernels.attention import attention, choose_across, parts, ring, tpu
from maxlm.parallel.context import balanced_order, natural_order, row_order, token_index
from maxlm.parallel.sharding import BATCH
from maxlm.schema import ConfigError

ROUNDING = 5e-6


def mesh_of(context, fsdp=2):
    shape = [{"context": context, "fsdp": fsdp}.get(axis, 1) for axis in AXES]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES),
                         devices=jax.devices()[: context * fsdp])


def on(mesh, x):
    return jax.device_put(x, NamedSharding(mesh, P(BATCH, "context", *(None,) * (x.ndim - 2))))


def largest_error(across, context, T, case, implementation="reference", used_segments=lambda s: s):
    """Over values and gradients at real tokens."""
    H, G, window, softcap = CASES[case]
    q, k, v, dout, segments = inputs(T, H, G)

    @jax.jit
    def both(q, k, v, dout, segments):
        q, k, v, dout, segments = balanced_order((q, k, v, dout, segments))
        attend = functools.partial(attention, segment_ids_BT=segments, window=window, softcap=softcap, scale=SCALE,
                                   implementation=implementation, across=across)
        out, pull = jax.vjp(attend, q, k, v)
        return (out, *pull(dout))

    mesh = mesh_of(context)
    with jax.set_mesh(mesh):
        got = both(*(on(mesh, x) for x in (q, k, v, dout, used_segments(segments))))
        got = [np.asarray(x)[:, np.argsort(row_order(T, context))] for x in got]
    numbers = (np.asarray(x, np.float64) for x in (q, k, v))
    want, _, grads = naive_attention(*numbers, seen_BTS(segments, window), scale=SCALE, softcap=softcap,
                                     dout_BTHK=np.asarray(dout, np.float64))
    real = np.asarray(segments > 0)[:, :, None, None]
    return max(np.abs(np.where(real, g - w, 0)).max() for g, w in zip(got, (want, *grads), strict=True))


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(("across", "context", "T", "case"), [
    ("ring", 4, 48, "all"), ("all_gather", 4, 48, "all"), ("all_to_all", 2, 48, "all"),
    slow("ring", 2, 48, "grouped"), slow("ring", 2, 48, "all"), slow("ring", 4, 104, "plain"),
    slow("all_gather", 2, 48, "one key head"),
])
def test_rows_in_parts_are_attention(across, context, T, case):
    assert largest_error(across, context, T, case) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("across", ["ring", "all_gather"])
def test_many_queries_are_taken_in_pieces_with_the_same_result(across, monkeypatch):
    monkeypatch.setattr(parts, "CHUNK", 9)
    assert largest_error(across, 2, 104, "all") < ROUNDING


@pytest.mark.parametrize("case", [slow("all"), "one key head"])
def test_splash_serves_gathered_keys(case, monkeypatch):
    monkeypatch.setattr(tpu, "laid_out_kernel", functools.partial(tpu.laid_out_kernel, interpret=True))
    assert largest_error("all_gather", 2, 512, case, "splash") < ROUNDING


def test_keys_travel_in_the_loops_of_the_ring_and_are_never_gathered():
    """In the program that XLA is given for forward and backward: what it does in loops, and what outside."""

    def count(across):
        q, k, _, _, segments = inputs(48, 4, 2)
        mesh = mesh_of(4)
        with jax.set_mesh(mesh):
            loss = lambda q, k, v, s: attention(  # noqa: E731
                q, k, v, segment_ids_BT=s, window=None, softcap=0.0, implementation="reference", across=across).sum()
            text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*(on(mesh, x) for x in (q, k, k, segments))).as_text("hlo")
        outside = re.compile(r"^(ENTRY|.*manual_computation).*\{$", re.MULTILINE)
        bodies = [part for part in text.split("\n}\n") if not outside.search(part)]
        return sum(body.count("collective-permute(") for body in bodies), text.count("all-gather(")

    # Forward k, v and their segment ids; backward these and both gradients.
    assert count("ring") == (3 + 5, 0)
    assert count("all_gather") == (0, 3)


def chunk_late(device, length, ways):
    return token_index((device + 1) % ways, length, ways)


def one_passed_over(tree):
    ways = jax.lax.axis_size("context")
    return jax.lax.ppermute(tree, "context", [(device, (device + 2) % ways) for device in range(ways)])


@pytest.mark.parametrize("twin", ["no boundaries", slow("boundaries late"), slow("positions"), "a device passed over"])
def test_a_perturbed_twin_differs(twin, monkeypatch):
    used = {"no boundaries": jnp.ones_like, "boundaries late": lambda s: jnp.roll(s, 1, axis=1)}
    if twin == "positions":
        monkeypatch.setattr(ring, "token_index", chunk_late)
    if twin == "a device passed over":
        monkeypatch.setattr(ring, "_passed_on", one_passed_over)
    assert largest_error("ring", 4, 48, "all", used_segments=used.get(twin, lambda s: s)) > 0.01


@pytest.mark.parametrize("context", [2, 4, 8])
def test_each_device_has_an_early_chunk_and_the_late_one_that_mirrors_it(context):
    T, mesh = 4 * context, mesh_of(context, fsdp=1)
    row = jnp.arange(T, dtype=jnp.int32)[None]
    with jax.set_mesh(mesh):
        moved = np.asarray(jax.jit(balanced_order)(on(mesh, row)))[0]
    assert (moved == row_order(T, context)).all()
    for device, tokens in enumerate(moved.reshape(context, 4)):
        assert (tokens == token_index(device, 4, context)).all()
        assert tokens.sum() == 2 * T - 2  # as many keys to see as any other device
    assert (natural_order(jnp.asarray(moved)[None], context) == row).all()


def across(requested, platform, kernel="auto", **changes):
    sizes = {"seq_len": 4096, "kv_heads": 8} | changes
    chosen = choose(kernel, platform, seq_len=sizes["seq_len"])
    return choose_across(requested, *chosen, context=4, named=kernel != "auto", **sizes)


def test_auto_goes_the_way_in_which_the_fast_kernel_serves():
    assert across("auto", "tpu")[:2] == ("all_gather", "splash")
    assert across("auto", "gpu")[:2] == ("all_to_all", "cudnn")
    assert across("auto", "cpu")[:2] == ("ring", "reference")
    assert across("all_gather", "cpu")[:2] == ("all_gather", "reference")
    assert across("all_to_all", "tpu")[:2] == ("all_to_all", "splash")


@pytest.mark.parametrize(("requested", "platform", "changes", "way"), [
    ("ring", "tpu", {}, "ring"), ("ring", "gpu", {}, "ring"), ("all_gather", "gpu", {}, "all_gather"),
    ("auto", "gpu", {"kv_heads": 6}, "ring"), ("auto", "tpu", {"seq_len": 4096 - 512}, "ring")])
def test_plain_jax_says_why_it_is_not_the_fast_kernel(requested, platform, changes, way):
    chosen, kernel, reason = across(requested, platform, **changes)
    assert (chosen, kernel) == (way, "reference") and "is not used because" in reason and "4 devices" in reason


def test_what_cannot_run_as_asked_is_an_error():
    with pytest.raises(ConfigError, match="compute.attention='splash' cannot run with mesh.context=4"):
        across("ring", "tpu", "splash")
    with pytest.raises(ConfigError, match="compute.context_attention='all_to_all' cannot run: the 6 key heads"):
        across("all_to_all", "cpu", kv_heads=6)
