"""Stages, and what waits in the host's memory, as the TPU's compiler has them: a slice that is not there."""

import functools
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

config = from_dict(RunConfig, json.loads(sys.argv[1]))
mesh = make_mesh(config.mesh, topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)
with jax.set_mesh(mesh):
    compiled = compile_step(config, mesh)
memory, text = compiled.memory_analysis(), compiled.as_text()
print(json.dumps({"permutes": text.count("collective-permute-start("),
                  "sums_in_loops": text.partition("ENTRY ")[0].count(" all-reduce("),
                  "arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
                  "on_host": memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes}))
"""
SHAPE = {
    "model": dict(num_layers=4, hidden_dim=512, num_heads=8, num_kv_heads=4, head_dim=64, mlp_dim=1024,
                  vocab_size=4096),
    "train": dict(num_steps=10, global_batch_size=64, seq_len=512),
    "schedule": dict(warmup_steps=1),
}
LAYERS = 4 * (512 * 4 * 4 * 64 + 512 * 512 + 3 * 512 * 1024)
STATE = 3 * 4 * (LAYERS + 4096 * 512)


def compiled(**sections):
    return compiled_once(json.dumps({**SHAPE, **sections}))


@functools.cache
def compiled_once(config):
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    environment = {**os.environ, **quiet, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu",
                   "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM, config], env=environment, capture_output=True, text=True,
                          timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_stages_hold_their_layers_and_permute_without_waiting():
    got = compiled(mesh=dict(stage=2, data=2, fsdp=2), compute=dict(pipeline_repeats=2), remat=dict(policy="stage"))
    assert got["permutes"] > 0
    assert got["arguments"] < 1.1 * 3 * 4 * (LAYERS / 4 + 4096 * 512 / 2), "the layers are not split over the stages"


@pytest.mark.slow
def test_gradients_are_summed_over_replicas_after_the_last_tick():
    got = compiled(mesh=dict(stage=2, data=4, fsdp=1), remat=dict(policy="stage"))
    assert got["sums_in_loops"] == 0


@pytest.mark.slow
def test_the_optimizers_state_leaves_the_device():
    """And it comes back when the activations have left."""
    sections = dict(mesh=dict(fsdp=8), remat=dict(policy="names"))
    kept, offloaded = compiled(**sections), compiled(**sections, compute=dict(offload_optimizer=True))
    moments = STATE / 8 * 2 / 3
    assert kept["on_host"] == 0 and offloaded["on_host"] > 0.9 * moments
    total = [got["arguments"] + got["temporaries"] for got in (kept, offloaded)]
    assert total[1] < total[0] - 0.8 * moments


@pytest.mark.slow
def test_activations_leave_the_device():
    kept, offloaded = (compiled(mesh=dict(fsdp=8), remat=dict(policy=policy)) for policy in ("names", "names_offload"))
    assert kept["on_host"] == 0 < offloaded["on_host"]
    assert offloaded["temporaries"] < 0.6 * kept["temporaries"]
