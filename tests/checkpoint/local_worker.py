"""One of several processes with a local tier of its own; does what it is told on stdin and answers on stdout.

    python local_worker.py FOLDER LOCAL PORT PROCESS COUNT FSDP

The mesh has FSDP of the COUNT processes along fsdp and the rest along data, one device each. Commands:
    durable N | local N    saves the state of step N in that tier
    restore                'STEP ok|differs NOTES' of the newest good step, every byte of this process compared
"""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maxlm.checkpoint import Checkpointer, named_leaves

SPECS = {"matrix": PartitionSpec("fsdp", None), "columns": PartitionSpec(None, "fsdp"), "scale": PartitionSpec(),
         "half": PartitionSpec("fsdp"), "count": PartitionSpec()}


def values(step):
    words = np.random.default_rng(step).integers(0, 2**32, (8, 6), dtype=np.uint32)
    words[0, :3] = 0x80000000, 0x7FC12345, 0xFFFFFFFF  # -0.0 and NaNs, whose bits a sum would not keep
    matrix = words.view(np.float32)
    half = np.random.default_rng(step).integers(0, 2**16, 12, dtype=np.uint16).view(jax.numpy.bfloat16)
    return {"matrix": matrix, "columns": matrix.T[:, :4].copy(), "scale": matrix[0], "half": half,
            "count": np.int32(step)}


def main(folder, local, port, process, count, fsdp):
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=process)
    mesh = jax.make_mesh((count // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)

    def state(step):
        return {"params": {name: jax.make_array_from_callback(value.shape, NamedSharding(mesh, SPECS[name]),
                                                              value.__getitem__)
                           for name, value in values(step).items()}}

    def like(step, meta):
        assert meta == {"step": step}
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(step))

    def whole(step, restored):
        return all(
            np.asarray(shard.data).tobytes() == values(step)[name.split("/")[1]][shard.index].tobytes()
            for name, array in named_leaves(restored).items() for shard in array.addressable_shards
        )

    make = lambda: Checkpointer(folder, keep_last=2, local_path=local)  # noqa: E731
    print("ready", flush=True)
    for line in sys.stdin:
        verb, *number = line.split()
        notes = []
        with make() as checkpointer:
            if verb == "durable":
                checkpointer.save(int(number[0]), state(int(number[0])), {"step": int(number[0])})
            elif verb == "local":
                for step in map(int, number):
                    checkpointer.save_local(step, state(step), {"step": step})
            else:
                found = checkpointer.restore_newest(like, say=notes.append)
                notes.insert(0, f"{found.step} {'ok' if whole(found.step, found.state) else 'differs'}")
        print(" ".join([*notes, "done"]), flush=True)
    if count > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
