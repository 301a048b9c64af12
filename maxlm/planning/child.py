"""The process that compiles a step: `python -m maxlm.planning.child FOLDER`, started by compiled.py.

FOLDER holds request.json; facts.json is written before the compiler is asked, so that it is there however this ends.
For a TPU slice the compiler dumps its HLO and its buffers into FOLDER, and this process ends as soon as they are there:
what is left, generating machine code, takes nine tenths of the time and changes neither. With `codegen` it stays.
For attached devices the program's text and memory are read from the compiled program.
Exit code 2: a user's mistake, told in one line on stderr.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from maxlm.config import RunConfig
from maxlm.parallel.distributed import USER_MISTAKE
from maxlm.parallel.mesh import check_divisible, make_mesh
from maxlm.planning.compiled import BUFFERS, FACTS, HLO, REQUEST, TEXT
from maxlm.planning.topology import Target, complain_of_attached, find_target
from maxlm.schema import ConfigError, from_dict
from maxlm.training.state import abstract_state, kernels_of
from maxlm.training.step import lower_step


def main(folder: Path) -> None:
    request = json.loads((folder / REQUEST).read_text())
    config = from_dict(RunConfig, request["config"])
    target = find_target(request["topology"], request["slices"])
    devices = _devices(target)
    mesh = make_mesh(config.mesh, devices)
    check_divisible(mesh, config)
    with jax.set_mesh(mesh):
        clock = time.perf_counter()
        lowered = lower_step(config, mesh)
        facts = _facts(config, mesh) | {"lower_seconds": time.perf_counter() - clock}
        _write(folder / FACTS, facts)
        if target.shape and not request["codegen"]:
            threading.Thread(target=_leave_before_codegen, args=(folder,), daemon=True).start()
        clock = time.perf_counter()
        compiled = lowered.compile()
    facts["compile_seconds"] = time.perf_counter() - clock
    memory = compiled.memory_analysis()
    facts["memory"] = {name: getattr(memory, f"{name}_size_in_bytes") for name in (
        "argument", "output", "alias", "temp", "generated_code")}
    if not target.shape:
        (folder / TEXT).write_text(compiled.as_text())
    _write(folder / FACTS, facts)


def _devices(target: Target) -> list[jax.Device]:
    if target.attached:
        devices = jax.devices()
        complain_of_attached(target.name, devices[0].platform)
        return devices
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": target.slices} if target.slices > 1 else {}
    if target.libtpu_name.startswith("v4"):
        options["chip_config_name"] = "megacore"  # one device a chip, as it runs
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=target.libtpu_name, **options).devices
    except Exception as error:
        said = str(error).strip().splitlines()[0]
        raise ConfigError(f"--topology={target.name}: {said} (is the extra 'tpu' installed?)") from error


def _facts(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    state, devices = abstract_state(config, mesh), list(mesh.devices.flat)
    return {
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "kernels": kernels_of(config, devices[0])[1],
        "axes": dict(mesh.shape),
        "coords": [list(getattr(device, "coords", None) or (device.id,)) for device in devices],
        "slices": [getattr(device, "slice_index", None) or 0 for device in devices],
        "parameter_bytes": _bytes(state.params),
        "optimizer_bytes": _bytes(state.opt_state),
    }


def _bytes(tree: Any) -> int:
    """On one device."""
    arrays = jax.tree.leaves(tree)
    return sum(a.dtype.itemsize * _product(a.sharding.shard_shape(a.shape)) for a in arrays)


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _leave_before_codegen(folder: Path) -> None:
    """Ends this process once the compiler has written its HLO with buffers assigned, whole."""
    clock, sizes = time.perf_counter(), (-1, -1)
    while True:
        time.sleep(0.1)
        written = [next(folder.glob(pattern), None) for pattern in (HLO, BUFFERS)]
        if None in written:
            continue
        now = tuple(path.stat().st_size for path in written)
        if now == sizes and written[0].read_bytes().rstrip().endswith(b"}"):
            facts = json.loads((folder / FACTS).read_text())
            _write(folder / FACTS, facts | {"compile_seconds": time.perf_counter() - clock})
            os._exit(0)
        sizes = now


def _write(path: Path, facts: dict[str, Any]) -> None:
    path.with_suffix(".new").write_text(json.dumps(facts))
    path.with_suffix(".new").rename(path)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except ConfigError as mistake:
        print(mistake, file=sys.stderr)
        sys.exit(USER_MISTAKE)
