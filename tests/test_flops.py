"""Counts against published sizes, the model's own arrays, the peers' table and XLA's cost analysis."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from maxlm.config import ModelConfig
from maxlm.flops import (
    forward_flops_per_token,
    mean_visible_keys,
    parameter_count,
    training_flops_per_token,
    training_flops_per_token_full_attention,
)
from maxlm.model import make_transformer
from maxlm.training.loss import summed_loss

LLAMA = ModelConfig(vocab_size=128_256, num_heads=32, num_kv_heads=8)
LLAMA_1B = dataclasses.replace(LLAMA, num_layers=16, hidden_dim=2048, num_heads=32, head_dim=64, mlp_dim=8192)
LLAMA_3B = dataclasses.replace(LLAMA, num_layers=28, hidden_dim=3072, num_heads=24, head_dim=128, mlp_dim=8192)
LLAMA_8B = dataclasses.replace(LLAMA, num_layers=32, hidden_dim=4096, num_heads=32, head_dim=128, mlp_dim=14_336,
                               tie_embeddings=False)
LLAMA_70B = dataclasses.replace(LLAMA, num_layers=80, hidden_dim=8192, num_heads=64, head_dim=128, mlp_dim=28_672,
                                tie_embeddings=False)


@pytest.mark.parametrize(
    "model, published",
    [(LLAMA_1B, 1_235_814_400), (LLAMA_3B, 3_212_749_824), (LLAMA_8B, 8_030_261_248), (LLAMA_70B, 70_553_706_496)],
)
def test_totals_are_the_published_ones(model, published):
    assert parameter_count(model).total == published
    assert parameter_count(dataclasses.replace(model, mlp_dim=model.mlp_dim + 1)).total != published


SMALL = ModelConfig(num_layers=2, hidden_dim=256, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=1024,
                    vocab_size=512)
VARIANTS = {
    "swiglu": SMALL,
    "gelu, untied": dataclasses.replace(SMALL, activation="gelu", tie_embeddings=False),
    "geglu, QK-norm": dataclasses.replace(SMALL, activation="geglu", qk_norm=True),
    "post-norm": dataclasses.replace(SMALL, norm_placement="post"),
    "both norms": dataclasses.replace(SMALL, norm_placement="both", qk_norm=True, tie_embeddings=False),
    "local/global": dataclasses.replace(SMALL, layer_pattern=("local", "global"), sliding_window=32),
}


def build(model):
    return make_transformer(model, jax.random.key(0), unroll="all")


@pytest.mark.parametrize("model", VARIANTS.values(), ids=VARIANTS.keys())
def test_totals_are_those_of_the_arrays(model):
    arrays = jax.tree.leaves(jax.eval_shape(lambda: build(model)))
    assert sum(a.size for a in arrays) == parameter_count(model).total


def square_attention(q_BTHK, k_BSGK, v_BSGK, **_):
    """Stands in for the kernels, which skip some of what the mask hides: multiplies exactly the whole square."""
    group = q_BTHK.shape[2] // k_BSGK.shape[2]
    k_BSHK, v_BSHK = (jnp.repeat(x, group, axis=2) for x in (k_BSGK, v_BSGK))
    scores_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores_BHTS), v_BSHK)


def xla_training_flops(model, rows, seq_len):
    """What XLA counts in the gradient of the loss. Unrolled, because it counts a loop's body once; of the program as
    traced, because compiled CPU programs hide products in custom calls."""
    shape = jax.ShapeDtypeStruct((rows, seq_len), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), shape)

    def loss(transformer, batch):
        return summed_loss(transformer, batch, z_loss=0.0, chunks=1)[0].loss

    step = jax.jit(jax.grad(loss, allow_int=True))
    return step.lower(jax.eval_shape(lambda: build(model)), batch).cost_analysis()["flops"]


@pytest.mark.parametrize("name", ["swiglu", "gelu, untied", "local/global"])
def test_the_count_is_xlas_within_three_percent(name, monkeypatch):
    monkeypatch.setattr("maxlm.model.attention.attention", square_attention)
    model, rows, seq_len = VARIANTS[name], 2, 256
    counted = xla_training_flops(model, rows, seq_len) / (rows * seq_len)
    # The whole square is multiplied here: add the pairs that a causal mask and a window hide, which we do not count.
    repeats = model.num_layers // len(model.layer_pattern)
    hidden_pairs = repeats * sum(
        seq_len - mean_visible_keys(seq_len, model.sliding_window if kind == "local" else seq_len)
        for kind in model.layer_pattern
    )
    ours = training_flops_per_token(model, seq_len) + 12 * model.num_heads * model.head_dim * hidden_pairs
    assert ours == pytest.approx(training_flops_per_token_full_attention(model, seq_len))
    assert counted == pytest.approx(ours, rel=0.03)
    # Twins that must fail: a forgotten head, a third MLP matrix too few, attention's square left at half.
    table = 6 * model.vocab_size * model.hidden_dim
    matrix = 6 * model.num_layers * model.hidden_dim * model.mlp_dim
    for wrong in (ours - table, ours - matrix, ours + matrix, training_flops_per_token(model, seq_len)):
        assert counted != pytest.approx(wrong, rel=0.03)


@pytest.mark.parametrize(
    "model, tokens_per_second, mfu",
    [
        (LLAMA_1B, 62_963, 0.575),
        (LLAMA_3B, 21_539, 0.512),
    ],
)
def test_the_full_attention_convention_gives_the_peers_mfu(model, tokens_per_second, mfu):
    flops = training_flops_per_token_full_attention(model, 4096)
    assert tokens_per_second * flops / 989e12 == pytest.approx(mfu, abs=0.0006)


def test_visible_keys_are_counted_exactly():
    for seq_len, window in ((1, 1), (7, 3), (8, 8), (8, 100), (64, 1)):
        exact = sum(min(t + 1, window) for t in range(seq_len)) / seq_len
        assert mean_visible_keys(seq_len, window) == exact


def test_attention_is_halved_and_training_is_three_forwards():
    model, seq_len = LLAMA_1B, 4096
    forward, dense = forward_flops_per_token(model, seq_len), 2 * parameter_count(model).matmul
    square = 4 * model.num_layers * model.num_heads * model.head_dim * seq_len
    assert (forward - dense) / square == pytest.approx(0.5, rel=1e-3)
    assert training_flops_per_token(model, seq_len) == 3 * forward
    windowed = dataclasses.replace(model, layer_pattern=("local",), sliding_window=1024)
    assert forward_flops_per_token(windowed, seq_len) < forward
