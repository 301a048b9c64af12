"""The decoder: embedding, a loop over stacked layers, final norm, output head.

Layers are stored stacked. With a layer pattern of n kinds, `layers_j` stacks layers j, j+n, j+2n, ...: the loop
runs over repeats of the pattern, and can scan, unroll or partly unroll the same parameters. On a mesh with stages these
stacks are split over them (parallel/pipeline.py), dense layers before sparse ones apart: those are computed like the
embedding, with the batch split over the stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.config import ModelConfig
from maxlm.kernels.embedding import embedding_lookup
from maxlm.model.attention import Cache
from maxlm.model.block import PLAIN, Block, Kernels
from maxlm.model.moe.load import Load
from maxlm.model.norm import RMSNorm
from maxlm.model.parameter import matrix
from maxlm.model.parametrization import multipliers
from maxlm.model.rope import Rotation, rotation
from maxlm.numerics import FLOAT32, Numerics
from maxlm.parallel.pipeline import Pipeline, Place, num_stages, pipelined
from maxlm.parallel.sharding import BATCH, unstack, use

STAGED = "layers"  # the part of the layers that stages of a pipeline share

# What policies keep beside the layer's input, by the names that the layers give. (JAX's own policies for products see
# none: ours have gradients of their own.)
_NAMES = {"names": ("attention", "mlp_up"), "dots": ("attention", "mlp_up", "product")}
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    **{policy: jax.checkpoint_policies.save_only_these_names(*names) for policy, names in _NAMES.items()},
    **{policy: jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["layer_input", *names],
        offload_src="device", offload_dst="pinned_host",
    ) for policy, names in (("full_offload", ()), ("names_offload", _NAMES["names"]))},
}

# What a tick of the pipeline keeps of its layers, beside what these keep for themselves.
_WEIGHTS = ("dynamic_slice", "squeeze", "convert_element_type", "reshard")  # by which a weight comes to its product
TICK_POLICIES = {
    **REMAT_POLICIES,
    "none": lambda primitive, *_, **__: primitive.name not in _WEIGHTS,
    "full": jax.checkpoint_policies.save_only_these_names("layer_input"),
    **{policy: jax.checkpoint_policies.save_only_these_names("layer_input", *names)
       for policy, names in _NAMES.items()},
    "stage": jax.checkpoint_policies.nothing_saveable,
}


class Span(NamedTuple):
    """A run of layers that are computed alike: layers [first, last) of the stack `part`."""

    part: str
    first: int
    last: int
    stacks: tuple[Block, ...]
    numerics: Numerics


class Transformer(nnx.Module):
    """tokens [B, T] -> final hidden states [B, T, D]. The head's product is in the loss (kernels/cross_entropy)
    or in `logits`, so that float32 logits of a whole batch never exist."""

    def __init__(self, config: ModelConfig, *, kernels: Kernels, numerics: Numerics, remat: str, unroll: int | str,
                 pipeline: Pipeline, rngs: nnx.Rngs):
        table = (config.vocab_size, config.hidden_dim)
        self.embedding = matrix(rngs, table, ("vocab", "embed"), config.init_std)
        for name, (first, last) in self._parts(config).items():
            for j, kind in enumerate(config.layer_pattern):
                keys = jax.random.split(rngs.params(), (last - first) // len(config.layer_pattern))
                sparse = name == STAGED and config.num_experts > 0
                block = lambda key, kind=kind, sparse=sparse: Block(  # noqa: E731
                    config, kind, sparse, kernels, nnx.Rngs(key))
                stack = jax.vmap(block)(keys)
                setattr(self, f"{name}_{j}", _staged(stack) if name == STAGED else stack)
        self.final_norm = RMSNorm(config.hidden_dim, config.norm_eps)
        self.head = None if config.tie_embeddings else matrix(rngs, table, ("vocab", "embed"), config.init_std)
        self.config = config
        self.numerics = numerics
        self.remat = remat
        self.unroll = unroll
        self.pipeline = pipeline

    @property
    def head_weight(self) -> nnx.Param:
        """The output matrix, [V, D]: the embedding where they are tied."""
        return self.embedding if self.head is None else self.head

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        return self.hidden(self.embed(tokens_BT), positions_BT, segment_ids_BT)[0]

    def hidden(self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array,
               key: jax.Array | None = None) -> tuple[jax.Array, Load | None]:
        """Final hidden states [B, T, D] of embedded tokens (where `context` splits their rows, in the `balanced_order`
        of parallel/context.py), and what the routers did, stacked over the sparse layers (None where there are none).
        key: for what is random in training."""
        turn = rotation(self.config.rope, self.config.head_dim, positions_BT)
        loads = []
        for span in self._spans():
            if span.part == STAGED and num_stages() > 1:
                x_BTD, load = self._through_stages(span, x_BTD, positions_BT, segment_ids_BT, key)
            else:
                keys = _layer_keys(key, jnp.arange(span.first, span.last), len(span.stacks))
                x_BTD, load = self._through(span.stacks, keys, x_BTD, turn, segment_ids_BT, span.numerics)
            if load is not None:  # [repeats, place in the pattern, ...] -> [sparse layers, ...]
                loads.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), load))
        return self._finished(x_BTD), jax.tree.map(lambda *a: jnp.concatenate(a), *loads) if loads else None

    def _through_stages(self, span: Span, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array,
                        key: jax.Array | None) -> tuple[jax.Array, Load | None]:
        """A span in the pipeline. Each microbatch has its own key, and weighs in the load by its tokens."""
        mesh, places = jax.sharding.get_abstract_mesh(), len(span.stacks)
        ways = math.prod(mesh.shape[axis] for axis in BATCH) // num_stages()
        count = self.pipeline.count(x_BTD.shape[0], ways)
        shared = (jnp.sum(segment_ids_BT > 0), None if key is None else jax.random.split(key, count))

        def apply(stacks: Any, rows: Any, shared: Any, place: Place) -> tuple[jax.Array, Load | None]:
            (x_BTD, positions_BT, segment_ids_BT), (tokens, keys_M) = rows, shared
            layers = places * jax.tree.leaves(stacks)[0].shape[0]
            numbers = span.first + place.chunk * layers + jnp.arange(layers)
            keys = _layer_keys(None if keys_M is None else keys_M[place.microbatch], numbers, places)
            turn = rotation(self.config.rope, self.config.head_dim, positions_BT)
            x_BTD, load = self._through(stacks, keys, x_BTD, turn, segment_ids_BT, span.numerics, in_stage=True)
            share = jnp.sum(segment_ids_BT > 0) / jnp.maximum(tokens, 1)
            return x_BTD, None if load is None else load.weighted(share)

        # Routers and scales of 8 bits measure a whole microbatch.
        apart = () if self.config.num_experts or span.numerics != span.numerics.plain() else ("data",)
        rows, policy = (x_BTD, positions_BT, segment_ids_BT), TICK_POLICIES[self.remat]
        return pipelined(apply, span.stacks, rows, shared, count, self.pipeline.repeats, policy, apart)

    def _through(self, stacks: Any, keys: Any, x_BTD: jax.Array, turn: Rotation, segment_ids_BT: jax.Array,
                 numerics: Numerics, in_stage: bool = False) -> tuple[jax.Array, Load | None]:
        """Layers one after another, and their load, [repeats, places in the pattern, ...]."""

        def repeat(x_BTD: jax.Array, blocks_and_keys: Any) -> tuple[jax.Array, Load | None]:
            loads, x_BTD = [], checkpoint_name(x_BTD, "layer_input")
            for block, layer_key in zip(*blocks_and_keys, strict=True):
                x_BTD, load = block(x_BTD, turn, segment_ids_BT, numerics, layer_key)
                loads.append(load)
            return x_BTD, _stacked(loads)

        remat = {"stage": "none" if in_stage else "full"}.get(self.remat, self.remat)
        return self._loop(repeat, x_BTD, (stacks, keys), remat)

    def _loop(self, repeat: Any, x_BTD: jax.Array, layers: Any, remat: str) -> tuple[jax.Array, Load | None]:
        """`repeat` over layers of the same numerics, with the remat policy, scanned or unrolled."""
        if remat != "none":
            # A loop keeps forward and backward apart by itself; without one, or in a loop of one turn, the compiler
            # would find the recomputed values in the forward pass and keep those instead.
            scanned = self.unroll != "all" and self.unroll < jax.tree.leaves(layers)[0].shape[0]
            repeat = jax.checkpoint(repeat, policy=REMAT_POLICIES[remat], prevent_cse=not scanned)
        if self.unroll != "all":
            return jax.lax.scan(repeat, x_BTD, layers, unroll=self.unroll)
        loads = []
        for turn_of_blocks in _unstacked(layers):
            x_BTD, load = repeat(x_BTD, turn_of_blocks)
            loads.append(load)
        return x_BTD, _stacked(loads)

    def _spans(self) -> Iterator[Span]:
        """All layers, in runs that are computed alike."""
        pattern = len(self.config.layer_pattern)
        for name, (first, last) in self._parts(self.config).items():
            stacks = self.stacks(name)
            for start, stop, numerics in self.numerics.spans(first, last, self.config.num_layers):
                if (start, stop) == (first, last):
                    yield Span(name, start, stop, stacks, numerics)
                else:
                    part = slice((start - first) // pattern, (stop - first) // pattern)
                    yield Span(name, start, stop, jax.tree.map(lambda a, part=part: a[part], stacks), numerics)

    def _finished(self, x_BTD: jax.Array) -> jax.Array:
        """What the head sees of the residual stream."""
        h_BTD, output = self.final_norm(x_BTD), multipliers(self.config).output
        return h_BTD if output == 1.0 else output * h_BTD

    @staticmethod
    def _parts(config: ModelConfig) -> dict[str, tuple[int, int]]:
        """Name -> (first layer, the one after the last) of each part of the layer loop: dense layers before sparse."""
        dense = config.moe.dense_layers
        parts = {"dense_layers": (0, dense), STAGED: (dense, config.num_layers)}
        return {name: ends for name, ends in parts.items() if ends[0] < ends[1]}

    def stacks(self, part: str) -> tuple[Block, ...]:
        """The stacked blocks of each place in the layer pattern."""
        return tuple(getattr(self, f"{part}_{j}") for j in range(len(self.config.layer_pattern)))

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        return embedding_lookup(self.embedding[...], tokens_BT, self.numerics.dtype)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V] of hidden states: for generation, where T is 1."""
        head_VD = use(self.head_weight, self.numerics.dtype)
        logits = jnp.einsum("BTD,VD->BTV", x_BTD, head_VD, preferred_element_type=jnp.float32)
        cap = self.config.logit_softcap
        return cap * jnp.tanh(logits / cap) if cap else logits

    def decode(self, tokens_BT: jax.Array, cache: dict[str, tuple[Cache, ...]],
               start: jax.Array) -> tuple[jax.Array, Any]:
        """Hidden states [B, T, D] of new tokens at positions start.., and the caches with them in place."""
        positions_BT = jnp.broadcast_to(start + jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
        turn = rotation(self.config.rope, self.config.head_dim, positions_BT)

        plain = self.numerics.plain()

        def repeat(x_BTD: jax.Array, blocks_and_caches: Any) -> tuple[jax.Array, Any]:
            longer = []
            for block, layer_cache in zip(*blocks_and_caches, strict=True):
                x_BTD, layer_cache = block.decode(x_BTD, turn, layer_cache, start, plain)
                longer.append(layer_cache)
            return x_BTD, tuple(longer)

        x_BTD = self.embed(tokens_BT)
        cache = dict(cache)
        for name in cache:
            x_BTD, cache[name] = jax.lax.scan(repeat, x_BTD, (self.stacks(name), cache[name]))
        return self._finished(x_BTD), cache

    def empty_cache(self, batch: int, length: int) -> dict[str, tuple[Cache, ...]]:
        """Zeroed caches for `length` tokens: of each part of the layer loop, one a place in the layer pattern, stacked
        over its repeats."""
        cache = {}
        for name, (first, last) in self._parts(self.config).items():
            repeats = (last - first) // len(self.config.layer_pattern)
            shape = (repeats, batch, length, self.config.num_kv_heads, self.config.head_dim)
            empty = jnp.zeros(shape, self.numerics.dtype)
            cache[name] = tuple(Cache(empty, empty) for _ in self.config.layer_pattern)
        return cache


def _unstacked(stacks: Any) -> list[Any]:
    """The blocks (and keys) of each repeat out of the stacks."""
    leaves, structure = jax.tree.flatten(stacks)
    return [structure.unflatten(repeat) for repeat in zip(*map(unstack, leaves), strict=True)]


def _stacked(loads: list[Load | None]) -> Load | None:
    return None if loads[0] is None else jax.tree.map(lambda *parts: jnp.stack(parts), *loads)


def _staged(stack: Block) -> Block:
    """The stacked layers, marked for storage to split them over the stages."""
    return jax.tree.map(lambda p: p.replace(p[...], staged=True), stack, is_leaf=lambda p: isinstance(p, nnx.Param))


def _layer_keys(key: jax.Array | None, numbers: jax.Array, places: int) -> tuple[jax.Array | None, ...]:
    """A key for each of the layers with these numbers, one array a place in the layer pattern."""
    if key is None:
        return (None,) * places
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
    return tuple(keys[place::places] for place in range(places))


def make_transformer(config: ModelConfig, key: jax.Array, *, kernels: Kernels = PLAIN,
                     numerics: Numerics = FLOAT32, remat: str = "none", unroll: int | str = 1,
                     pipeline: Pipeline = Pipeline()) -> Transformer:  # noqa: B008
    """A freshly initialised decoder. Equal keys give equal bits on any mesh."""
    return Transformer(config, kernels=kernels, numerics=numerics, remat=remat, unroll=unroll, pipeline=pipeline,
                       rngs=nnx.Rngs(params=key))
