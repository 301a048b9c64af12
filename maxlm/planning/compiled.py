"""Compiles a run's step for a target in a process of its own, and keeps what the compiler said."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import maxlm
from maxlm.config import RunConfig
from maxlm.parallel.distributed import USER_MISTAKE
from maxlm.planning.memory import assigned_bytes
from maxlm.planning.topology import Target
from maxlm.schema import ConfigError, to_dict

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")
REQUEST, FACTS, TEXT = "request.json", "facts.json", "program.txt"
HLO = "*.after_optimizations_after_buffer_assignment.txt"
BUFFERS = "*.after_optimizations-buffer-assignment.txt"
UNASSIGNED = "*.after_optimizations_before_buffer_assignment.txt"
_TOO_LARGE = re.compile(r"CompileTimeHbmOom.*?\(([\d.]+)([KMGT])\) exceeds available HBM")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# What libtpu asks for where there is no TPU, and says so at length if it is not there.
_QUIET = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
          "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}


@dataclass(frozen=True)
class Compiled:
    """What the compiler said: `facts` of child.py, the optimized HLO ('' where it was refused before there was one),
    bytes of a device's memory by kind."""

    facts: dict[str, Any]
    hlo: str
    memory: dict[str, int]


class CompileError(ConfigError):
    """The step does not compile for its target; one line says why."""


def compile_for(config: RunConfig, target: Target, *, codegen: bool = False) -> Compiled:
    """Compiles the step in a child process, so that this one never starts an accelerator runtime. A step that does not
    fit is an answer too: what it would need, and its program as far as the compiler took it.

    Raises ConfigError where the config does not suit the target, CompileError where the compiler refuses the step.
    """
    folder = Path(tempfile.mkdtemp(prefix="maxlm-compile-"))
    try:
        request = {"config": to_dict(config), "topology": target.name, "slices": target.slices, "codegen": codegen}
        (folder / REQUEST).write_text(json.dumps(request))
        clock = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "maxlm.planning.child", str(folder)], capture_output=True,
                              text=True, env=_environment(target, folder))
        if done.returncode == USER_MISTAKE:
            raise ConfigError(done.stderr.strip().splitlines()[-1])
        if done.returncode and (needed := _TOO_LARGE.search(done.stderr)):
            return _too_large(folder, float(needed[1]) * _UNITS[needed[2]], time.perf_counter() - clock)
        if done.returncode:
            raise CompileError(f"the step does not compile for {target.name}: {_why(done)}")
        return _read(folder, target)
    finally:
        shutil.rmtree(folder)


def _environment(target: Target, folder: Path) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    places = [str(Path(maxlm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    if target.attached:
        return environment
    dump = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_train_step"
    return environment | _QUIET | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": dump}


def _why(done: subprocess.CompletedProcess) -> str:
    """The line of an error that says most."""
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    telling = [line for line in lines if "RESOURCE_EXHAUSTED" in line or "Error: " in line]
    return (telling or lines or [f"exit code {done.returncode}"])[-1].strip()


def _read(folder: Path, target: Target) -> Compiled:
    facts = json.loads((folder / FACTS).read_text())
    if target.attached:
        memory = facts["memory"]
        kept = memory["argument"] + memory["output"] - memory["alias"]
        return Compiled(facts, (folder / TEXT).read_text(), {"arguments": kept, "temporaries": memory["temp"],
                                                            "constants": 0})
    text, buffers = (next(folder.glob(pattern), None) for pattern in (HLO, BUFFERS))
    if text is None or buffers is None:
        raise CompileError(f"the compiler left no dump of its program for {target.name}: libtpu {_version('libtpu')} "
                           "has changed what it writes; use the libtpu that jax was released with")
    return Compiled(facts, text.read_text(), assigned_bytes(buffers.read_text()))


def _too_large(folder: Path, needed: float, seconds: float) -> Compiled:
    """Of a step that the compiler refused for its size: all that it needs, in bytes, is in the refusal."""
    facts = json.loads((folder / FACTS).read_text())
    arguments = facts["parameter_bytes"] + facts["optimizer_bytes"]
    text = next(folder.glob(UNASSIGNED), None)
    return Compiled(facts | {"compile_seconds": seconds}, text.read_text() if text else "",
                    {"arguments": arguments, "temporaries": int(needed) - arguments, "constants": 0})


def identity(config: RunConfig, target: Target, codegen: bool) -> str:
    """A hash of all that decides what compile_for returns, the source of maxlm and the versions of what it calls."""
    source = hashlib.sha256()
    root = Path(maxlm.__file__).parent
    for path in sorted(root.rglob("*.py")):
        source.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    told = {"config": to_dict(config), "target": dataclasses.asdict(target), "codegen": codegen,
            "versions": versions(), "source": source.hexdigest()}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str | None]:
    return {"maxlm": maxlm.__version__} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maxlm" / "compile"
