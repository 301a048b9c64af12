"""Norms, feed-forward, head and precision against the formulas in numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxlm.config import ModelConfig, PrecisionConfig
from maxlm.model import make_transformer
from maxlm.model.mlp import MLP, gated
from maxlm.model.norm import RMSNorm
from maxlm.numerics import FLOAT32, numerics_of
from tests.model.tiny_model import DEFAULTS, furthest, hidden, tiny_model, tokens_of


def rms(x, gain, eps=1e-5):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * np.asarray(gain)


def test_norm_is_the_formula_and_float32_inside():
    norm = RMSNorm(8, 1e-5)
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32) * 3
    assert furthest(norm(jnp.asarray(x)), rms(x, 1.0)) < 1e-6
    large = jnp.full((1, 1, 8), 3e38, jnp.bfloat16) * 0.5
    assert norm(large).dtype == jnp.bfloat16


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    """The tanh form (Hendrycks & Gimpel, arXiv:1606.08415, section 2)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(("activation", "curve"), [("swiglu", silu), ("geglu", gelu), ("gelu", gelu)])
def test_feed_forward_is_the_formula(activation, curve):
    config = ModelConfig(**DEFAULTS | dict(activation=activation))
    mlp = MLP(config, config.mlp_dim, nnx.Rngs(params=jax.random.key(0)))
    x = np.random.default_rng(0).normal(size=(1, 4, 16)).astype(np.float32)
    up, down = np.asarray(mlp.up[...]), np.asarray(mlp.down[...])
    if activation == "gelu":
        assert mlp.gate is None
        assert furthest(mlp(jnp.asarray(x), FLOAT32), curve(x @ up) @ down) < 1e-5
        return
    gate = np.asarray(mlp.gate[...])
    assert furthest(mlp(jnp.asarray(x), FLOAT32), curve(x @ gate) * (x @ up) @ down) < 1e-5
    assert furthest(mlp(jnp.asarray(x), FLOAT32), curve(x @ up) * (x @ gate) @ down) > 0.1


@pytest.mark.parametrize("activate", [jax.nn.silu, jax.nn.gelu])
def test_the_gate_has_the_gradient_of_its_formula(activate):
    gate, up, weight = jax.random.normal(jax.random.key(0), (3, 4, 5))
    loss = lambda product: lambda g, u: jnp.sum(weight * product(g, u))  # noqa: E731
    got = jax.grad(loss(functools.partial(gated, activate)), argnums=(0, 1))(gate, up)
    expected = jax.grad(loss(lambda g, u: activate(g) * u), argnums=(0, 1))(gate, up)
    assert max(map(furthest, got, expected)) < 1e-6 < furthest(got[0], expected[1])


@pytest.mark.parametrize("placement", ["pre", "post", "both"])
def test_norms_are_where_the_placement_says(placement):
    model = tiny_model(norm_placement=placement)
    tokens = tokens_of(1, 6)
    x = np.asarray(model.embedding[...])[np.asarray(tokens)]
    turn = _turn(model, tokens)
    before, after = placement in ("pre", "both"), placement in ("post", "both")
    for index in range(2):
        (block,) = jax.tree.map(lambda leaf, index=index: leaf[index], model.stacks("layers"))
        for name, sublayer in (
            ("attention", lambda h, b=block: b.attention(h, turn, jnp.ones_like(tokens), FLOAT32)),
            ("mlp", lambda h, b=block: b.mlp(h, FLOAT32)),
        ):
            norm, post_norm = getattr(block, f"{name}_norm"), getattr(block, f"{name}_post_norm")
            assert (norm is not None, post_norm is not None) == (before, after)
            h = rms(x, norm.gain[...]) if before else x
            h = np.asarray(sublayer(jnp.asarray(h, jnp.float32)))
            x = x + (rms(h, post_norm.gain[...]) if after else h)
    assert furthest(hidden(model, tokens), rms(x, model.final_norm.gain[...])) < 2e-5


def _turn(model, tokens):
    from maxlm.model.rope import rotation

    return rotation(model.config.rope, model.config.head_dim, jnp.arange(tokens.shape[1])[None])


def test_a_tied_head_is_the_embedding():
    tied, untied = tiny_model(tie_embeddings=True), tiny_model(tie_embeddings=False)
    assert tied.head is None and tied.head_weight is tied.embedding
    assert furthest(untied.head_weight[...], untied.embedding[...]) > 0.1
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 16)), jnp.float32)
    for model, weight in ((tied, tied.embedding), (untied, untied.head)):
        assert furthest(model.logits(x), np.asarray(x) @ np.asarray(weight[...]).T) < 1e-4


def test_logits_are_capped():
    model = tiny_model(logit_softcap=2.0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 16)), jnp.float32)
    scores = np.asarray(x) @ np.asarray(model.embedding[...]).T
    assert furthest(model.logits(x), 2 * np.tanh(scores / 2)) < 1e-5


def test_init_is_scaled_by_depth():
    """GPT-2, section 2.3: what adds to the residual stream starts smaller by the root of its number."""
    model = make_transformer(ModelConfig(**DEFAULTS | dict(hidden_dim=64, mlp_dim=128, num_layers=8, init_std=0.02)),
                             jax.random.key(0))
    spread = lambda p: float(jnp.std(p[...]))  # noqa: E731
    blocks = model.layers_0
    for inner in (model.embedding, blocks.attention.qkv, blocks.mlp.gate, blocks.mlp.up):
        assert spread(inner) == pytest.approx(0.02 * 0.9866, rel=0.03)  # truncation at three deviations takes 1.3%
    for outer in (blocks.attention.out, blocks.mlp.down):
        assert spread(outer) == pytest.approx(0.02 * 0.9866 / 4, rel=0.03)


def test_bf16_computes_in_bf16_and_keeps_float32_masters():
    model = make_transformer(ModelConfig(**DEFAULTS), jax.random.key(0), numerics=numerics_of(PrecisionConfig()))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {"float32"}
    tokens = tokens_of(1, 4)
    out = jax.eval_shape(lambda m: m(tokens, tokens, tokens), model)
    assert out.dtype == jnp.bfloat16
    gradient = jax.eval_shape(jax.grad(lambda m: m(tokens, tokens, tokens).astype(jnp.float32).sum()), model)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {"float32"}
    assert model.logits(jnp.zeros((1, 1, 16), jnp.bfloat16)).dtype == jnp.float32
