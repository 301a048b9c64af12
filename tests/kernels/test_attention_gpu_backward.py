"""The deterministic backward kernels, interpreted on a CPU, against gradients written out in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
from naive_attention import naive_attention, seen_BTS

from maxlm.kernels.attention.gpu_backward import attention_backward, visible

SCALE = 0.3


def largest_error(T, H, G, window, *, K=16, used_segments=None, used_window=None):
    """Over all three gradients at real tokens; `used_*` computes with other boundaries than are expected."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.normal(size=(2, T, heads, K)) for heads in (H, G, G, H))
    segments = np.sort(rng.integers(1, 4, size=(2, T)), axis=1)
    segments[-1, -T // 5 :] = 0
    dout *= (segments > 0)[:, :, None, None]
    out, lse, want = naive_attention(q, k, v, seen_BTS(segments, window), scale=SCALE, dout_BTHK=dout)
    used = segments if used_segments is None else used_segments(segments)
    arrays = (jnp.asarray(x, jnp.float32) for x in (q, k, v, out, lse, dout))
    got = attention_backward(*arrays, jnp.asarray(used, jnp.int32), window=used_window or window, scale=SCALE,
                             interpret=True)
    real = (segments > 0)[:, :, None, None]
    assert all(bool(jnp.isfinite(g).all()) for g in got)
    return max(np.abs(np.where(real, np.asarray(g) - w, 0)).max() for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("T", "H", "G", "window", "K"),
    [(256, 2, 2, None, 16), (192, 4, 2, None, 16), (128, 4, 1, 37, 24)],
    ids=["plain", "grouped, narrow blocks", "window, padded depth"],
)
def test_gradients_are_attentions(T, H, G, window, K):
    assert largest_error(T, H, G, window, K=K) < 2e-5


@pytest.mark.parametrize(
    "twin",
    [{"used_segments": np.ones_like}, {"used_segments": lambda s: np.roll(s, 1, axis=1)}, {"used_window": 36}],
    ids=["no boundaries", "boundaries one token late", "window one token short"],
)
def test_a_perturbed_twin_differs(twin):
    assert largest_error(128, 2, 1, 37, **twin) > 0.01


def test_what_a_token_sees_and_is_seen_by_is_a_range():
    low, high = visible(jnp.asarray([[1, 1, 1, 2, 2, 0, 0, 0]]), None)
    assert (low[0].tolist(), high[0].tolist()) == ([0, 0, 0, 3, 3, 5, 5, 5], [3, 3, 3, 5, 5, 8, 8, 8])
    low, high = visible(jnp.asarray([[1, 1, 1, 2, 2, 0, 0, 0]]), 2)
    assert (low[0].tolist(), high[0].tolist()) == ([0, 0, 1, 3, 3, 5, 5, 6], [2, 3, 3, 5, 5, 7, 8, 8])
