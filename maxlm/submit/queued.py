"""Cloud TPU queued resources: a request for slices, and the script that each of their hosts runs when it boots.

JAX finds the hosts through the metadata server. The script starts the run again after a crash; a Spot slice that was
taken away ends the request, and the same submission makes it anew and goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import math
import shlex
from dataclasses import dataclass

from maxlm.schema import require
from maxlm.submit.job import Job, check_kept
from maxlm.submit.shell import CONFIG_VARIABLE, supervised, train
from maxlm.submit.topology import CLOUD_TPUS, Topology

PLATFORMS = ("tpu",)


@dataclass(frozen=True)
class Cluster:
    """`more` are further options of gcloud; `mounts` are host paths that the container sees."""

    zone: str
    project: str | None = None
    spot: bool = False
    more: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    image: str | None = None
    mounts: tuple[str, ...] = ()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project")
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--gcloud", action="append", default=[], metavar="OPTION",
                        help="a further option, such as --reserved or --valid-until-duration=6h; repeatable")
    parser.add_argument("--mount", action="append", default=[], metavar="PATH",
                        help="a host's path that --image sees; repeatable")


def cluster(arguments: argparse.Namespace) -> Cluster:
    require(not arguments.mount or arguments.image, "--mount is for --image: without one a run sees all of its host")
    return Cluster(arguments.zone, arguments.project, arguments.spot, tuple(arguments.gcloud),
                   tuple(arguments.setup), arguments.image, tuple(arguments.mount))


def create(job: Job, cluster: Cluster, startup: str) -> list[str]:
    """The command line of the request. `startup`: path of the file with `startup_script`'s text.

    Raises ConfigError for a shape that an accelerator type does not mean.
    """
    _check_shape(job.topology)
    nodes = [f"--node-id={job.name}"] if job.slices == 1 else [f"--node-count={job.slices}",
                                                               f"--node-prefix={job.name}"]
    return ["gcloud", "compute", "tpus", "queued-resources", "create", job.name, *_where(cluster),
            f"--accelerator-type={job.topology.accelerator_type}",
            f"--runtime-version={CLOUD_TPUS[job.topology.kind].runtime_version}", *nodes,
            *(["--spot"] if cluster.spot else []), f"--metadata-from-file=startup-script={startup}", "--async",
            *cluster.more]


def follow_up(job: Job, cluster: Cluster) -> dict[str, list[str]]:
    """What to call later, by what it is for."""
    node = job.name if job.slices == 1 else f"{job.name}-0"
    resources = ["gcloud", "compute", "tpus", "queued-resources"]
    return {
        "its state": [*resources, "describe", job.name, *_where(cluster)],
        "its log": ["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *_where(cluster), "--worker=0",
                    "--command=sudo journalctl -f -u google-startup-scripts"],
        "giving it back": [*resources, "delete", job.name, *_where(cluster), "--force", "--quiet"],
    }


def startup_script(job: Job, cluster: Cluster) -> str:
    start = f"bash -c {shlex.quote(train(job.run_dir))}"
    if cluster.image:
        check_kept(job.run_dir, cluster.mounts, "let the container see its folder with --mount PATH")
        mounts = [f"--volume={path}:{path}" for path in cluster.mounts]
        start = shlex.join(["docker", "run", "--rm", "--init", "--privileged", "--net=host", f"--env={CONFIG_VARIABLE}",
                            f"--stop-timeout={job.grace_seconds}", *mounts, cluster.image]) + f" {start}"
    return "\n".join(["#!/bin/bash", "# Each host runs this whenever it boots.", *cluster.setup,
                      f"export {CONFIG_VARIABLE}={shlex.quote(job.config_json)}",
                      supervised(start, shlex.quote(job.run_dir), job.retries)])


def _where(cluster: Cluster) -> list[str]:
    return [f"--zone={cluster.zone}"] + ([f"--project={cluster.project}"] if cluster.project else [])


def _check_shape(topology: Topology) -> None:
    """An accelerator type names a number of chips; of a torus gcloud gives the most compact shape."""
    sizes = [int(size) for size in topology.shape.split("x")]
    if len(sizes) == 2 or math.prod(sizes) < 64:
        return
    cubes = topology.chips // 64
    shapes = [(a, b, cubes // a // b) for a in range(1, cubes + 1) if cubes % a == 0
              for b in range(a, cubes // a + 1) if cubes // a % b == 0 and cubes // a // b >= b]
    compact = "x".join(str(4 * size) for size in min(shapes, key=sum))
    require(topology.shape == compact, f"--topology {topology}: a queued resource of {topology.accelerator_type} has "
                                       f"the shape {compact}: ask for {topology.kind}:{compact}, or submit to GKE")
