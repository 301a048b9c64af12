"""DeepSeek-V3's shape on 512 v5p chips: what of its experts' weights is gathered, read from the compiled program."""

import pathlib

import pytest

from maxlm.overrides import apply_overrides, load_config
from maxlm.planning.compiled import compile_for
from maxlm.planning.hlo import parse
from maxlm.planning.topology import find_target

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "deepseek_v3_moe.py"
MESH = ["mesh.expert=32", "mesh.fsdp=16"]
EXPERTS, WIDTH, UNITS = 256 // 32, 7168, 2048


def moved_weights(hlo):
    """Elements of what collectives of a program make of experts' weights: arrays over both of their sizes, or over one
    and a part of the other."""
    module = parse(hlo)
    sizes = []
    for name in module.runs():
        for node in module.computations[name]:
            if node.opcode.removesuffix("-start") in ("all-gather", "all-reduce", "reduce-scatter"):
                sizes += [s.elements for s in node.shapes if len(s.dims) >= 3 and {WIDTH, UNITS} <= set(s.dims)]
    return sizes


@pytest.mark.slow
def test_expert_weights_are_gathered_a_matrix_of_one_layer_at_a_time():
    config = apply_overrides(load_config(CONFIG), MESH)
    compiled = compile_for(config, find_target("v5p:8x8x8"))
    sizes = moved_weights(compiled.hlo)
    assert sizes and max(sizes) == EXPERTS * WIDTH * UNITS, "one matrix of one layer, for the experts of a chip"
    needed = sum(compiled.memory.values())
    assert needed < 60e9, f"{needed / 1e9:.1f} GB a chip"


def test_a_gather_of_the_whole_stack_would_be_seen():
    text = """
ENTRY %main (w: bf16[58,8,448,2048]) -> bf16[58,8,7168,2048] {
  %w = bf16[58,8,448,2048]{3,2,1,0} parameter(0)
  ROOT %g = bf16[58,8,7168,2048]{3,2,1,0} all-gather(%w), channel_id=1, replica_groups=[32,16]<=[512], dimensions={2}
}
"""
    assert max(moved_weights(text)) == 58 * EXPERTS * WIDTH * UNITS
