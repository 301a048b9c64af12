"""Reading optimized HLO: loops, products, slices, and collectives with the asynchronous ones played beside the work."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.config import MeshConfig
from maxlm.hardware import CHIPS
from maxlm.parallel.mesh import make_mesh
from maxlm.planning.cost import Costs
from maxlm.planning.hlo import parse
from maxlm.planning.memory import assigned_bytes
from maxlm.planning.roofline import Peaks, Roofline
from maxlm.planning.topology import find_target, links
from maxlm.planning.traffic import Layout, Traffic, by_axis

# A loop of 5 turns, its bound carried in from outside, over an asynchronous all-gather that runs beside a product (as
# TPUs write one: start, a fusion that goes on with it, end) and a reduce-scatter in TPU's form.
PROGRAM = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (input: bf16[1024,1024]) -> bf16[512,1024] {
  %input = bf16[1024,1024]{1,0} parameter(0)
  %all-reduce.1 = bf16[1024,1024]{1,0} all-reduce(%input), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %mine = bf16[512,1024]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={512,1024}
}

%start (p: bf16[512,1024]) -> (bf16[512,1024], bf16[1024,1024]) {
  %p = bf16[512,1024]{1,0} parameter(0)
  %all-gather.1 = bf16[1024,1024]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %s = (bf16[512,1024]{1,0}, bf16[1024,1024]{1,0}) custom-call(%all-gather.1),
custom_call_target="AsyncCollectiveStart"
}

%go_on (p: bf16[512,1024], x: bf16[1024,1024]) -> bf16[1024,1024] {
  %p = bf16[512,1024]{1,0} parameter(0)
  %x = bf16[1024,1024]{1,0} parameter(1)
  %all-gather.2 = bf16[1024,1024]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0},
backend_config={"async_collective_fusion_config":{"flag_end":"8"}}
  ROOT %product = bf16[1024,1024]{1,0} convolution(%x, %x), dim_labels=bf_io->bf
}

%end (p: bf16[512,1024]) -> bf16[1024,1024] {
  %p = bf16[512,1024]{1,0} parameter(0)
  %all-gather.3 = bf16[1024,1024]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %e = bf16[1024,1024]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%body (state: (s32[], bf16[512,1024], s32[], bf16[1024,1024])) -> (s32[], bf16[512,1024], s32[], bf16[1024,1024]) {
  %state = (s32[], bf16[512,1024]{1,0}, s32[], bf16[1024,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %w = bf16[512,1024]{1,0} get-tuple-element(%state), index=1
  %n = s32[] get-tuple-element(%state), index=2
  %x = bf16[1024,1024]{1,0} get-tuple-element(%state), index=3
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %started = (bf16[512,1024]{1,0}, bf16[1024,1024]{1,0}) fusion(%w), kind=kCustom, calls=%start
  %y = bf16[1024,1024]{1,0} fusion(%w, %x), kind=kOutput, calls=%go_on, frontend_attributes={kernel_metadata={
"what":"text over lines { that looks like an end
}}, metadata={op_name="jit(step)/while/body/dot_general"}
  %ended = bf16[1024,1024]{1,0} fusion(%w), kind=kCustom, calls=%end
  %scattered = bf16[512,1024]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %again = (s32[], bf16[512,1024]{1,0}, s32[], bf16[1024,1024]{1,0}) tuple(%next, %scattered, %n, %ended)
}, execution_thread="main"

%condition (state: (s32[], bf16[512,1024], s32[], bf16[1024,1024])) -> pred[] {
  %state = (s32[], bf16[512,1024]{1,0}, s32[], bf16[1024,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %n = s32[] get-tuple-element(%state), index=2
  ROOT %go = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (w: bf16[512,1024], x: bf16[1024,1024]) -> bf16[512,1024] {
  %w = bf16[512,1024]{1,0} parameter(0)
  %x = bf16[1024,1024]{1,0} parameter(1)
  %first = s32[] constant(0)
  %last = s32[] constant(5)
  %in = (s32[], bf16[512,1024]{1,0}, s32[], bf16[1024,1024]{1,0}) tuple(%first, %w, %last, %x)
  %loop = (s32[], bf16[512,1024]{1,0}, s32[], bf16[1024,1024]{1,0}) while(%in), condition=%condition, body=%body
  ROOT %out = bf16[512,1024]{1,0} get-tuple-element(%loop), index=1
}
"""
AXES = {"data": 2, "fsdp": 2}
LAYOUT = Layout(AXES, ((0, 0), (1, 0), (0, 1), (1, 1)), (0, 0, 0, 0))
V5E = find_target("v5e:2x2")
MATRIX = 2 * 1024 * 1024  # bytes


def step_of(text, peaks=None, lanes=1, rows_used=1.0):
    module = parse(text)
    peaks, costs = peaks or Peaks(1e12, 1e12), Costs(module, lanes=lanes, rows_used=rows_used)
    return Roofline(module, costs, Traffic(module, LAYOUT, V5E.chip, V5E), peaks).step()


def test_loops_count_as_often_as_they_turn():
    runs = parse(PROGRAM).runs()
    assert runs["body"] == 5 and runs["main"] == 1 and runs["go_on"] == 5
    counting_twos = parse(PROGRAM.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)")).runs()
    assert counting_twos["body"] == 3, "the step of a loop is read from its body"


def test_a_loop_that_cannot_be_counted_is_an_error():
    unknown = PROGRAM.replace("%last = s32[] constant(5)", "%last = s32[] custom-call(%first), custom_call_target='x'")
    with pytest.raises(ValueError, match="cannot tell how often loop loop turns"):
        parse(unknown).runs()


def test_products_and_collectives_of_all_turns():
    step = step_of(PROGRAM)
    assert step.flops == 5 * 2 * 1024**3
    table = by_axis(step.collectives)
    assert set(table) == {"fsdp"}, "groups {0,1} and {2,3} differ along the last axis"
    gather, scatter = table["fsdp"]["all-gather"], table["fsdp"]["reduce-scatter"]
    assert (gather["count"], scatter["count"]) == (5, 5), "start, middle and end are one gather"
    assert gather["bytes"] == gather["asynchronous_bytes"] == 5 * MATRIX / 2
    assert scatter["bytes"] == 5 * MATRIX / 2 and scatter["asynchronous_bytes"] == 0


def test_what_is_asynchronous_hides_behind_the_work():
    wire = MATRIX / 2 / 50e9  # one of four links of 50 GB/s: an open line
    slow = step_of(PROGRAM, Peaks(1e12, 1e15))  # the product takes 2.1 ms, the gather 21 us
    assert slow.exposed["fsdp"] == pytest.approx(5 * wire, rel=1e-6), "only the scatter shows"
    fast = step_of(PROGRAM, Peaks(1e18, 1e18))
    assert fast.exposed["fsdp"] == pytest.approx(5 * 2 * wire, rel=1e-3), "nothing to hide behind"
    synchronous = PROGRAM.replace("AsyncCollectiveStart", "Nothing").replace("AsyncCollectiveDone", "Nothing")
    assert step_of(synchronous, Peaks(1e12, 1e15)).exposed["fsdp"] > 2 * slow.exposed["fsdp"]


def test_a_narrow_product_costs_what_the_matrix_unit_takes():
    narrow = PROGRAM.replace("bf16[1024,1024]{1,0} convolution(%x, %x), dim_labels=bf_io->bf",
                             "bf16[1024,1024]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={1}")
    narrow = narrow.replace("  ROOT %product", "  %q = bf16[1024,64]{1,0} slice(%x), slice={[0:1024], [0:64]}\n"
                                              "  ROOT %product")
    step = step_of(narrow, lanes=128)
    assert step.flops == 5 * 2 * 1024 * 1024 * 64
    assert step.compute_seconds == pytest.approx(2 * step.flops / 1e12)


def test_padded_windows_count_the_taps_that_are_there():
    """TPUs write [B, D] x [D, 8, 6, K] as a convolution over padded places of size 1: most taps are outside."""
    text = """
ENTRY %main (x: bf16[2,16,32,1,1], w: bf16[32,8,6,64,1]) -> bf16[2,16,8,6,64] {
  %x = bf16[2,16,32,1,1]{4,3,2,1,0} parameter(0)
  %w = bf16[32,8,6,64,1]{4,3,2,1,0} parameter(1)
  ROOT %c = bf16[2,16,8,6,64]{4,3,2,1,0} convolution(%x, %w),
window={size=1x8x6 pad=0_0x7_7x5_5 rhs_reversal=0x1x1}, dim_labels=0bf12_i12o0->0b12f
}
"""
    assert step_of(text).flops == 2 * 2 * 16 * 32 * 8 * 6 * 64


def test_a_ragged_product_counts_each_row_once():
    """As libtpu writes one for v6e: all rows times all 64 matrices, with the others' rows skipped."""
    text = """
%all_groups (w: bf16[64,128,256], x: bf16[4096,256]) -> bf16[4096,128] {
  %w = bf16[64,128,256]{2,1,0} parameter(0)
  %x = bf16[4096,256]{1,0} parameter(1)
  %all = bf16[8192,256]{1,0} reshape(%w)
  ROOT %c = bf16[4096,8192]{1,0} dot(%x, %all), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (w: bf16[64,128,256], x: bf16[4096,256]) -> bf16[4096,128] {
  %w = bf16[64,128,256]{2,1,0} parameter(0)
  %x = bf16[4096,256]{1,0} parameter(1)
  ROOT %f = bf16[4096,128]{1,0} fusion(%w, %x), kind=kOutput, calls=%all_groups,
backend_config={"convolution_algorithm_config":{"is_ragged_dot":true,"num_groups_in_ragged_dot":"64"}}
}
"""
    assert step_of(text).flops == 2 * 4096 * 256 * 128


def test_of_a_sliced_operand_the_slice_is_read():
    text = """
%one_layer (stack: f32[10,1024], i: s32[]) -> f32[1,1024] {
  %stack = f32[10,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %layer = f32[1,1024]{1,0} dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,1024}
}

ENTRY %main (stack: f32[10,1024], i: s32[]) -> f32[1,1024] {
  %stack = f32[10,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = f32[1,1024]{1,0} fusion(%stack, %i), kind=kLoop, calls=%one_layer
}
"""
    module = parse(text)
    entry = module.computations["main"]
    assert Costs(module).of(entry, entry["f"]).bytes == 2 * 4096 + 4  # read, written, and the index
    in_vmem = text.replace("%stack = f32[10,1024]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n  ROOT",
                           "%stack = f32[10,1024]{1,0:S(1)} parameter(0)\n  %i = s32[] parameter(1)\n  ROOT")
    module = parse(in_vmem)
    entry = module.computations["main"]
    assert Costs(module).of(entry, entry["f"]).bytes == 4096 + 4


def test_an_all_reduce_of_a_padded_buffer_is_named():
    text = """
ENTRY %main (w: bf16[512,1024]) -> bf16[1024,1024] {
  %w = bf16[512,1024]{1,0} parameter(0)
  %zero = bf16[] constant(0)
  %wide = bf16[1024,1024]{1,0} pad(%w, %zero), padding=0_512x0_0
  ROOT %r = bf16[1024,1024]{1,0} all-reduce(%wide), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""
    (collective, _), = step_of(text).collectives
    assert collective.padded and collective.wire_bytes == MATRIX
    (plain, _), = step_of(text.replace("pad(%w, %zero), padding=0_512x0_0", "negate(%w)")).collectives
    assert not plain.padded


def test_links_of_a_group():
    chip = next(chip for chip in CHIPS if chip.name == "TPU v5e")
    pod, slice_ = find_target("v5e:16x16"), find_target("v5e:4x4")
    row = [(x, 0) for x in range(16)]
    assert links(chip, pod, row) == 2, "a ring closes"
    assert links(chip, slice_, row[:4]) == 1, "an open line"
    assert links(chip, pod, row[:4]) == 1
    assert links(chip, pod, row[::4]) == 0.25, "four such groups share a line"
    assert links(chip, pod, [(x, y) for x in range(16) for y in range(16)]) == 4
    v5p = find_target("v5p:4x4x8")
    assert links(v5p.chip, v5p, [(0, 0, z) for z in range(8)]) == 2
    assert links(find_target("v5p:2x2x1").chip, find_target("v5p:2x2x1"), [(0, 0, 0), (1, 0, 0)]) == 1


def test_permutes_round_a_ring_take_one_hop_and_leave_the_other_direction_free():
    up, down = "{0,1},{1,2},{2,3},{3,0}", "{0,3},{1,0},{2,1},{3,2}"
    text = """
ENTRY %main (x: bf16[1024,1024]) -> bf16[1024,1024] {
  %x = bf16[1024,1024]{1,0} parameter(0)
  %s = (bf16[1024,1024], bf16[1024,1024]) collective-permute-start(%x), channel_id=1, source_target_pairs={UP}
  %t = (bf16[1024,1024], bf16[1024,1024]) collective-permute-start(%x), channel_id=2, source_target_pairs={DOWN}
  %d = bf16[1024,1024]{1,0} collective-permute-done(%s)
  ROOT %e = bf16[1024,1024]{1,0} collective-permute-done(%t)
}
"""

    def seconds(first, second, slice_="v5p:4x4x4"):
        target = find_target(slice_)
        module, each = parse(text.replace("UP", first).replace("DOWN", second)), target.chip.devices_per_chip
        coords = tuple((x, 0, 0) for x in range(4) for _ in range(each))
        layout = Layout({"tensor": len(coords)}, coords, (0,) * len(coords))
        traffic = Traffic(module, layout, target.chip, target)
        return Roofline(module, Costs(module), traffic, Peaks(1e30, 1e30)).step().seconds

    message = MATRIX / 100e9
    assert seconds(up, down) == pytest.approx(message)
    assert seconds(up, up) == pytest.approx(2 * message)
    assert seconds("{0,2},{1,3},{2,0},{3,1}", "{0,2},{1,3},{2,0},{3,1}") == pytest.approx(4 * message), "two hops each"
    assert seconds(up, down, "v5p:8x4x2") == pytest.approx(2 * message), "an open line: 3 to 0 goes back over it"
    both = ",".join(f"{{{2 * x + core},{2 * x + 2 + core}}}" for x in range(3) for core in range(2))
    assert seconds(both, both, "7x:4x4x4") == pytest.approx(4 * message), "two devices of a chip send over its links"


def test_slices_are_joined_by_the_network():
    text = """
ENTRY %main (w: f32[1024]) -> f32[1024] {
  %w = f32[1024]{0} parameter(0)
  ROOT %r = f32[1024]{0} all-reduce(%w), channel_id=1, replica_groups={{0,2},{1,3}}, to_apply=%add
}
"""
    module, slices = parse(text), Layout(AXES, ((0, 0), (1, 0), (0, 0), (1, 0)), (0, 0, 1, 1))
    traffic = Traffic(module, slices, V5E.chip, V5E)
    (collective, _), = Roofline(module, Costs(module), traffic, Peaks(1, 1)).step().collectives
    assert collective.over == ("data",) and collective.ici_seconds == 0
    assert collective.dcn_seconds == pytest.approx(4096 / 3.125e9)


def test_what_a_sparse_core_does_begins_with_its_operands():
    """As libtpu writes a collective that it gives to the SparseCores: started without operands, begun by an update."""
    text = """
%gather (w: bf16[512,1024]) -> bf16[1024,1024] {
  %w = bf16[512,1024]{1,0} parameter(0)
  ROOT %g = bf16[1024,1024]{1,0} all-gather(%w), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
}, execution_thread="sparsecore"

%wrapped (w: bf16[512,1024]) -> bf16[1024,1024] {
  %w = bf16[512,1024]{1,0} parameter(0)
  ROOT %c = bf16[1024,1024]{1,0} custom-call(%w), custom_call_target="TODO", called_computations={%gather}
}, execution_thread="sparsecore"

ENTRY %main (w: bf16[512,1024], x: bf16[1024,1024]) -> bf16[1024,1024] {
  %w = bf16[512,1024]{1,0} parameter(0)
  %x = bf16[1024,1024]{1,0} parameter(1)
  %start = ((), (), (s32[8]{0})) async-start(), async_execution_thread="sparsecore", calls=%wrapped
  %update = ((bf16[512,1024]{1,0}), bf16[1024,1024]{1,0}, (s32[8]{0})) async-update(%start, %w)
  %y = bf16[1024,1024]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %done = bf16[1024,1024]{1,0} async-done(%update)
}
"""
    slow, fast = step_of(text, Peaks(1e12, 1e15)), step_of(text, Peaks(1e18, 1e18))
    (collective, times), = slow.collectives
    assert collective.asynchronous and times == 1 and collective.wire_bytes == MATRIX / 2
    assert slow.exposed["fsdp"] == 0 and fast.exposed["fsdp"] == pytest.approx(MATRIX / 2 / 50e9, rel=1e-3)


def test_what_the_hosts_exchange_runs_beside_the_work():
    """As libtpu writes an all-reduce between slices."""
    meeting = ('frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",'
               '_xla_megascale_transfer_type="ALL_REDUCE"}')
    text = f"""
ENTRY %main (w: f32[1024]) -> f32[1024] {{
  %w = f32[1024]{{0}} parameter(0)
  %token = token[] after-all()
  %recv = (f32[1024]{{0}}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, {meeting}
  %send = (f32[1024]{{0}}, u32[], token[]) send(%w, %token), channel_id=2, is_host_transfer=true, {meeting}
  %sent = token[] send-done(%send), channel_id=2
  %done = (f32[1024]{{0}}, token[]) recv-done(%recv), channel_id=1
  ROOT %sum = f32[1024]{{0}} get-tuple-element(%done), index=0
}}
"""
    module, slices = parse(text), Layout(AXES, ((0, 0), (1, 0), (0, 0), (1, 0)), (0, 0, 1, 1))
    step = Roofline(module, Costs(module), Traffic(module, slices, V5E.chip, V5E), Peaks(1e12, 1e12)).step()
    (collective, times), = step.collectives
    assert (collective.kind, collective.over, times, collective.wire_bytes) == ("all-reduce", ("data",), 1, 4096)
    assert step.exposed["data"] == pytest.approx(4096 / 3.125e9)


def test_a_compiled_program_is_read_as_it_was_written():
    """On 8 fake CPU devices: 5 scanned products, each of a matrix gathered over fsdp."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))

    def step(ws, x):
        def layer(x, w):
            return x @ jax.sharding.reshard(w, P(None, None)), None

        return jax.lax.scan(layer, x, ws)[0]

    with jax.set_mesh(mesh):
        ws = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp", None)))
        x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"), None)))
        text = jax.jit(step).lower(ws, x).compile().as_text()
    module, axes = parse(text), dict(mesh.shape)
    layout = Layout(axes, tuple((i,) for i in range(8)), (0,) * 8)
    played = Roofline(module, Costs(module), Traffic(module, layout, None, V5E), Peaks(1.0, 1.0)).step()
    assert played.flops == 5 * 2 * 2 * 64 * 64
    table = by_axis(played.collectives)
    assert {axis: {kind: row["bytes"] for kind, row in kinds.items()} for axis, kinds in table.items()} == {
        "fsdp": {"all-gather": 5 * 64 * 64 * 4 * 3 / 4}}


def test_assigned_memory():
    text = """BufferAssignment:
allocation 0: size 1024, page 0, thread-local:
allocation 1: size 4000, page 0, parameter 1, shape |f32[1000]| at ShapeIndex {}, maybe-live-out:
allocation 2: size 50, page 0, constant:
allocation 3: size 700, page 0, preallocated-temp:
allocation 4: size 900, color 1, page 0, preallocated-temp:
"""
    assert assigned_bytes(text) == {"arguments": 4000, "temporaries": 700, "constants": 50}
    with pytest.raises(ValueError, match="no allocation"):
        assigned_bytes("something else")
