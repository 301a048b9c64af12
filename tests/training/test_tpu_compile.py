"""The whole training step compiles for TPU slices that are not there (libtpu's topologies), in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
import jax
from jax.experimental import topologies
from maxlm.config import RunConfig
from maxlm.parallel.mesh import make_mesh
from maxlm.schema import from_dict
from maxlm.training.step import compile_step

config = from_dict(RunConfig, json.loads(sys.argv[2]))
mesh = make_mesh(config.mesh, topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices)
with jax.set_mesh(mesh):
    compiled = compile_step(config, mesh)
text = compiled.as_text()
sums, inside = [], ""
for line in text.splitlines():
    if line.endswith("{") and not line.startswith(" "):
        inside = line.split()[0].lstrip("%")  # the name of a computation
    if " all-reduce(" in line or " reduce-scatter(" in line:
        sums.append([inside, line.split(" = ")[1].split("{")[0], "reduce-scatter(" in line])
print(json.dumps({"splash": "splash_mha" in text, "gathers": "all-gather" in text, "sums": sums,
                  "permutes": text.count(" collective-permute(") + text.count(" collective-permute-start("),
                  "arguments": compiled.memory_analysis().argument_size_in_bytes}))
"""
SHAPE = {
    "model": dict(num_layers=2, hidden_dim=512, num_heads=8, num_kv_heads=4, head_dim=64, mlp_dim=1024,
                  vocab_size=4096, layer_pattern=["local", "global"], sliding_window=256),
    "train": dict(num_steps=10, global_batch_size=4, seq_len=512),
    "schedule": dict(warmup_steps=1),
}


def compiled_for(topology, **sections):
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    environment = {**os.environ, **quiet, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu",
                   "PYTHONPATH": os.pathsep.join(sys.path)}
    config = json.dumps({**SHAPE, **sections})
    done = subprocess.run([sys.executable, "-c", PROGRAM, topology, config], env=environment, capture_output=True,
                          text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "mesh", "way"), [
    ("v5p:2x2x1", {}, "auto"), ("v5e:2x2", {"tensor": 2}, "auto"), ("v5e:2x2", {"context": 4}, "auto"),
    ("v5e:2x2", {"context": 4}, "ring"),
])
def test_the_step_compiles_for_a_slice(topology, mesh, way):
    record = compiled_for(topology, mesh=mesh, train=SHAPE["train"] | {"seq_len": 1024},
                          compute={"context_attention": way})
    assert record["splash"] == (way != "ring")
    # Where `tensor` splits the residual stream, the compiler may make its gathers of permutes too.
    assert "tensor" in mesh or (record["permutes"] > 16) == (way == "ring")
    assert record["gathers"]
    parameters = 4096 * 512 + 2 * (512 * 4 * 4 * 64 + 512 * 512 + 3 * 512 * 1024)
    assert record["arguments"] < 1.1 * (3 * 4 * parameters) / 4, "parameters and moments are not split over the slice"


@pytest.mark.slow
def test_the_residual_stream_is_gathered_and_scattered_over_tensor():
    """On TPU a reduce-scatter is an instruction, or a fusion that holds an all-reduce; no other sums activations."""
    record = compiled_for("v5e:2x2", mesh={"context": 2, "tensor": 2}, train=SHAPE["train"] | {"seq_len": 1024})
    activations = [name for name, shape, scatter in record["sums"] if shape == "bf16[4,512,512]" and not scatter]
    assert activations and all(name.startswith("all-reduce-scatter") for name in activations)
    assert len(activations) == 2 * 2 * 2  # layers, sublayers, forward and backward: gate and up are summed first
