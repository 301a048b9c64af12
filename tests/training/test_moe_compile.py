"""What the compiled step of a sparse model gathers, and that it compiles for a TPU slice that is not there."""

import json
import math
import os
import re
import subprocess
import sys

import jax
import pytest

from maxlm.parallel.mesh import make_mesh
from maxlm.training.step import compile_step
from tests.training.tiny import tiny_config

E, D, F = 16, 64, 64
SPARSE = dict(num_layers=3, layer_pattern=["global"], hidden_dim=D, num_experts=E, experts_per_token=2, expert_dim=F)


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [1, "all"])
def test_no_gather_is_larger_than_one_layers_shard_of_one_expert_matrix(unroll):
    """The partitioner is the TPU's; FSDP gathers an expert matrix over `fsdp` alone, a layer at a time."""
    config = tiny_config(model=SPARSE, mesh=dict(expert=4, fsdp=2), compute=dict(layer_unroll=unroll))
    mesh = make_mesh(config.mesh, jax.devices()[:8])
    with jax.set_mesh(mesh):
        text = compile_step(config, mesh).as_text()
    gathers = re.findall(r"= (\S+?)\{?[0-9,]*\}? all-gather(?:-start)?\(", text)
    sizes = [math.prod(map(int, dims.split(","))) for kind in gathers for dims in re.findall(r"\[([0-9,]+)\]", kind)]
    assert max(sizes) == E * D * F // 4, "equal: the gathers of experts are among those that were found"


PROGRAM = """
import json, sys
import jax
from jax.experimental import topologies
from maxlm.overrides import apply_overrides, load_config
from maxlm.parallel.mesh import make_mesh
from maxlm.training.step import compile_step

config = apply_overrides(load_config(sys.argv[1]), json.loads(sys.argv[2]))
mesh = make_mesh(config.mesh, topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2").devices)
with jax.set_mesh(mesh):
    print(compile_step(config, mesh).memory_analysis().argument_size_in_bytes)
"""
SMALL = ["model.num_layers=2", "model.moe.dense_layers=1", "model.hidden_dim=512", "model.mlp_dim=512",
         "model.num_heads=4", "model.num_kv_heads=2", "model.num_experts=16", "model.expert_dim=256",
         "model.vocab_size=1024", "train.seq_len=512", "train.global_batch_size=8", "train.grad_accumulation=1",
         "mesh.expert=4", "mesh.fsdp=2"]


@pytest.mark.slow
def test_the_recipe_of_deepseek_v3_compiles_smaller_for_a_slice():
    """With the ragged exchange, which is what 'auto' takes there."""
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    environment = {**os.environ, **quiet, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu",
                   "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM, "configs/deepseek_v3_moe.py", json.dumps(SMALL)],
                          env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    experts = 16 * 3 * 512 * 256
    assert experts * 12 / 8 < int(done.stdout.splitlines()[-1]) < 2 * experts * 12 / 8, "the experts are not split"
