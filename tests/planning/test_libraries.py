"""What a GPU's program multiplies is in calls of libraries: the whole step's count against what its config needs.

The two programs are `maxlm bench`'s of olmoe_1b_7b with 8 layers and 8 rows of 4096 on an H100 (commit eb832a4),
trimmed to their products; `tests/golden/README.md` says how.
"""

import dataclasses
import gzip
import pathlib
import re

import pytest

from maxlm.config import RunConfig
from maxlm.flops import mean_visible_keys, parameter_count, training_flops_per_token
from maxlm.hardware import chip_of
from maxlm.overrides import apply_overrides, load_config
from maxlm.planning import report
from maxlm.planning.compiled import Compiled
from maxlm.planning.table import verdict
from maxlm.planning.topology import find_target
from maxlm.schema import from_dict
from tests.planning.test_hlo import step_of

ROOT = pathlib.Path(__file__).parents[2]
ROWS, LENGTH, BLOCK = 8, 4096, 128
TOKENS = ROWS * LENGTH


def program(precision):
    return gzip.decompress((ROOT / f"tests/golden/gpu/olmoe_8_layers_{precision}.hlo.gz").read_bytes()).decode()


def config_of(precision):
    given = ["model.num_layers=8", f"train.global_batch_size={ROWS}", f"train.seq_len={LENGTH}",
             f"precision.recipe={precision}"]
    return apply_overrides(load_config(ROOT / "configs" / "olmoe_1b_7b.py"), given)


def expected(model):
    """Useful FLOPs, the scores that attention's gradient makes again, and the rows that fill up experts' blocks."""
    useful = training_flops_per_token(model, LENGTH) * TOKENS
    pairs = model.num_layers * model.num_heads * model.head_dim * mean_visible_keys(LENGTH, LENGTH) * TOKENS
    experts = 6 * parameter_count(model).active_experts * TOKENS
    filled = model.num_experts * BLOCK / (TOKENS * model.experts_per_token)
    return useful, useful + 2 * pairs + filled * experts


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_gpus_program_makes_the_products_of_its_config(precision):
    useful, executed = expected(config_of(precision).model)
    found = step_of(program(precision)).flops
    assert found == pytest.approx(executed, rel=0.005) and found > useful


@pytest.mark.parametrize(("removed", "least"), [
    (r"__cublas\$lt\$matmul", 0.3), (r"__cudnn\$fmha\w+", 0.1), ("mosaic_gpu_v2", 0.5)])
def test_each_library_counts(removed, least):
    """The twin of the whole count: a library that is not known takes its products out of it."""
    text = program("bf16")
    rest = re.sub(f'custom_call_target="{removed}"', 'custom_call_target="another"', text)
    assert step_of(rest).flops < (1 - least) * step_of(text).flops


GATED = """
ENTRY %main (group: s32[4], weight: f32[256], x: bf16[256,32], gate: bf16[4,32,64], down: bf16[4,64,32], units: bf16[256,64]) -> bf16[256,64] {
  %group = s32[4] parameter(0)
  %weight = f32[256] parameter(1)
  %x = bf16[256,32] parameter(2)
  %gate = bf16[4,32,64] parameter(3)
  %down = bf16[4,64,32] parameter(4)
  %units = bf16[256,64] parameter(5)
  ROOT %out = (bf16[256,64], bf16[256,64], bf16[256,64]) custom-call(OPERANDS), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(NAME)/mpmd_map"}
}
"""  # noqa: E501


@pytest.mark.parametrize(("name", "operands", "products"), [
    ("gated_product", "%group, %weight, %x, %gate, %gate", 2),
    ("gated_gradients", "%group, %weight, %x, %down, %units, %units", 1), ("another", "%group, %weight, %x, %gate", 0)])
def test_kernels_of_gated_units_count_their_products(name, operands, products):
    """Gate's and up's, or down's gradient: the units and weights that they also take are no factors."""
    assert step_of(GATED.replace("OPERANDS", operands).replace("NAME", name)).flops == products * 2 * 256 * 32 * 64


def test_experts_on_several_devices_count_the_rows_of_an_even_load():
    whole, half = (step_of(program("bf16"), rows_used=used).flops for used in (1.0, 0.5))
    experts = 6 * parameter_count(config_of("bf16").model).active_experts * TOKENS
    assert whole - half == pytest.approx(experts / 2, rel=0.04), "experts' products alone, block by block"


def test_of_branches_one_runs():
    """Attention of one document, of packed ones, and with a bias are branches: all would be three times as much."""
    branch = re.findall(r"branch_computations=\{([^}]*)\}", program("bf16"))
    assert branch and all(len(names.split(",")) == 3 for names in branch)
    text = """
%once (x: f32[64,64]) -> f32[64,64] {
  %x = f32[64,64] parameter(0)
  ROOT %d = f32[64,64] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%twice (x: f32[64,64]) -> f32[64,64] {
  %x = f32[64,64] parameter(0)
  %d = f32[64,64] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %e = f32[64,64] dot(%d, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (p: pred[], x: f32[64,64]) -> f32[64,64] {
  %p = pred[] parameter(0)
  %x = f32[64,64] parameter(1)
  ROOT %c = f32[64,64] conditional(%p, %x, %x), BRANCHES
}
"""
    for branches in ("branch_computations={%once, %twice}", "true_computation=%twice, false_computation=%once"):
        assert step_of(text.replace("BRANCHES", branches)).flops == 2 * 2 * 64**3


WINDOWED = """
ENTRY %main (q: bf16[2,T,4,64], k: bf16[2,T,4,64]) -> bf16[2,4,T,64] {
  %q = bf16[2,1024,4,64] parameter(0)
  %k = bf16[2,KEYS,4,64] parameter(1)
  ROOT %a = (bf16[2,4,1024,64], u8[0]) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax",
backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"dimensions":["2","4","1024","KEYS"]},"mask_type":"MASK","sliding_window_length":WINDOW}}
}
"""  # noqa: E501


@pytest.mark.parametrize(("keys", "mask", "window", "pairs"), [
    (1024, "CAUSAL", 0, 1024 * 1025 / 2), (1024, "CAUSAL", 128, 128 * 129 / 2 + (1024 - 128) * 128),
    (1024, "NO_MASK", 0, 1024**2), (2048, "PADDING_CAUSAL", 0, 1024 * 2048)])
def test_attention_counts_the_pairs_that_its_mask_shows(keys, mask, window, pairs):
    text = WINDOWED.replace("KEYS", str(keys)).replace("MASK", mask).replace("WINDOW", str(window))
    assert step_of(text).flops == 2 * 2 * 2 * 4 * 64 * pairs
    backward = text.replace("fmhaSoftmax", "fmhaSoftmaxBackward")
    assert step_of(backward).flops == 5 * 2 * 2 * 4 * 64 * pairs


def judged(config, text, device_kind="NVIDIA H100 80GB HBM3", stage=1):
    axes = dict.fromkeys(("data", "stage", "fsdp", "expert", "context", "tensor"), 1) | {"stage": stage}
    facts = {"device_kind": device_kind, "coords": [[0]] * stage, "slices": [0] * stage, "axes": axes, "kernels": "",
             "parameter_bytes": 1, "optimizer_bytes": 1, "lower_seconds": 1.0, "compile_seconds": 1.0}
    memory = {"arguments": 2, "temporaries": 0, "constants": 0}
    return report.judge(config, find_target("gpu"), Compiled(facts, text, memory))


def test_a_report_says_where_products_were_not_found():
    config, text = config_of("bf16"), program("bf16")
    whole = judged(config, text)
    assert whole["executed_flops_per_device"] > whole["flops_per_step"] and whole["warnings"] == []
    missing = judged(config, text.replace("mosaic_gpu_v2", "another_kernel"))
    assert "executed_flops_per_device is too low" in missing["warnings"][0]


@pytest.mark.parametrize(("moe", "experts", "told"), [
    ({}, 1, True), ({"capacity_factor": 0.5}, 1, False), ({"capacity_factor": 2.0}, 1, True),
    ({"buffer_factor": 0.5}, 1, True), ({"buffer_factor": 0.5}, 2, False)])
def test_experts_that_leave_useful_products_out_are_not_taken_for_unknown_calls(moe, experts, told):
    """Of a program with seven tenths of its useful products; one with a third of them is told of anyway."""
    config = config_of("bf16")
    bounded = dataclasses.replace(config.model, moe=dataclasses.replace(config.model.moe, **moe))
    config = dataclasses.replace(config, model=bounded)
    assert bool(report.unread(config, {"expert": experts}, 0.7, 1.0)) == told
    assert report.unread(config, {"expert": experts}, 1 / 3, 1.0)


@pytest.mark.parametrize(("recipe", "arithmetic"), [("bf16", "bf16"), ("fp8", "bf16"), ("float32", "tf32")])
def test_mfu_is_what_a_run_of_it_would_report(recipe, arithmetic):
    """`maxlm bench` measures FP8 against the bf16 peak, and float32 against TF32's (training/throughput.py)."""
    table = {"model": dict(num_layers=2, hidden_dim=512, num_heads=8, num_kv_heads=4, head_dim=64, mlp_dim=1024,
                           vocab_size=4096), "precision": {"recipe": recipe}}
    config = from_dict(RunConfig, table)
    record = judged(config, program("bf16"))
    peak = chip_of("NVIDIA H100 80GB HBM3").peak(arithmetic)
    assert record["mfu_estimate"] == pytest.approx(record["flops_per_step"] / record["step_seconds_estimate"] / peak)
    without = chip_of("TPU v5p").peak(arithmetic) is None
    assert (judged(config, program("bf16"), "TPU v5p")["mfu_estimate"] is None) == without


def test_stages_on_gpus_have_no_time():
    """The calibrated model would give each stage all layers: 1.008 s for a step of 0.766 s on two H200."""
    record = judged(config_of("bf16"), program("bf16"), stage=2)
    assert record["step_seconds_estimate"] is None and record["mfu_estimate"] is None and record["roofline"] is None
    assert "knows no stages" in record["warnings"][0] and record["executed_flops_per_device"] > 0
    assert "fits: 0.000 MB of" in verdict(record)
