"""The GPU path's bookkeeping, on the CPU: cuDNN's calls are replaced by what they are documented to compute."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive_attention import naive_attention, seen_BTS

from maxlm.kernels.attention import attention, gpu
from maxlm.kernels.attention.cudnn_call import Call

B, T, H, G, K = 2, 48, 4, 2, 8


class FakeCall(Call):
    """cuDNN's calls in numpy. A ragged batch is cut out of the flat tokens by its offsets and lengths alone;
    statistics beyond a sequence's length are NaN, and so is what no sequence covers."""

    def forward(self, q_BTHK, k_BSGK, v_BSGK, *extra):
        pieces = self._pieces((q_BTHK, k_BSGK, v_BSGK), extra)
        B = q_BTHK.shape[0]
        out, stats = np.full((B * T, H, K), np.nan), np.full((B * self.segments, H, T), np.nan)
        for n, first, last, arrays, bias in pieces:
            got, lse, _ = self._dense(arrays, bias)
            out[first:last], stats[n, :, : last - first] = got[0], lse[0]
        return jnp.asarray(out.reshape(B, T, H, K), jnp.float32), jnp.asarray(stats, jnp.float32)

    def backward(self, q_BTHK, k_BSGK, v_BSGK, out_BTHK, stats, dout_BTHK, *extra):
        B = q_BTHK.shape[0]
        grads = [np.full((B * T, heads, K), np.nan) for heads in (H, G, G)]
        pieces = self._pieces((q_BTHK, k_BSGK, v_BSGK, dout_BTHK, out_BTHK), extra)
        for n, first, last, (q, k, v, dout, kept), bias in pieces:
            out, lse, got = self._dense((q, k, v), bias, dout)
            np.testing.assert_allclose(kept, out, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(np.asarray(stats)[n, :, : last - first], lse[0], rtol=1e-4, atol=1e-5)
            for whole, piece in zip(grads, got, strict=True):
                whole[first:last] = piece[0]
        return tuple(jnp.asarray(g.reshape(B, T, -1, K), jnp.float32) for g in grads)

    def _pieces(self, arrays, extra):
        """(number, first token, last token, the arrays between, bias) of each sequence."""
        B = arrays[0].shape[0]
        flat = [np.asarray(x).reshape(1, B * T, *x.shape[2:]) for x in arrays]
        if self.segments == 1:
            bias = np.asarray(extra[0])[:, 0] if extra else np.zeros((B, 1, 1))
            cuts = [(n * T, n * T + T) for n in range(B)]
        else:
            bias, cuts = np.zeros((B * self.segments, 1, 1)), self._cuts(*map(np.asarray, extra))
        return [(n, a, b, [x[:, a:b] for x in flat], bias[n : n + 1]) for n, (a, b) in enumerate(cuts) if b > a]

    def _cuts(self, q_lengths, kv_lengths, q_offsets, kv_offsets):
        firsts, lengths = q_offsets.reshape(-1) // (H * K), q_lengths.reshape(-1)
        assert (firsts == kv_offsets.reshape(-1) // (G * K)).all() and (q_lengths == kv_lengths).all()
        assert (np.diff(firsts)[: lengths.size] == lengths).all(), "offsets are the running sum of the lengths"
        return [(int(first), int(first + length)) for first, length in zip(firsts, lengths, strict=False)]

    def _dense(self, arrays, bias, dout=None):
        seen = seen_BTS(np.zeros((1, arrays[0].shape[1])), self.window)
        return naive_attention(*arrays, seen, scale=self.scale, bias=bias, dout_BTHK=dout)


ROWS = {
    "a document a row": [[1] * 48, [1] * 30 + [0] * 18],
    "packed": [[1] * 20 + [2] * 27 + [3], [1] * 5 + [2] * 30 + [0] * 13],
    "more documents than compiled for": [list(range(1, 49)), [1] * 10 + [2] * 38],
}


@pytest.fixture
def eager_switch(monkeypatch):
    monkeypatch.setattr(gpu, "Call", FakeCall)
    monkeypatch.setattr(jax.lax, "switch", lambda index, branches: branches[int(index)]())


@pytest.mark.parametrize("workspace", [gpu.WORKSPACE, 1], ids=["at once", "row by row"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("kind", "rows"), list(enumerate(ROWS.values())), ids=list(ROWS))
def test_each_call_keeps_documents_apart(eager_switch, monkeypatch, kind, rows, window, workspace):
    monkeypatch.setattr(gpu, "WORKSPACE", workspace)
    segments = jnp.asarray(rows, jnp.int32)
    assert int(gpu.Documents(segments, 4).kind) == kind
    assert _largest_error(segments, window) < 1e-4


def test_a_part_with_more_documents_than_its_rows_may_have(eager_switch, monkeypatch):
    """Seven and one in two rows are few enough together, and too many for the first row alone."""
    monkeypatch.setattr(gpu, "WORKSPACE", 1)
    segments = jnp.asarray([[n // 7 + 1 for n in range(48)], [1] * 48], jnp.int32)
    assert [int(gpu.Documents(part, 4).kind) for part in (segments, segments[:1])] == [1, 2]
    assert _largest_error(segments, None) < 1e-4


def test_a_forgotten_boundary_shows(eager_switch, monkeypatch):
    """The perturbed twin: packed rows taken for whole ones."""
    monkeypatch.setattr(jax.lax, "switch", lambda index, branches: branches[0]())
    assert _largest_error(jnp.asarray(ROWS["packed"], jnp.int32), None) > 0.1


def _largest_error(segments, window):
    """Of values and gradients over real tokens, against naive attention."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(rng.normal(size=(B, T, heads, K)), jnp.float32) for heads in (H, G, G, H))
    real = np.asarray(segments > 0)[:, :, None, None]
    dout = dout * real
    out, pull = jax.vjp(lambda *qkv: gpu.cudnn_attention(*qkv, segments, window=window, scale=0.3, segments=4), q, k, v)
    want, _, grads = naive_attention(q, k, v, seen_BTS(segments, window), scale=0.3, dout_BTHK=dout)
    pairs = zip((out, *pull(dout)), (want, *grads), strict=True)
    return max(np.abs(np.where(real, np.asarray(g) - w, 0)).max() for g, w in pairs)


def test_the_calls_lower_for_cuda_without_a_gpu():
    """All three calls, forward and backward, with row-major operands: no transposes around them but free ones."""
    q, k = (jax.ShapeDtypeStruct((B, 128, heads, 64), jnp.bfloat16) for heads in (H, G))
    segments = jax.ShapeDtypeStruct((B, 128), jnp.int32)

    def traced(**kind):
        def loss(q, k, v, segments):
            return gpu.cudnn_attention(q, k, v, segments, window=None, scale=0.125, **kind).astype(jnp.float32).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, segments)

    text = traced().lower(lowering_platforms=("cuda",)).as_text()
    for name in ("Softmax", "ScaleBiasSoftmax", "SoftmaxBackward", "ScaleBiasSoftmaxBackward"):
        assert f"@__cudnn$fmha{name}(" in text
    calls = [str(traced(deterministic=kind).jaxpr) for kind in (False, True)]
    found = [("fmhaSoftmaxBackward" in text, "attention_dkv" in text) for text in calls]
    assert found == [(True, False), (False, True)]
    config = Call(0.125, 32, segments=4)._config(q, k, backward=False)["cudnn_fmha_backend_config"]
    assert json.loads(json.dumps(config)) == config
    assert (config["mask_type"], config["max_seg_per_batch"]) == ("PADDING_CAUSAL", 4)
    assert config["sliding_window_length"] == 32


@pytest.mark.parametrize(("names", "runs"), [(("attention",), 1), ((), 2)], ids=["saved by name", "nothing saved"])
def test_a_remat_policy_that_saves_attention_does_not_run_it_again(names, runs):
    q, k = (jax.ShapeDtypeStruct((B, 128, heads, 64), jnp.bfloat16) for heads in (H, G))
    segments = jax.ShapeDtypeStruct((B, 128), jnp.int32)

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*names))
    def layer(q, k, v, segments):
        out = attention(q, k, v, segment_ids_BT=segments, window=None, softcap=0.0, implementation="cudnn")
        return (2 * out.astype(jnp.float32)).sum()

    text = jax.jit(jax.value_and_grad(layer)).trace(q, k, k, segments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaScaleBiasSoftmax(") == runs
