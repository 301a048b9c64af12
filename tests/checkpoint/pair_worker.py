"""One of two processes: trains a counter on 2 x 4 fake devices, stops on SIGTERM, saves, resumes.

    python pair_worker.py FOLDER PORT PROCESS      prints 'step N' lines, then 'stopped N'
"""

import os
import sys
import time

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maxlm.checkpoint import Checkpointer
from maxlm.resilience import StopRequest


def main(folder, port, process):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
    rows = NamedSharding(mesh, PartitionSpec("fsdp", None))  # replicated over the processes
    all_rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None))
    like = {"params": {"a": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=rows),
                       "b": jax.ShapeDtypeStruct((16, 4), jnp.bfloat16, sharding=all_rows)}}
    begin = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like),
                    out_shardings=jax.tree.map(lambda x: x.sharding, like))
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    with Checkpointer(folder, keep_last=2) as checkpointer, StopRequest() as stop:
        first = checkpointer.latest_step() or 0
        state = checkpointer.restore(first, like) if first else begin()
        for step in range(first + 1, first + 2000):
            state = advance(state)
            stopping = stop.should_stop(step)
            if step % 10 == 0 or stopping:
                checkpointer.save(step, state, {"step": step})
            print(f"step {step}", flush=True)
            if stopping:
                break
            time.sleep(0.02 if process else 0.025)
    print(f"stopped {step}", flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
