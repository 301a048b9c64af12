"""Sampling text from a model, one token at a time, with a cache of keys and values."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from maxlm.model.transformer import Transformer


@functools.partial(jax.jit, static_argnames=("num_tokens", "temperature", "top_k", "top_p"))
def sample(model: Transformer, prompt_BT: jax.Array, key: jax.Array, *, num_tokens: int, temperature: float = 1.0,
           top_k: int = 0, top_p: float = 1.0) -> jax.Array:
    """`num_tokens` new tokens after each prompt, int32 [B, num_tokens]. Equal keys give equal samples.

    temperature 0 takes the likeliest token; top_k keeps that many (0: all); top_p keeps the likeliest tokens whose
    probability first reaches it (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751). The model must live on
    one device with no mesh installed.
    """
    batch, length = prompt_BT.shape
    cache = model.empty_cache(batch, length + num_tokens)
    x_BTD, cache = model.decode(prompt_BT, cache, jnp.int32(0))
    pick = functools.partial(choose, temperature=temperature, top_k=top_k, top_p=top_p)

    def advance(carry, step_key):
        x_BTD, cache, position = carry
        token_B = pick(model.logits(x_BTD[:, -1:])[:, 0], step_key)
        x_BTD, cache = model.decode(token_B[:, None], cache, position)
        return (x_BTD, cache, position + 1), token_B

    start = (x_BTD[:, -1:], cache, jnp.int32(length))
    _, tokens_TB = jax.lax.scan(advance, start, jax.random.split(key, num_tokens))
    return tokens_TB.T


def choose(logits_BV: jax.Array, key: jax.Array, *, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """One token a row, int32 [B]."""
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / temperature
    if top_k:
        kth_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if top_p < 1:
        ordered_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        before_BV = jnp.cumsum(jax.nn.softmax(ordered_BV, axis=-1), axis=-1) - jax.nn.softmax(ordered_BV, axis=-1)
        kept_BV = jnp.where(before_BV < top_p, ordered_BV, jnp.inf)
        logits_BV = jnp.where(logits_BV < jnp.min(kept_BV, axis=-1, keepdims=True), -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)
