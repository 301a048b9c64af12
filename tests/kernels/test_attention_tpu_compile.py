"""The splash path compiles for TPUs that are not there (libtpu's topologies), in a process of its own."""

import json
import os
import subprocess
import sys

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from maxlm.kernels.attention import attention

devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
axes = ("data", "stage", "fsdp", "expert", "context", "tensor")
mesh = Mesh(np.array(devices).reshape(1, 1, 2, 1, 1, 2), axes, axis_types=(AxisType.Explicit,) * 6)
with jax.set_mesh(mesh):
    rows = P(("data", "fsdp"), None)
    heads = NamedSharding(mesh, P(*rows, "tensor", None))
    q, k = (jax.ShapeDtypeStruct((2, 1024, h, 64), jnp.bfloat16, sharding=heads) for h in (8, 4))
    segments = jax.ShapeDtypeStruct((2, 1024), jnp.int32, sharding=NamedSharding(mesh, rows))
    def loss(q, k, v, segments):
        out = attention(q, k, v, segment_ids_BT=segments, window=None, softcap=0.0, implementation="splash")
        return out.astype(jnp.float32).sum()
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, segments).compile()
lines = [line for line in compiled.as_text().splitlines() if "tpu_custom_call" in line]
print(json.dumps({"calls": lines, "temporaries": compiled.memory_analysis().temp_size_in_bytes}))
"""


def test_splash_compiles_for_a_tpu_slice():
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    no_lock = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # it guards real chips; other tests may compile at the same time
    environment = {**os.environ, **quiet, **no_lock, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "v5e:2x2"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(done.stdout.splitlines()[-1])
    for kernel in ("splash_mha_fwd_segmented", "splash_mha_dkv_segmented"):
        assert sum(kernel in line for line in record["calls"]) == 1, record["calls"]
    scores = 1 * 4 * 1024 * 1024 * 4  # bytes of one device's scores, were they ever in memory
    assert record["temporaries"] < scores / 2
