"""What instructions cost where their text has to be read between the lines; tests/planning/test_hlo.py has the rest."""

import pytest

from maxlm.planning.cost import Costs
from maxlm.planning.hlo import parse
from maxlm.planning.roofline import Peaks
from tests.planning.test_hlo import MATRIX, step_of


def test_a_grouped_product_counts_what_its_kernel_states():
    """Of the rows that experts have room for, those that an even load fills. As libtpu writes one of mosaic_tpu.py."""
    text = """
ENTRY %main (n: s32[9], x: bf16[4096,256], w: bf16[8,256,128]) -> bf16[4096,128] {
  %n = s32[9]{0} parameter(0)
  %x = bf16[4096,256]{1,0} parameter(1)
  %w = bf16[8,256,128]{2,1,0} parameter(2)
  ROOT %k = bf16[4096,128]{1,0} custom-call(%n, %x, %w), custom_call_target="tpu_custom_call",
backend_config={"custom_call_config":{"body":"TUz","cost_estimate":{"bytes_accessed":"1","flops":"268435456"}}}
}
"""
    assert step_of(text).flops == 2 * 4096 * 256 * 128
    module = parse(text)
    entry = module.computations["main"]
    half = Costs(module, lanes=256, rows_used=0.5).of(entry, entry["k"])
    assert half.flops == 4096 * 256 * 128 and half.unit_flops == 2 * half.flops, "128 columns cost as 256"
    assert step_of(text.replace('"flops":"268435456"', '"other":"0"')).flops == 0


def test_a_copy_that_a_fusion_only_slices_is_no_traffic():
    """As libtpu writes loops over layers for TPU7x: the stack is turned inside of the fusion that takes a layer."""
    text = """
%copied (s: bf16[8,1024,1024]) -> bf16[8,1024,1024] {
  %s = bf16[8,1024,1024]{2,1,0} parameter(0)
  ROOT %c = bf16[8,1024,1024]{1,2,0} copy(%s)
}

%one_layer (stack: bf16[8,1024,1024], i: s32[]) -> bf16[1,1024,1024] {
  %stack = bf16[8,1024,1024]{2,1,0} parameter(0)
  %turned = bf16[8,1024,1024]{1,2,0} fusion(%stack), kind=kLoop, calls=%copied
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %d = bf16[1,1024,1024]{1,2,0} dynamic-slice(%turned, %i, %zero, %zero), dynamic_slice_sizes={1,1024,1024}
}

ENTRY %main (stack: bf16[8,1024,1024], i: s32[]) -> bf16[1,1024,1024] {
  %stack = bf16[8,1024,1024]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = bf16[1,1024,1024]{1,2,0} fusion(%stack, %i), kind=kLoop, calls=%one_layer
}
"""
    module = parse(text)
    entry = module.computations["main"]
    assert Costs(module).of(entry, entry["f"]).bytes == 2 * MATRIX + 4
    module = parse(text.replace("copy(%s)", "negate(%s)"))
    entry = module.computations["main"]
    assert Costs(module).of(entry, entry["f"]).bytes == 9 * MATRIX + 4, "what works on all of it reads all of it"


def test_a_sparsecore_gather_reads_the_rows_that_it_writes():
    text = """
%rows (x: bf16[65536,1024], i: s32[1024]) -> bf16[1024,1024] {
  %x = bf16[65536,1024]{1,0} parameter(0)
  %i = s32[1024]{0} parameter(1)
  ROOT %c = bf16[1024,1024]{1,0} custom-call(%x, %i), custom_call_target="its program"
}

ENTRY %main (x: bf16[65536,1024], i: s32[1024]) -> bf16[1024,1024] {
  %x = bf16[65536,1024]{1,0} parameter(0)
  %i = s32[1024]{0} parameter(1)
  %s = ((bf16[65536,1024], s32[1024]), bf16[1024,1024], u32[]) async-start(%x, %i), calls=%rows,
metadata={op_name="jit(step)/shard_map/gather"}
  ROOT %d = bf16[1024,1024]{1,0} async-done(%s), metadata={op_name="jit(step)/shard_map/gather"}
}
"""
    assert step_of(text, Peaks(1.0, 1e9)).seconds == pytest.approx(2 * MATRIX / 1e9)
    other = text.replace("shard_map/gather", "shard_map/sort")
    assert step_of(other, Peaks(1.0, 1e9)).seconds > 60 * MATRIX / 1e9
