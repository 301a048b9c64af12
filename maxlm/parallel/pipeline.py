"""Layers on different devices, and microbatches that flow through them (pipeline parallelism).

Stage s of S holds every S-th of R*S chunks of the layers: chunks s, S+s, ... (R > 1: interleaved or 'virtual' stages,
Narayanan et al. 2021, arXiv:2104.04473, section 2.2). Microbatches enter in groups of S. Each tick a stage takes one
microbatch through one of its chunks and hands it on, the last stage to the first:

    tick   0   1   2   3   4   5   6   7   8         S = 2, R = 2, M = 4: microbatch, and chunk of the stage
    s = 0  0a  1a  0b  1b  2a  3a  2b  3b
    s = 1      0a  1a  0b  1b  2a  3a  2b  3b        R*M + S - 1 ticks, of which each stage works in R*M

The batch is split over the stages too, as embedding and loss see it: of each group, microbatch j lies on stage j before
and after. While a group enters, its rows turn towards stage 0, one stage a tick; there, each place that becomes free
takes the finished microbatch of the group before, which the last turns carry home. So no stage holds, or embeds, or
computes the loss of more than its share, and all that moves is one microbatch a tick in either direction.

The backward pass is autodiff's of this loop: all ticks in reverse order (GPipe's schedule, arXiv:1811.06965, with its
bubble divided by R), which keeps what the remat policy keeps for all R*M + S - 1 ticks; 1F1B would keep it for S.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

STAGE = "stage"


@dataclass(frozen=True)
class Pipeline:
    """microbatches: into which the rows of a batch are cut; 'auto': of one row on each device. repeats: chunks of
    layers that each stage holds."""

    microbatches: int | str = "auto"
    repeats: int = 1

    def count(self, rows: int, ways: int) -> int:
        """Microbatches of a batch of `rows` rows which `ways` devices share beside the stages."""
        return rows // ways if self.microbatches == "auto" else self.microbatches


def bubble_share(stages: int, microbatches: int, repeats: int = 1) -> float:
    """The share of a step's ticks in which a stage has nothing to do, forward as well as backward."""
    return (stages - 1) / (repeats * microbatches + stages - 1)


def num_stages() -> int:
    """Of the mesh that is installed."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(STAGE, 1)


class Place(NamedTuple):
    """Which microbatch, and which of all R*S chunks of layers, a stage is at."""

    microbatch: jax.Array
    chunk: jax.Array


Apply = Callable[[Any, Any, Any, Place], tuple[jax.Array, Any]]


def pipelined(apply: Apply, layers: Any, rows: tuple[jax.Array, ...], shared: Any, microbatches: int, repeats: int,
              policy: Callable[..., bool] | None = None, replicas: tuple[str, ...] = ()) -> tuple[jax.Array, Any]:
    """Takes the first of `rows` through all layers: (what it becomes, sums).

    layers: arrays [L, ...], split over `stage`. rows: arrays [B, ...], split over `stage` first; those behind the first
    go along with it. shared: what every stage sees whole. apply(chunk of L / (R*S) layers, rows of a microbatch,
    shared, place) is (the first of the rows after these layers, what to sum over the microbatches, [L / (R*S), ...]).
    policy: what each tick keeps of `apply` for the backward pass (None: nothing but what came in).
    replicas: mesh axes behind `stage` in BATCH whose devices see nothing of each other's rows in `apply`, which must
    sum nothing then: gradients of layers are summed over them once, after the last tick, and not in every tick.
    """

    def work(chunks: Any, repeat: jax.Array, rows: Any, shared: Any, place: Place) -> tuple[jax.Array, Any]:
        return apply(_at(chunks, repeat), rows, shared, place)

    # Around the choice of the chunk: else each tick would keep the weights that it chose.
    work = jax.checkpoint(work, policy=policy, prevent_cse=False)

    def local(layers: Any, rows: tuple[jax.Array, ...], shared: Any) -> tuple[jax.Array, Any]:
        chunks = _dealt(layers, repeats)
        slots = tuple(_cut(a, microbatches // jax.lax.axis_size(STAGE)) for a in rows)
        slots, sums = _flow(work, chunks, slots, shared, repeats)
        return _joined(slots[0]), sums

    split = P((STAGE, *replicas))
    out, sums = jax.shard_map(
        local, in_specs=(P(STAGE), split, P()), out_specs=(split, P(None, STAGE)), axis_names={STAGE, *replicas},
        check_vma=False,  # attention's own `shard_map` inside does not say over which axes its result varies
    )(layers, rows, shared)
    # [R, S chunks, ...]: chunks in the order of the layers
    return out, jax.tree.map(lambda a: jax.sharding.reshard(a, P()).reshape(-1, *a.shape[2:]), sums)


def _flow(work: Callable[..., tuple[jax.Array, Any]], chunks: Any, slots: tuple[jax.Array, ...], shared: Any,
          R: int) -> tuple[Any, Any]:
    """The loop, as one stage runs it. chunks: [R, layers, ...]; slots: this stage's microbatches, [K, ...], one of
    each group."""
    S, stage, K = jax.lax.axis_size(STAGE), jax.lax.axis_index(STAGE), slots[0].shape[0]
    to_next = [(s, (s + 1) % S) for s in range(S)]
    to_last = [(s, (s - 1) % S) for s in range(S)]

    def exchange(slots: Any, state: Any, tick: jax.Array) -> tuple[Any, Any]:
        """Stage 0 takes what lies in its slot, where a group enters, and leaves there what came out of the last."""
        slot, entering = tick // (R * S) % K, (stage == 0) & (tick % (R * S) < S)
        held = _at(slots, slot)
        state, held = _select(entering, held, state), _select(entering, state, held)
        held = jax.lax.ppermute(held, STAGE, to_last)
        return jax.tree.map(lambda a, h: jax.lax.dynamic_update_index_in_dim(a, h, slot, 0), slots, held), state

    def step(carry: Any, tick: jax.Array) -> tuple[Any, None]:
        slots, state, sums = carry
        slots, state = exchange(slots, state, tick)
        turn = tick - stage
        busy, turn = (turn >= 0) & (turn < R * S * K), jnp.clip(turn, 0, R * S * K - 1)
        repeat = turn // S % R
        place = Place(turn // (R * S) * S + turn % S, repeat * S + stage)
        x, more = work(chunks, repeat, state, shared, place)
        sums = jax.tree.map(
            lambda a, m: jax.lax.dynamic_update_index_in_dim(
                a, jax.lax.dynamic_index_in_dim(a, repeat, 0, keepdims=False) + jnp.where(busy, m, 0), repeat, 0),
            sums, more)
        return (slots, jax.lax.ppermute((x, *state[1:]), STAGE, to_next), sums), None

    first = jax.tree.map(lambda a: a[0], slots)  # what is computed before something has come is never looked at
    shapes = jax.eval_shape(lambda: work(chunks, stage, first, shared, Place(stage, stage))[1])
    sums = jax.tree.map(lambda a: jnp.zeros((R, *a.shape), a.dtype), shapes)
    ticks = R * S * K + S - 1
    (slots, state, sums), _ = jax.lax.scan(step, (slots, first, sums), jnp.arange(ticks))
    slots, _ = exchange(slots, state, jnp.int32(ticks))
    return jax.tree.map(lambda a: jnp.roll(a, -1, axis=0), slots), sums  # each slot has the group before its own


def _at(tree: Any, index: jax.Array | int) -> Any:
    return jax.tree.map(lambda a: a[0] if a.shape[0] == 1 else jax.lax.dynamic_index_in_dim(a, index, 0, False), tree)


def _select(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jax.lax.select(condition, a, b), yes, no)


def _cut(rows: jax.Array, count: int) -> jax.Array:
    """[B, ...] -> [count, B / count, ...], each taking rows from every device so that none move."""
    batch, *rest = jax.typeof(rows).sharding.spec
    shape = (rows.shape[0] // count, count, *rows.shape[1:])
    return rows.reshape(shape, out_sharding=P(batch, None, *rest)).swapaxes(0, 1)


def _joined(slots: jax.Array) -> jax.Array:
    """The inverse of `_cut`."""
    _, batch, *rest = jax.typeof(slots).sharding.spec
    shape = (slots.shape[0] * slots.shape[1], *slots.shape[2:])
    return slots.swapaxes(0, 1).reshape(shape, out_sharding=P(batch, *rest))


def _dealt(layers: Any, R: int) -> Any:
    """The layers that this stage holds in storage, [L / S, ...] in their order, for those of its chunks, [R, ...].

    Chunk c is stored on stage c // R and computed on stage c % S. R turns suffice in which every stage sends one chunk
    and gets one: in turn k, stage s sends its chunk `sent[k][s]`.
    """
    S, stage = jax.lax.axis_size(STAGE), jax.lax.axis_index(STAGE)
    chunks = jax.tree.map(lambda a: a.reshape(R, a.shape[0] // R, *a.shape[1:],
                                              out_sharding=P(None, *jax.typeof(a).sharding.spec)), layers)
    if R == 1:
        return chunks
    common = math.gcd(R, S)
    turns = [[k // common * common + (k + s // (S // common)) % common for s in range(S)] for k in range(R)]
    dealt = chunks
    for sent in turns:
        number = [s * R + q for s, q in enumerate(sent)]  # of the chunk that stage s sends
        came = {c % S: c // S for c in number}
        moved = jax.lax.ppermute(_at(chunks, jnp.array(sent)[stage]), STAGE, [(s, c % S) for s, c in enumerate(number)])
        place = jnp.array([came[s] for s in range(S)])[stage]
        dealt = jax.tree.map(lambda a, m, p=place: jax.lax.dynamic_update_index_in_dim(a, m, p, 0), dealt, moved)
    return dealt
