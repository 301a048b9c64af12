"""What the runs of a sweep can use here, asked in a process of its own: the one that asks would hold the devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from maxlm.hardware import chip_of
from maxlm.scaling.cost import Device
from maxlm.schema import ConfigError, require

PROBE = """
import json, os, time, jax, jax.numpy as jnp
from maxlm.hardware import chip_of
devices = jax.local_devices()
device = devices[0]
chip = chip_of(device.device_kind)
if device.platform == "cpu":
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
else:
    memory = chip.hbm_bytes // chip.devices_per_chip if chip else device.memory_stats()["bytes_limit"]
rate = chip and chip.peak("bf16") and chip.peak("bf16") / chip.devices_per_chip
if not rate:
    size = 1024
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a: a @ a * 1e-3)
    product(x).block_until_ready()
    clock, count = time.perf_counter(), 0
    while time.perf_counter() - clock < 0.3:
        product(x).block_until_ready()
        count += 1
    rate = 2 * size**3 * count / (time.perf_counter() - clock)
print(json.dumps({"kind": device.device_kind, "platform": device.platform, "count": len(devices), "memory": memory,
                  "rate": rate}))
"""


def devices_here() -> tuple[Device, int]:
    """This machine's devices and how many there are; the CPU counts as one."""
    child = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if child.returncode:
        raise ConfigError("the devices of this machine cannot be used: " + child.stderr.strip().splitlines()[-1])
    found = json.loads(child.stdout.strip().splitlines()[-1])
    count = 1 if found["platform"] == "cpu" else found["count"]
    return Device(found["kind"], found["platform"], int(found["memory"]), float(found["rate"])), count


def device_called(kind: str) -> Device:
    """The chip of this name, for a plan of runs on another machine."""
    chip = chip_of(kind)
    require(chip is not None, f"--chip {kind!r} is not known: give a name of maxlm/hardware.py such as 'NVIDIA H200'")
    platform = "tpu" if chip.name.startswith("TPU") else "gpu"
    return Device(chip.name, platform, chip.hbm_bytes, chip.peak("bf16") or chip.peak("float32"))


def visible(device: Device, numbers: list[int], share: int) -> dict[str, str]:
    """The environment of a run that is to use these devices alone, and 1/`share` of their memory."""
    if device.platform != "gpu":
        return {}
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = [listed[n] if len(listed) > n and listed[n] else str(n) for n in numbers]
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.92 / share:.3f}"} if share > 1 else {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(names), **memory}
