"""What 8-bit products are compiled to: on this CPU, on a GPU by its HLO's form, on a TPU ahead of time."""

import json
import os
import re
import subprocess
import sys

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


TPU = """
import json, sys
import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from maxlm.config import PrecisionConfig
from maxlm.numerics import numerics_of
from maxlm.training.compiled_products import products

product = numerics_of(PrecisionConfig(recipe="fp8"), "tpu").mlp
device = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices[0]


def all_three(x, w, g):
    def multiply(x, w):
        return product.einsum("BTD,DF->BTF", x, nnx.Param(w, dims=("embed", "mlp")), ("batch", None, "mlp"))

    y, pull = jax.vjp(multiply, x, w)
    return y, *pull(g)


shapes = (((2, 128, 256), "bfloat16"), ((256, 512), "float32"), ((2, 128, 512), "bfloat16"))
arrays = [jax.ShapeDtypeStruct(*shape, sharding=SingleDeviceSharding(device)) for shape in shapes]
print(json.dumps(products(jax.jit(all_three).lower(*arrays).compile().as_text())))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "native"), [("tpu7x:2x2x1", True), ("v5e:2x2", False)])
def test_a_tpu7x_multiplies_8_bits_natively(topology, native, tmp_path):
    """Every matrix instruction of the final program is on 8-bit floats there, and none on a v5e, which has no such
    units, though the HLO of both is the same."""
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    environment = {**os.environ, **quiet, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu",
                   "PYTHONPATH": os.pathsep.join(sys.path), "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={tmp_path}"}
    done = subprocess.run([sys.executable, "-c", TPU, topology], env=environment, capture_output=True, text=True,
                          timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {name: list(calls) for name, calls in json.loads(done.stdout.splitlines()[-1]).items()} == {
        "forward": ["convolution f8e4m3fn f8e4m3fn"], "input_gradient": ["convolution f8e5m2 f8e4m3fn"],
        "weight_gradient": ["convolution f8e4m3fn f8e5m2"]}
    programs = [path.read_text() for path in tmp_path.glob("*-final_bundles.txt") if "analysis" not in path.name]
    instructions = [word for text in programs for word in re.findall(r"\bvmatmul[\w.]*", text)]
    in_8_bits = [word for word in instructions if ".f8e" in word]
    assert instructions and len(in_8_bits) == (len(instructions) if native else 0)
