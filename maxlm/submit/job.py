"""A training run as it is submitted: its whole config, where it runs, and what is checked before anything is asked for.

The config travels in the job as JSON, so what was checked is what runs, and the image needs nothing but maxlm.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace

from maxlm.config import RunConfig
from maxlm.overrides import apply_overrides, load_config
from maxlm.parallel.mesh import axis_sizes, check_divisible
from maxlm.schema import require, to_dict
from maxlm.submit.topology import Topology, parse_topology

RETRIES = 5  # of a crash or of exit code 75
NAME_LENGTH = 40  # Kubernetes adds to it, and a pod's host name has at most 63 characters


@dataclass(frozen=True)
class Job:
    """One run. `name` is what schedulers call it."""

    name: str
    config: RunConfig
    run_dir: str
    topology: Topology
    slices: int = 1
    retries: int = RETRIES

    @property
    def config_json(self) -> str:
        return json.dumps(to_dict(self.config))

    @property
    def grace_seconds(self) -> int:
        return grace_seconds(self.config)


def grace_seconds(config: RunConfig) -> int:
    """What a run needs between SIGTERM and its end: its own deadline, and then half a minute to leave."""
    return int(config.resilience.stop_seconds) + 30


def check(config: RunConfig, topology: Topology, slices: int = 1) -> RunConfig:
    """`config` with `mesh.fsdp='rest'` resolved for these devices.

    Raises ConfigError where the mesh does not divide them, a sharded size its axes, or several slices are not joined
    by `mesh.data`, which is the axis whose traffic their network can bear.
    """
    require(slices > 0, f"--slices {slices} must be 1 or more")
    require(slices == 1 or topology.platform == "tpu", f"--slices {slices} is for TPUs: ask for more hosts in "
                                                       f"--topology {topology}")
    sizes = axis_sizes(config.mesh, topology.devices * slices)
    require(sizes["data"] % slices == 0, f"mesh.data={sizes['data']} must be a multiple of --slices {slices}: slices "
                                         "are joined along mesh.data")
    check_divisible(SimpleNamespace(shape=sizes), config)
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=sizes["fsdp"]))


def check_kept(path: str, mounts: Iterable[str], fix: str) -> None:
    """Raises ConfigError where none of these folders holds `path`: it would be lost with the machine or container."""
    require(any(f"{path.rstrip('/')}/".startswith(f"{mount.rstrip('/')}/") for mount in mounts),
            f"{path} would be lost with the job: {fix}")


def job_name(words: str, path: str) -> str:
    """A name that every scheduler takes: letters, digits and hyphens, and the same for the same `path` alone."""
    plain = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "run"
    plain = plain if plain[0].isalpha() else f"run-{plain}"
    return f"{plain[: NAME_LENGTH - 7].rstrip('-')}-{hashlib.sha256(path.encode()).hexdigest()[:6]}"


def add_job_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a Python file with config() -> RunConfig, or a config.json")
    parser.add_argument("--run-dir", required=True, help="where all hosts see the same storage")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="change a field of the config; repeatable")
    parser.add_argument("--name", help="what the scheduler calls the job (default: from --run-dir)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and submit nothing")


def add_place_options(add: Callable[..., object]) -> None:
    """What a single run and a sweep have in common. `add` is a parser's or a group's add_argument."""
    add("--topology", help="a TPU slice v5p:4x4x8, GPU hosts h100:4x8 (hosts x GPUs), CPU processes cpu:1x2")
    add("--image", help="container image with maxlm in it")
    add("--setup", action="append", default=[], metavar="SHELL",
        help="a line that each host runs first, such as 'module load cuda'; repeatable")
    add("--retries", type=int, default=RETRIES, metavar="N",
        help=f"starts after a crash or exit code 75 (default: {RETRIES}); exit codes 2 and 3 are never retried")


def add_slices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="TPU slices, joined along mesh.data")


def job_of(arguments: argparse.Namespace, *platforms: str) -> Job:
    """The checked job of a script's command line. `platforms`: those that its scheduler has."""
    topology = topology_of(arguments, platforms)
    config = apply_overrides(load_config(arguments.config), arguments.overrides)
    data = config.data
    require(bool(data.path or data.source or data.mixture), "the config names no data: give --set data.path=FOLDER, "
                                                            "where the job sees it")
    slices = getattr(arguments, "slices", 1)
    check(config, topology, slices)
    require(os.path.isabs(arguments.run_dir), f"--run-dir {arguments.run_dir} must be a whole path from /: the job "
                                              "does not run in this folder")
    name = arguments.name or job_name(os.path.basename(arguments.run_dir.rstrip("/")), arguments.run_dir)
    require(bool(re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)) and len(name) <= NAME_LENGTH,
            f"--name {name} must be at most {NAME_LENGTH} small letters, digits and hyphens, a letter first")
    return Job(name, config, arguments.run_dir, topology, slices, arguments.retries)


def topology_of(arguments: argparse.Namespace, platforms: Iterable[str]) -> Topology:
    require(arguments.topology is not None, "--topology is needed, such as v5p:4x4x8 or h100:4x8")
    topology = parse_topology(arguments.topology)
    require(topology.platform in platforms, f"--topology {topology} is not for this scheduler, which has "
                                            f"{' and '.join(f'{p.upper()}s' for p in platforms)}")
    require(arguments.retries >= 0, f"--retries {arguments.retries} must be 0 or more")
    return topology
