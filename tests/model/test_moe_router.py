"""The router's logits against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.model.moe import router

FAR = 1e-6  # float32 sums are nearer (4e-7), sums without the smallest parts are further (2.4e-6)


def errors(dtype):
    """How far logits and both gradients are from float64's."""
    rng = np.random.default_rng(0)
    draw = lambda dtype, *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    x, w, g = draw(jnp.bfloat16, 128, 512), draw(jnp.float32, 512, 8), draw(jnp.float32, 128, 8)
    logits, pull = jax.vjp(jax.jit(lambda x, w: router.router_logits(x, w)), x.astype(dtype), w)
    dx, dw = pull(g)
    assert (logits.dtype, dx.dtype, dw.dtype) == (jnp.float32, dtype, jnp.float32)
    x, w, g, *got = (np.asarray(a, np.float64) for a in (x, w, g, logits, dw, dx))
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, (x @ w, x.T @ g, g @ w.T), strict=True)]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_logits_are_exact_to_float32s_rounding(dtype):
    *exact, to_x = errors(dtype)
    assert max(exact) < FAR
    assert to_x < (2.0**-8 if dtype == jnp.bfloat16 else FAR)  # to x's rounding


def test_the_comparison_sees_a_missing_part(monkeypatch):
    """The twin of the test above."""
    parts = router._parts
    monkeypatch.setattr(router, "_parts", lambda a: (*parts(a)[:2], jnp.zeros_like(a, jnp.bfloat16)))
    assert min(errors(jnp.bfloat16)[:2]) > 2 * FAR
