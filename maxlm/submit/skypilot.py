"""SkyPilot: a run as a managed job, on whatever cloud has the devices.

SkyPilot starts a job again whose machines were taken away; a crash is started again on the same machines by the script.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from typing import Any

from maxlm.schema import require
from maxlm.submit.job import Job, check_kept
from maxlm.submit.shell import CONFIG_VARIABLE, supervised, train
from maxlm.submit.topology import CLOUD_TPUS, GPUS

PLATFORMS = ("tpu", "gpu")
COORDINATOR_PORT = 1234


@dataclass(frozen=True)
class Cluster:
    """`infra` is CLOUD[/REGION[/ZONE]]; `buckets` are (mount path, bucket URL)."""

    infra: str | None = None
    spot: bool = False
    setup: tuple[str, ...] = ()
    image: str | None = None
    buckets: tuple[tuple[str, str], ...] = ()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--infra", metavar="CLOUD[/REGION[/ZONE]]", help="such as gcp/us-east5 (default: the cheapest)")
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--bucket", action="append", default=[], metavar="PATH=URL",
                        help="mount a bucket, such as /runs=gs://my-runs; the run directory and the data are on one")


def cluster(arguments: argparse.Namespace) -> Cluster:
    buckets = []
    for text in arguments.bucket:
        path, _, url = text.partition("=")
        require(path.startswith("/") and "://" in url, f"--bucket {text} must be /PATH=URL, such as /runs=gs://my-runs")
        buckets.append((path, url))
    return Cluster(arguments.infra, arguments.spot, tuple(arguments.setup), arguments.image, tuple(buckets))


def task(job: Job, cluster: Cluster) -> dict[str, Any]:
    """The task. Raises ConfigError for what SkyPilot cannot do, and where no bucket holds the run directory."""
    place, tpu = job.topology, job.topology.platform == "tpu"
    require(job.slices == 1, f"--slices {job.slices}: SkyPilot has no multislice: use submit_gke.py or "
                             "submit_tpu_queued.py")
    require(place.kind != "7x", f"--topology {place}: SkyPilot has no TPU7x: use submit_gke.py or "
                                "submit_tpu_queued.py")
    check_kept(job.run_dir, (path for path, _ in cluster.buckets), "mount a bucket that holds it: --bucket /PATH=URL")
    resources: dict[str, Any] = {
        "accelerators": f"tpu-{place.accelerator_type}" if tpu
        else f"{GPUS[place.kind].skypilot}:{place.chips_per_host}",
        "use_spot": cluster.spot,
        "job_recovery": {"max_restarts_on_errors": 0},  # the script knows the exit codes
    }
    if tpu:
        resources["accelerator_args"] = {"runtime_version": CLOUD_TPUS[place.kind].runtime_version}
    if cluster.infra:
        resources["infra"] = cluster.infra
    if cluster.image:
        resources["image_id"] = f"docker:{cluster.image}"
    several = not tpu and place.hosts > 1
    processes = (f'export JAX_COORDINATOR_ADDRESS="$(head -n 1 <<< "$SKYPILOT_NODE_IPS"):{COORDINATOR_PORT}"\n'
                 'export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"\n')
    start = f"bash -c {shlex.quote(train(job.run_dir))}"
    return {
        "name": job.name,
        "num_nodes": 1 if tpu else place.hosts,
        "resources": resources,
        "file_mounts": {path: {"source": url, "mode": "MOUNT"} for path, url in cluster.buckets},
        "envs": {CONFIG_VARIABLE: job.config_json},
        **({"setup": "\n".join(cluster.setup) + "\n"} if cluster.setup else {}),
        "run": (processes if several else "") + supervised(start, shlex.quote(job.run_dir), job.retries),
    }
