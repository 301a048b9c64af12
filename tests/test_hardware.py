"""Chip table and compiler options: names that JAX really reports, figures that agree with each other."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from maxlm.hardware import CHIPS, chip_of, compiler_options


@pytest.mark.parametrize(
    "device_kind, name, bf16",
    [
        ("TPU v4", "TPU v4", 275e12),
        ("TPU v5 lite", "TPU v5e", 197e12),
        ("TPU v5", "TPU v5p", 459e12),
        ("TPU v5p", "TPU v5p", 459e12),
        ("TPU v6 lite", "TPU v6e", 918e12),
        ("TPU7x", "TPU7x", 2307e12),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB", 312e12),
        ("A100-SXM4-80GB", "A100 SXM 80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 989e12),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756e12),
        ("NVIDIA H200", "H200 SXM", 989e12),
        ("NVIDIA B200", "B200", 2250e12),
    ],
)
def test_a_known_device_kind_has_its_chip(device_kind, name, bf16):
    chip = chip_of(device_kind)
    assert chip is not None and chip.name == name and chip.peak("bf16") == bf16


@pytest.mark.parametrize(
    "device_kind",
    ["", "cpu", "TPU", "TPU v3", "TPU v5x", "NVIDIA H200 NVL", "NVIDIA H800", "NVIDIA GB200", "NVIDIA GeForce RTX 4090",
     "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "AMD Instinct MI300X"],
)
def test_an_unknown_device_kind_has_none(device_kind):
    assert chip_of(device_kind) is None


def test_the_table_agrees_with_itself():
    kinds = [kind for chip in CHIPS for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
    for chip in CHIPS:
        assert 1e14 < chip.peak_flops["bf16"] < 1e16
        assert chip.peak("fp8") is None or chip.peak("fp8") >= chip.peak("bf16")
        assert 16 * 2**30 <= chip.hbm_bytes < 2**40
        # Arithmetic intensity at which HBM feeds the matrix units: within what these designs have had.
        assert 100 < chip.peak("bf16") / chip.hbm_bytes_per_second < 700
        assert chip.dcn_bytes_per_second is None or chip.dcn_bytes_per_second < chip.ici_bytes_per_second
        assert 25e9 <= chip.ici_bytes_per_second / chip.ici_links <= 100e9


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_options_are_ones_that_xla_knows(platform):
    """CPU and GPU options live in one table, so a CPU compile refuses a GPU option that does not exist."""
    lowered = jax.jit(lambda x: x + 1).lower(jnp.ones(3))
    for deterministic in (False, True):
        lowered.compile(compiler_options=compiler_options(platform, deterministic=deterministic))
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options={**compiler_options(platform), "xla_gpu_enable_trition_gemm": False})


def test_cuda_is_a_gpu_and_an_unknown_platform_has_no_options():
    assert compiler_options("cuda") == compiler_options("gpu") != {}
    assert compiler_options("metal") == compiler_options("cpu") == {}


def test_a_rate_per_chip_counts_chips_and_not_chiplets():
    assert chip_of("TPU7x").chips(8) == 4
    assert chip_of("NVIDIA H200").chips(8) == 8


TPU_COMPILE = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from maxlm.hardware import chip_of, compiler_options
for name in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    rows = NamedSharding(Mesh(np.array(devices), ("x",)), P("x"))
    lowered = jax.jit(lambda x: jnp.sin(x @ x)).lower(jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=rows))
    lowered.compile(compiler_options=compiler_options("tpu"))
    print(name, "is", chip_of(devices[0].device_kind).name)
try:
    lowered.compile(compiler_options={"xla_tpu_no_such_option": True})
except jax.errors.JaxRuntimeError as error:
    print(error)
"""


def test_libtpu_knows_the_options_and_we_know_its_chips(tmp_path):
    """In a child process, because libtpu writes warnings and keeps the process's state."""
    pytest.importorskip("libtpu")
    child = subprocess.run(
        [sys.executable, "-c", TPU_COMPILE], capture_output=True, text=True, timeout=300,
        env={**os.environ, "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
             "TPU_SKIP_MDS_QUERY": "1", "TPU_LOG_DIR": str(tmp_path), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    )
    assert child.returncode == 0, child.stderr[-2000:]
    for line in ("v4:2x2x1 is TPU v4", "v5p:2x2x1 is TPU v5p", "tpu7x:2x2x1 is TPU7x", "No such compile option"):
        assert line in child.stdout
