"""Runs of the real command line in several processes on this machine, each with fake CPU devices."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import maxlm
from tests.training.runs import arguments

PROGRAM = pathlib.Path(__file__).with_name("keep_programs.py")
PACKAGE = pathlib.Path(maxlm.__file__).parents[1]


@dataclass(frozen=True)
class Ended:
    """How one process ended."""

    code: int
    out: str
    error: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def with_devices(count: int) -> dict[str, str]:
    """The environment of a process that has `count` fake CPU devices."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={count}")
    return {**os.environ, "XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(PACKAGE)}


def start(config: pathlib.Path, run: pathlib.Path, *overrides: str, processes: int, devices: int,
          each: Sequence[Sequence[str]] = (),
          program: Sequence[str | pathlib.Path] = (PROGRAM,)) -> list[subprocess.Popen[str]]:
    """`maxlm train` in `processes` processes of `devices` devices; `each[i]` are more words for process i. program:
    what Python is to run, and words that go before."""
    port = free_port()
    started = []
    for index in range(processes):
        words = arguments(config, run, *overrides)
        if processes > 1:
            words += ["--coordinator", f"localhost:{port}", "--num-processes", str(processes), "--process-id",
                      str(index)]
        words += each[index] if each else []
        started.append(subprocess.Popen([sys.executable, *program, *map(str, words)], stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, env=with_devices(devices)))
    return started


def finish(started: Sequence[subprocess.Popen[str]], timeout: float = 400) -> list[Ended]:
    """How each of them ends; none outlives this call."""
    ends = []
    try:
        for process in started:
            out, error = process.communicate(timeout=timeout)
            ends.append(Ended(process.returncode, out, error))
    finally:
        for process in started:
            process.kill()
            process.wait()
    return ends


def train(config: pathlib.Path, run: pathlib.Path, *overrides: str, processes: int, devices: int) -> list[Ended]:
    """A life of a run that is expected to end well."""
    ends = finish(start(config, run, *overrides, processes=processes, devices=devices))
    assert [end.code for end in ends] == [0] * processes, "\n".join(end.error for end in ends)
    return ends
