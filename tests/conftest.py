"""Strictness for every test, set once and before JAX starts; subprocess tests inherit it through the environment.

Eight fake CPU devices, rank promotion is an error, warnings are errors (setup.cfg). Compiled programs are kept
between runs in a per-user temporary folder and are optimised less, because on two cores compilation is most of what
the tests do (a tiny model's init and step: 5 s instead of 11).
"""

import importlib.metadata
import os
import pathlib
import tempfile

FAKE_DEVICES = 8
QUICK_COMPILES = ("--xla_backend_optimization_level=1", "--xla_llvm_disable_expensive_passes=true")

_folder = f"maxlm-tests-{os.getuid()}-jax{importlib.metadata.version('jaxlib')}"
_other_flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]

os.environ.update(
    XLA_FLAGS=" ".join([*_other_flags, *QUICK_COMPILES, f"--xla_force_host_platform_device_count={FAKE_DEVICES}"]),
    JAX_PLATFORMS="cpu",
    JAX_NUMPY_RANK_PROMOTION="raise",
    JAX_COMPILATION_CACHE_DIR=str(pathlib.Path(tempfile.gettempdir()) / _folder),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.3",
)
