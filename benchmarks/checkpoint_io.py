"""What a checkpoint costs: the stall of a save, and restore against a plain sequential read of the same bytes.

    python benchmarks/checkpoint_io.py --gigabytes 1 --folder /tmp --json benchmarks/results/checkpoint_io_cpu.json

Makes a state of float32 arrays over all devices, saves it asynchronously `--repeats` times in each tier, and restores
it with verification on, in turns with a plain read of the same files (one thread, 8 MiB at a time, into one buffer),
each first every other time. Before each read and restore the files' pages are dropped from the page cache (fsync,
posix_fadvise DONTNEED); `cold` says how many were gone, as mincore counts them. A stall counts against the period that
saves need: the time between two saves at which it is 1%, and the recommended period, which is the larger of that, of
ten times the time a save takes to be written, and of a minute. Takes about a minute a gigabyte on two cores.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from maxlm.cli import use_huge_pages  # noqa: E402

READ_BYTES = 8 << 20
LEAST_PERIOD_SECONDS, WRITES_A_PERIOD, STALL_SHARE = 60, 10, 0.01


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def drop_from_cache(folder: Path) -> float:
    """Returns the share of the files' pages that are no longer in the page cache."""
    cached = pages = 0
    for path in files_of(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(file.fileno()).st_size
            if size:
                flags = resident_pages(file.fileno(), size)
                cached, pages = cached + sum(flags), pages + len(flags)
    return 1 - cached / pages


def resident_pages(descriptor: int, size: int) -> list[int]:
    count = -(-size // mmap.PAGESIZE)
    with mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        found = (ctypes.c_ubyte * count)()
        address = ctypes.c_char.from_buffer(mapped)
        ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(ctypes.addressof(address)), ctypes.c_size_t(size),
                                                  found)
        del address
    return [flag & 1 for flag in found]


def plain_read(folder: Path) -> int:
    buffer, total = bytearray(READ_BYTES), 0
    for path in files_of(folder):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def timed(function: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def make_state(gigabytes: float) -> dict[str, Any]:
    """Random float32 weights in 24 matrices, rows over all devices."""
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Explicit,))
    rows = max(1, round(gigabytes * 1e9 / 4 / 24 / 2048 / jax.device_count())) * jax.device_count()
    make = jax.jit(lambda key: jax.random.normal(key, (rows, 2048)),
                   out_shardings=NamedSharding(mesh, PartitionSpec("fsdp", None)))
    return {"params": {f"layer_{i}": make(jax.random.key(i)) for i in range(24)}}


def saves(checkpointer: Any, save: Any, state: Any, steps: range) -> dict[str, dict[str, float]]:
    """Stalls (until training may go on) and whole times (until it is complete), the first of them left out."""
    stalls, whole = [], []
    for step in steps:
        began = time.perf_counter()
        save(step, state, {})
        stalls.append(time.perf_counter() - began)
        checkpointer.wait()
        whole.append(time.perf_counter() - began)
    return {"first_stall_seconds": stalls[0], "stall_seconds": spread(stalls[1:]), "written_seconds": spread(whole[1:])}


def restores(make: Any, folder: Path, state: Any, repeats: int) -> dict[str, Any]:
    """Plain reads of `folder` and verified restores from it, in turns, each from a dropped cache."""
    import jax

    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    reads, restored, cold, size = [], [], [], plain_read(folder)

    def restore(_: Path) -> None:
        found = make().restore_newest(lambda step, meta: like, say=print)
        jax.block_until_ready(found.state)

    restore(folder)  # Orbax and TensorStore are imported and started
    for turn in range(repeats):
        for function in (plain_read, restore) if turn % 2 else (restore, plain_read):  # a host may cache what was first
            cold.append(drop_from_cache(folder))
            (reads if function is plain_read else restored).append(timed(lambda function=function: function(folder))[0])
    return {
        "bytes": size, "cold": min(cold),
        "plain_read_gigabytes_per_second": spread([size / seconds / 1e9 for seconds in reads]),
        "restore_gigabytes_per_second": spread([size / seconds / 1e9 for seconds in restored]),
        "restore_over_plain_read": spread([read / whole for read, whole in zip(reads, restored, strict=True)]),
    }


def period(tier: dict[str, Any]) -> dict[str, float]:
    stall, written = tier["stall_seconds"]["median"], tier["written_seconds"]["median"]
    recommended = max(LEAST_PERIOD_SECONDS, WRITES_A_PERIOD * written, stall / STALL_SHARE)
    return {"stall_is_one_percent_at_seconds": stall / STALL_SHARE, "recommended_seconds": recommended,
            "stall_percent_of_recommended": 100 * stall / recommended}


def measure(folder: Path, gigabytes: float, repeats: int) -> dict[str, Any]:
    import jax

    from maxlm.checkpoint import Checkpointer

    state = make_state(gigabytes)
    jax.block_until_ready(state)
    record: dict[str, Any] = {"state_bytes": sum(array.nbytes for array in jax.tree.leaves(state))}
    for tier in ("durable", "local"):
        run, local = folder / tier, folder / "local_tier"
        make = lambda run=run, local=local: Checkpointer(run, keep_last=1, local_path=local)  # noqa: E731
        with make() as checkpointer:
            save = checkpointer.save if tier == "durable" else checkpointer.save_local
            record[tier] = saves(checkpointer, save, state, range(1, repeats + 2))
        newest = run if tier == "durable" else next(local.glob(f"*/process_0/{repeats + 1}"))
        record[tier] |= period(record[tier]) | restores(make, newest, state, repeats)
    return record | {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of state (default: 1)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="on the disk to measure (default: the temporary folder's)")
    parser.add_argument("--json", type=Path, help="file to write the record to")
    args = parser.parse_args()
    use_huge_pages()  # as the maxlm command does
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        record = measure(Path(folder), args.gigabytes, args.repeats)
    record |= {
        "repeats": args.repeats, "cores": os.cpu_count(), "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(),
                     **{name: version(name) for name in ("jax", "orbax-checkpoint", "tensorstore")}},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    for tier in ("durable", "local"):
        found = record[tier]
        print(f"{tier}: stall {found['stall_seconds']['median'] * 1e3:.0f} ms, "
              f"{found['stall_percent_of_recommended']:.3f}% of {found['recommended_seconds']:.0f} s; restore "
              f"{found['restore_gigabytes_per_second']['median']:.2f} GB/s, "
              f"{found['restore_over_plain_read']['median']:.0%} of a plain read")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
