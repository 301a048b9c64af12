"""Meshes: what must divide what, and several TPU slices (libtpu's topologies, in a process of their own)."""

import contextlib
import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxlm.config import MeshConfig, ModelConfig, RunConfig, ScheduleConfig, TrainConfig
from maxlm.parallel.mesh import axis_sizes, check_divisible, make_mesh
from maxlm.parallel.sharding import STORAGE, spec, use, use_apart
from maxlm.schema import ConfigError

PROGRAM = """
import json
import jax
from jax.experimental import topologies
from maxlm.config import AXES, MeshConfig
from maxlm.parallel.mesh import make_mesh
from maxlm.schema import ConfigError

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
mesh = make_mesh(MeshConfig(data=4, tensor=2), devices)
assert mesh.axis_names == AXES
slices = [[device.slice_index for device in replica.flat] for replica in mesh.devices]
try:
    make_mesh(MeshConfig(fsdp=8), devices)
except ConfigError as error:
    print(json.dumps({"slices": slices, "error": str(error)}))
"""


def test_only_data_runs_between_slices():
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    environment = {**os.environ, **quiet, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu",
                   "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["slices"] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert record["error"] == ("mesh.data=1 is not a multiple of the 2 TPU slices, which must split no other axis: set "
                               "it to 2, or to a multiple")


def test_fsdp_takes_what_the_other_axes_leave():
    assert axis_sizes(MeshConfig(data=2, context=2), 16) == dict(data=2, stage=1, fsdp=4, expert=1, context=2, tensor=1)
    with pytest.raises(ConfigError, match=r"mesh.data \* mesh.context = 4 does not divide the 6 devices"):
        axis_sizes(MeshConfig(data=2, context=2), 6)


@pytest.mark.parametrize(("mesh", "model", "train", "words"), [
    (dict(context=4), {}, dict(seq_len=36), "train.seq_len=36 is not a multiple of 8, the parts that mesh.context=4"),
    (dict(tensor=8), {}, dict(seq_len=12), "train.seq_len=12 is not a multiple of 8, .* mesh.tensor=8"),
    (dict(context=2, tensor=4), {}, dict(seq_len=12), "train.seq_len=12 is not a multiple of 8"),
    (dict(context=4), dict(hidden_dim=30), {}, r"model.hidden_dim=30 is not a multiple of mesh.fsdp \* mesh.expert \* "
                                               "mesh.context=4"),
])
def test_what_does_not_divide_is_told(mesh, model, train, words):
    sizes = SimpleNamespace(shape=axis_sizes(MeshConfig(fsdp=1, **mesh), 4 if "tensor" not in mesh else 8))
    given = dict(num_heads=8, num_kv_heads=8, mlp_dim=64, vocab_size=64, hidden_dim=32, head_dim=4) | model
    with pytest.raises(ConfigError, match=words):
        check_divisible(sizes, RunConfig(model=ModelConfig(**given), schedule=ScheduleConfig(warmup_steps=1),
                                         train=TrainConfig(**(dict(global_batch_size=8, seq_len=64) | train))))


@pytest.mark.parametrize("sizes", [None, dict(fsdp=4, expert=2)])
def test_a_weight_cast_apart_is_the_same_weight(sizes):
    """To the bit, in its layout too, and so is its gradient; not to be folded away, which is what it is for."""
    mesh = make_mesh(MeshConfig(**sizes)) if sizes else None
    weight, g = (np.random.default_rng(seed).normal(size=(2, 8, 4)).astype(np.float32) for seed in (0, 1))
    dims = ("experts", "expert_embed", "mlp")

    def cast(how, weight, g):
        out, pull = jax.vjp(lambda w: how(nnx.Param(w, dims=dims), jnp.bfloat16), weight)
        return out, *pull(out * g.astype(out.dtype))

    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        placed = jax.device_put(weight, jax.NamedSharding(mesh, spec(dims, STORAGE))) if mesh else weight
        apart, plain, twin = (jax.jit(functools.partial(cast, how))(w, jnp.asarray(g)) for how, w in (
            (use_apart, placed), (use, placed), (use_apart, placed * 1.01)))
    assert [a.sharding for a in apart] == [a.sharding for a in plain]
    same = [[np.array_equal(a, b) for a, b in zip(other, plain, strict=True)] for other in (apart, twin)]
    assert same == [[True, True], [False, False]]
    jaxpr = jax.make_jaxpr(lambda w: use_apart(nnx.Param(w, dims=dims), "bfloat16"))(weight)
    assert "optimization_barrier" in str(jaxpr)


def test_a_pipeline_keeps_no_cast_of_experts():
    """Its ticks keep what is not a cast, a slice or a gather: a product with a hidden 1 would stay (transformer.py)."""
    weight = jnp.ones((8, 16, 4), jnp.float32)
    dims = ("experts", "expert_embed", "expert_mlp")

    def casts(config):
        with jax.set_mesh(make_mesh(config, jax.devices()[:2])):
            return str(jax.make_jaxpr(lambda w: use_apart(nnx.Param(w, dims=dims), "bfloat16"))(weight))

    found = ["optimization_barrier" in casts(config) for config in (MeshConfig(stage=2), MeshConfig(fsdp=2))]
    assert found == [False, True]
