"""Generation: the cache gives what the full forward gives, and sampling keeps its promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.model.decode import choose, sample
from tests.model.tiny_model import furthest, hidden, tiny_model, tokens_of

LENGTH = 12
MODELS = {
    "local layers": dict(layer_pattern=("local", "global"), sliding_window=4),
    "all local, QK-norm, both caps": dict(layer_pattern=("local",), sliding_window=3, qk_norm=True,
                                          attention_softcap=1.5, logit_softcap=3.0),
    "post-norm, YaRN": dict(norm_placement="post", rope=dict(scaling="yarn", factor=4.0, original_max_len=16)),
}


@jax.jit
def advance(model, tokens, cache, start):
    return model.decode(tokens, cache, start)


def in_pieces(model, tokens, sizes):
    """Hidden states by `decode` over consecutive pieces of these sizes."""
    cache, start, parts = model.empty_cache(*tokens.shape), 0, []
    for size in sizes:
        x, cache = advance(model, tokens[:, start : start + size], cache, jnp.int32(start))
        parts.append(np.asarray(x))
        start += size
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("name", MODELS)
def test_decoding_equals_the_full_forward_at_every_position(name):
    model, tokens = tiny_model(**MODELS[name]), tokens_of(2, LENGTH)
    got = in_pieces(model, tokens, (5, *[1] * (LENGTH - 5)))
    assert furthest(got, hidden(model, tokens)) < 2e-5
    twin = tiny_model(**MODELS[name] | dict(sliding_window=5, attention_softcap=0.7))
    assert furthest(got, hidden(twin, tokens)) > 1e-3, "the comparison sees another window or cap"


def test_greedy_sampling_is_the_full_forward_over_and_over():
    model, prompt = tiny_model(**MODELS["local layers"]), tokens_of(2, 5)
    got = sample(model, prompt, jax.random.key(0), num_tokens=6, temperature=0.0)
    row, expected = np.asarray(prompt), []
    for _ in range(6):
        padded = jnp.asarray(np.pad(row, ((0, 0), (0, 11 - row.shape[1]))))
        x = hidden(model, padded)[:, row.shape[1] - 1 : row.shape[1]]
        expected.append(np.asarray(model.logits(jnp.asarray(x))).argmax(-1))
        row = np.concatenate([row, expected[-1]], axis=1)
    assert np.asarray(got).tolist() == np.concatenate(expected, axis=1).tolist()


def test_seeds_decide_the_sample():
    model, prompt = tiny_model(), tokens_of(1, 4)
    draw = lambda seed: np.asarray(sample(model, prompt, jax.random.key(seed), num_tokens=16)).tolist()  # noqa: E731
    assert draw(0) == draw(0) != draw(1)


def picks(**how):
    """How often each token of one row of logits is chosen in 4,000 draws."""
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]]))
    settings = dict(temperature=1.0, top_k=0, top_p=1.0) | how
    many = jax.vmap(lambda key: choose(logits, key, **settings)[0])(jax.random.split(jax.random.key(0), 4000))
    return np.bincount(np.asarray(many), minlength=4) / 4000


@pytest.mark.parametrize("how", [dict(temperature=0), dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-3)], ids=str)
def test_what_takes_the_likeliest_token(how):
    assert picks(**how).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(("how", "expected"), [
    ({}, [0.4, 0.3, 0.2, 0.1]),
    (dict(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    (dict(top_k=2), [4 / 7, 3 / 7, 0, 0]),
    (dict(top_k=99), [0.4, 0.3, 0.2, 0.1]),
    (dict(top_p=0.6), [4 / 7, 3 / 7, 0, 0]),  # 0.4 is short of 0.6, 0.7 reaches it
    (dict(top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
], ids=str)
def test_frequencies_follow_the_truncated_distribution(how, expected):
    assert furthest(picks(**how), expected) < 0.03
