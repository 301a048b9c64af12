"""What 8-bit products are compiled to: on this CPU, on a GPU by its HLO's form, on a TPU ahead of time."""


import jax
import pytest

from maxlm.numerics import PRODUCTS
from maxlm.parallel.mesh import make_mesh
from maxlm.training.compiled_products import products, slow_products
from maxlm.training.step import compile_step
from tests.training.tiny import tiny_config

# Lines as XLA prints them for an H100.
GPU = '''
  %cublas-gemm.1 = (bf16[32768,8192]{1,0}, s8[33554432]{0}) custom-call(%a, %b), custom_call_target="CALL", metadata={op_name="jit(train_step)/jvp()/while/body/fp8_forward/dot_general" source_line=9}, backend_config={}
  %cublas-gemm.2 = (bf16[32768,2048]{1,0}, s8[33554432]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul$f8", metadata={op_name="jit(train_step)/transpose(jvp())/while/body/fp8_input_gradient/dot_general"}
  ROOT %cublas-gemm.3 = (bf16[2048,8192]{1,0}, s8[33554432]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul$f8", metadata={op_name="jit(train_step)/transpose(jvp())/fp8_weight_gradient/dot_general"}
  %cublas-gemm.4 = (bf16[4096,128256]{1,0}, s8[33554432]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(train_step)/head/dot_general"}
  %cudnn = (bf16[8,4096]{1,0}, s8[0]{0}) custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(train_step)/attention"}
'''  # noqa: E501
FP8_CALL = "__cublas$lt$matmul$f8"


def test_the_calls_of_a_gpu_are_counted_by_product():
    found = products(GPU.replace("CALL", FP8_CALL))
    assert found == {
        "forward": {FP8_CALL: {"bf16[32768,8192]": 1}}, "input_gradient": {FP8_CALL: {"bf16[32768,2048]": 1}},
        "weight_gradient": {FP8_CALL: {"bf16[2048,8192]": 1}},
        "other": {"__cublas$lt$matmul": {"bf16[4096,128256]": 1}},
    }
    assert slow_products(found) == []
    slow = slow_products(products(GPU.replace("CALL", "__cublas$lt$matmul")))
    assert slow == ["forward: 1 of bf16[32768,8192] by __cublas$lt$matmul"]
    assert slow_products({}) == [f"{product}: none found" for product in PRODUCTS]


@pytest.mark.parametrize("recipe", ["fp8", "fp8_block", "bf16"])
def test_all_three_products_of_every_site_are_found_in_a_compiled_step(recipe):
    """qkv, out, gate, up, down: five a layer, in each product."""
    config = tiny_config(precision=dict(recipe=recipe), mesh=dict(fsdp=1),
                         model=dict(num_layers=1, layer_pattern=["global"]))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        found = products(compile_step(config, mesh).as_text())
    counts = {product: sum(sum(shapes.values()) for shapes in found.get(product, {}).values()) for product in PRODUCTS}
    assert counts == dict.fromkeys(PRODUCTS, 5 if recipe != "bf16" else 0)
    assert found["other"]
