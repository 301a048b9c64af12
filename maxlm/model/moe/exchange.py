"""How tokens reach the devices of their experts, and how the results come back.

Three exchanges along the mesh axis `expert`, for use inside a `shard_map`, and none for experts that are all here:

    all_gather          every device sees all tokens of its expert group and serves those of its own experts; results
                        are summed on the way back. For small axes.
    all_to_all          each device sends each other one the rows it needs, in slots of one size.
    ragged_all_to_all   the same with only the rows that are there on the wire; TPU and GPU.

Each takes this device's tokens and gives (what the experts made of them, weighted and summed over each token's choices;
how many choices found no room). A choice without room adds nothing to its token and takes no other's place.

With `eight_bit`, what goes to the experts goes as 8-bit floats with a scale a row: tokens as E4M3, gradients of their
results as E5M2. What comes back is summed, and stays as it is (DeepSeek-V3, arXiv:2412.19437, section 3.3.3).

Dims: N tokens of this device, K choices a token, D width, R rows, E experts, L = E / P of this device, P devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxlm.kernels.grouped_matmul import ROW_MULTIPLE, Plan, collect, spread
from maxlm.model.moe.plan import by_row, grouped_plan, rows_needed, slotted_plan, unplaced
from maxlm.numerics.fp8 import BACKWARD, FORWARD, scaled
from maxlm.schema import ConfigError

AXIS = "expert"
KEPT = ("mlp_up", "8bit")  # what experts keep for their backward pass

Serve = Callable[[jax.Array, jax.Array, Plan], jax.Array]  # (tokens [N, D], weights [N, K], plan) -> [N, D]


@dataclass(frozen=True)
class Room:
    """How many rows a device keeps for `even_share` choices, were all experts equally loaded.

    capacity_factor, buffer_factor: of MoEConfig. multiple: rows that each expert's group is rounded up to.
    """

    capacity_factor: float
    buffer_factor: float
    multiple: int

    def plan(self, expert_NK: jax.Array, num_experts: int, even_share: int) -> Plan:
        """Rows for the choices of experts 0 to num_experts - 1; the others are not placed."""
        if self.capacity_factor:
            capacity = math.ceil(self.capacity_factor * even_share / num_experts)
            return slotted_plan(expert_NK, num_experts, capacity, ROW_MULTIPLE)
        num_rows = rows_needed(self.buffer(even_share, expert_NK.size), num_experts, self.multiple)
        return grouped_plan(expert_NK, num_experts, -(-num_rows // ROW_MULTIPLE) * ROW_MULTIPLE, self.multiple)

    def buffer(self, even_share: int, most: int) -> int:
        """Rows for choices of which `even_share` are expected and `most` can come."""
        return min(most, math.ceil(self.buffer_factor * even_share)) if self.buffer_factor else most


def stay(x_ND: jax.Array, expert_NK: jax.Array, weight_NK: jax.Array, serve: Serve, room: Room, num_experts: int,
         eight_bit: bool) -> tuple[jax.Array, jax.Array]:
    """All experts are here, and so is what they can be asked for; nothing travels."""
    plan = dataclasses.replace(room, buffer_factor=0.0).plan(expert_NK, num_experts, expert_NK.size)
    return _served(x_ND, weight_NK, serve, plan), _count(unplaced(plan))


def all_gather(x_ND: jax.Array, expert_NK: jax.Array, weight_NK: jax.Array, serve: Serve, room: Room,
               num_experts: int, eight_bit: bool) -> tuple[jax.Array, jax.Array]:
    num_local = num_experts // jax.lax.axis_size(AXIS)
    ways = _Ways(lambda rows, _: jax.lax.all_gather(rows, AXIS, axis=0, tiled=True),
                 lambda rows, _: jax.lax.psum_scatter(rows, AXIS, scatter_dimension=0, tiled=True), None, eight_bit)
    local_NK = ways.numbers(expert_NK) - jax.lax.axis_index(AXIS) * num_local
    plan = room.plan(local_NK, num_local, expert_NK.size)
    lost = unplaced(plan) & (local_NK >= 0) & (local_NK < num_local)
    return ways.results(_served(ways.tokens(x_ND), ways.numbers(weight_NK), serve, plan)), _count(lost)


def all_to_all(x_ND: jax.Array, expert_NK: jax.Array, weight_NK: jax.Array, serve: Serve, room: Room,
               num_experts: int, eight_bit: bool) -> tuple[jax.Array, jax.Array]:
    devices, choices = jax.lax.axis_size(AXIS), expert_NK.size
    num_local = num_experts // devices
    sent = slotted_plan(expert_NK // num_local, devices, room.buffer(-(-choices // devices), choices))
    move = lambda rows, _: jax.lax.all_to_all(rows, AXIS, 0, 0, tiled=True)  # noqa: E731
    ways = _Ways(move, move, None, eight_bit)
    x_RD, weight_R, local_R = _exchanged(x_ND, expert_NK, weight_NK, sent, num_local, ways)
    out_RD, lost = _arrived(x_RD, weight_R, local_R, serve, room, num_local, choices)
    return collect(ways.results(out_RD), sent), lost + _count(unplaced(sent))


def ragged_all_to_all(x_ND: jax.Array, expert_NK: jax.Array, weight_NK: jax.Array, serve: Serve, room: Room,
                      num_experts: int, eight_bit: bool) -> tuple[jax.Array, jax.Array]:
    devices, choices = jax.lax.axis_size(AXIS), expert_NK.size
    num_local = num_experts // devices
    sent = grouped_plan(expert_NK // num_local, devices, choices)
    sizes = (choices, room.buffer(choices, choices * devices))
    paths, unsent = _paths(sent.sizes_E, sizes[1])
    ways = _Ways(lambda rows, paths: _there(rows, paths, sizes), lambda rows, paths: _back(rows, paths, sizes), paths,
                 eight_bit)
    x_RD, weight_R, local_R = _exchanged(x_ND, expert_NK, weight_NK, sent, num_local, ways)
    came_R = jnp.arange(sizes[1]) < jnp.sum(paths.receive)
    out_RD, lost = _arrived(x_RD, weight_R, jnp.where(came_R, local_R, -1), serve, room, num_local, choices)
    return collect(ways.results(out_RD), sent), lost + unsent


def choose_exchange(requested: str, platform: str, devices: int, experts_per_token: int) -> str:
    """The name in EXCHANGES of `compute.expert_exchange`. 'auto': what sends less. A token goes to each other device
    once by all_gather, and to each of its experts' by all_to_all; the ragged one sends no empty rows, and
    is 30 times slower on GPUs (docs/MOE.md). Raises ConfigError for one that the platform does not have."""
    if requested == "ragged_all_to_all" and platform == "cpu":
        raise ConfigError("compute.expert_exchange='ragged_all_to_all' does not run on cpu: set it to 'auto'")
    if requested != "auto":
        return requested
    if platform == "tpu":
        return "ragged_all_to_all"
    return "all_gather" if devices <= experts_per_token else "all_to_all"


EXCHANGES = {"all_gather": all_gather, "all_to_all": all_to_all, "ragged_all_to_all": ragged_all_to_all}


class _Ways(NamedTuple):
    """To the experts, and back: linear maps of rows along `paths`, each other's transposes."""

    there: Callable[[jax.Array, Any], jax.Array]
    back: Callable[[jax.Array, Any], jax.Array]
    paths: Any
    eight_bit: bool

    def numbers(self, rows: jax.Array) -> jax.Array:
        """What belongs to tokens, to the experts."""
        return self.there(rows, self.paths)

    def tokens(self, rows: jax.Array) -> jax.Array:
        """Their vectors, to the experts."""
        if not self.eight_bit:
            return self.there(rows, self.paths)
        return _sent(self.there, self.back, rows, self.paths)

    def results(self, rows: jax.Array) -> jax.Array:
        """What experts made of them, back."""
        if not self.eight_bit:
            return self.back(rows, self.paths)
        return _returned(self.there, self.back, rows, self.paths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sent(there, back, rows, paths):
    """`there` in 8 bits. Its gradient goes back as it is."""
    return _carried(there, rows, paths, FORWARD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _returned(there, back, rows, paths):
    """`back`, whose gradient goes there in 8 bits."""
    return back(rows, paths)


_sent.defvjp(lambda there, back, rows, paths: (_sent(there, back, rows, paths), paths),
             lambda there, back, paths, g: (back(g, paths), None))
_returned.defvjp(lambda there, back, rows, paths: (back(rows, paths), paths),
                 lambda there, back, paths, g: (_carried(there, g, paths, BACKWARD), None))


def _carried(there, rows, paths, dtype):
    """Scales are powers of two, so that nothing is rounded where they are undone. Bytes travel: every backend moves
    those."""
    rows8 = scaled(rows, dtype, (1,), power_of_two=True)
    values = jax.lax.bitcast_convert_type(there(jax.lax.bitcast_convert_type(rows8.values, jnp.uint8), paths), dtype)
    return (values.astype(jnp.float32) * there(rows8.factors, paths)).astype(rows.dtype)


@functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*KEPT), static_argnums=2)
def _served(x_ND, weight_NK, serve, plan):
    """The backward pass makes rows from tokens again, and hidden units from gate and up: together they would be as much
    memory as the rest of a layer, and both are a pass over what is there (docs/MOE.md)."""
    return serve(x_ND, weight_NK, plan)


def _exchanged(x_ND, expert_NK, weight_NK, sent, num_local, ways):
    """Rows, weights and local experts (-1 where a row holds nothing), sent in the order of `sent`, as they arrive."""
    held_R = sent.choice_R < expert_NK.size
    local_R = expert_NK.reshape(-1)[jnp.where(held_R, sent.choice_R, 0)] % num_local
    return (ways.tokens(spread(x_ND, sent)), ways.numbers(by_row(weight_NK, sent)),
            ways.numbers(jnp.where(held_R, local_R, -1)))


def _arrived(x_RD, weight_R, local_R, serve, room, num_local, even_share):
    """(what became of rows that came for local experts, in their places; how many found no room)."""
    plan = room.plan(local_R[:, None], num_local, even_share)
    return _served(x_RD, weight_R[:, None], serve, plan), _count(unplaced(plan) & (local_R >= 0)[:, None])


def _count(flags: jax.Array) -> jax.Array:
    return jnp.sum(flags, dtype=jnp.float32)


class _Paths(NamedTuple):
    """Where rows lie, int32 [P]: those for device p are `send` rows from `send_at` on here and from `arrive_at` on
    there; those of device p are `receive` rows from `receive_at` on here, and from `return_to` on where they came from.
    """

    send_at: jax.Array
    send: jax.Array
    arrive_at: jax.Array
    receive_at: jax.Array
    receive: jax.Array
    return_to: jax.Array


def _paths(size_P: jax.Array, room: int) -> tuple[_Paths, jax.Array]:
    """From this device's rows for each other, which stand in order; and how many of them the others have no room for
    (each takes `room` rows, of the first devices first)."""
    me = jax.lax.axis_index(AXIS)
    size_SP = jax.lax.all_gather(size_P, AXIS)  # of each sender S
    from_SP = jnp.cumsum(size_SP, axis=1) - size_SP
    to_SP = jnp.minimum(jnp.cumsum(size_SP, axis=0) - size_SP, room)
    fit_SP = jnp.minimum(size_SP, room - to_SP)
    paths = _Paths(from_SP[me], fit_SP[me], to_SP[me], to_SP[:, me], fit_SP[:, me], from_SP[:, me])
    return paths, jnp.sum(size_SP[me] - fit_SP[me]).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _there(rows: jax.Array, paths: _Paths, sizes: tuple[int, int]) -> jax.Array:
    """[sizes[0], ...] -> [sizes[1], ...], zeros where nothing comes. `_back` is its transpose."""
    return _move(rows, sizes[1], paths.send_at, paths.send, paths.arrive_at, paths.receive)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _back(rows: jax.Array, paths: _Paths, sizes: tuple[int, int]) -> jax.Array:
    return _move(rows, sizes[0], paths.receive_at, paths.receive, paths.return_to, paths.send)


def _move(rows, size, start, length, to, received):
    empty = jax.lax.full_like(rows, 0, shape=(size, *rows.shape[1:]))
    return jax.lax.ragged_all_to_all(rows, empty, start, length, to, received, axis_name=AXIS)


_there.defvjp(lambda rows, paths, sizes: (_there(rows, paths, sizes), paths),
              lambda sizes, paths, g: (_back(g, paths, sizes), None))
_back.defvjp(lambda rows, paths, sizes: (_back(rows, paths, sizes), paths),
             lambda sizes, paths, g: (_there(g, paths, sizes), None))
