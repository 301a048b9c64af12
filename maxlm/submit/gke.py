"""Google Kubernetes Engine: a run as a JobSet, queued by Kueue.

A replicated job is a slice, a pod is a host. GKE tells the pods of a TPU slice, and JobSet those of several slices, who
they are, and JAX reads it; GPU pods get the coordinator's variables (parallel/launchers.py). A pod that fails fails
its job at once, and the JobSet starts all of them again, unless the exit code is one that is never retried.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from maxlm.schema import require
from maxlm.submit.job import Job, check_kept
from maxlm.submit.shell import CONFIG_VARIABLE, NEVER_RETRIED, once

PLATFORMS = ("tpu", "gpu")
CONTAINER, COORDINATOR_PORT = "train", 1234
QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"
SWEEP = "maxlm/sweep"  # the label of a sweep's runs


@dataclass(frozen=True)
class Cluster:
    """What this cluster needs beside the job. `claims` are (persistent volume claim, mount path)."""

    image: str
    queue: str | None = None
    priority: str | None = None
    namespace: str | None = None
    claims: tuple[tuple[str, str], ...] = ()
    node_selector: tuple[tuple[str, str], ...] = ()
    setup: tuple[str, ...] = ()


def add_options(add: Callable[..., object]) -> None:
    """`add` is a parser's or a group's add_argument."""
    add("--queue", help="Kueue's local queue (default: none, started at once)")
    add("--priority", help="Kueue's workload priority class")
    add("--namespace")
    add("--claim", action="append", default=[], metavar="NAME:PATH",
        help="a persistent volume claim, mounted at PATH; the run directory and the data are on one; repeatable")
    add("--node-selector", action="append", default=[], metavar="KEY=VALUE",
        help="such as cloud.google.com/gke-spot=true; repeatable")


def cluster(arguments: argparse.Namespace) -> Cluster:
    require(bool(arguments.image), "--image is needed: a container image with maxlm in it")
    return Cluster(arguments.image, arguments.queue, arguments.priority, arguments.namespace,
                   tuple(_pair("--claim", text, ":") for text in arguments.claim),
                   tuple(_pair("--node-selector", text, "=") for text in arguments.node_selector),
                   tuple(arguments.setup))


def _pair(option: str, text: str, separator: str) -> tuple[str, str]:
    key, _, value = text.partition(separator)
    names = "NAME:/PATH" if separator == ":" else "KEY=VALUE"
    require(bool(key and value) and (separator == "=" or value.startswith("/")), f"{option} {text} must be {names}")
    return key, value


def check_claimed(path: str, cluster: Cluster) -> None:
    check_kept(path, (mount for _, mount in cluster.claims), "mount a volume that holds it with --claim NAME:/PATH")


def jobset(job: Job, cluster: Cluster, labels: dict[str, str] | None = None) -> dict[str, Any]:
    """The manifest of a run. Raises ConfigError where no claim holds the run directory, or for several slices of one
    host each, which GKE does not join."""
    check_claimed(job.run_dir, cluster)
    require(job.slices == 1 or job.topology.hosts > 1, f"--slices {job.slices}: GKE joins slices of several hosts, and "
                                                       f"{job.topology} is one host")
    queueing = {QUEUE: cluster.queue, PRIORITY: cluster.priority}
    tpu = job.topology.platform == "tpu"
    metadata: dict[str, Any] = {
        "name": job.name, "labels": (labels or {}) | {key: value for key, value in queueing.items() if value},
    }
    if cluster.namespace:
        metadata["namespace"] = cluster.namespace
    if tpu and job.topology.hosts > 1:  # such a slice is a node pool, and no two jobs share one
        metadata["annotations"] = {EXCLUSIVE: "cloud.google.com/gke-nodepool"}
    hosts = job.topology.hosts
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": job.retries,
                "rules": [{"name": "never_retried", "action": "FailJobSet",
                           "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{
                "name": _replicated(job),
                "replicas": job.slices,
                "template": {"spec": {
                    "completionMode": "Indexed", "parallelism": hosts, "completions": hosts, "backoffLimit": 0,
                    "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": {
                        "containerName": CONTAINER, "operator": "In", "values": list(NEVER_RETRIED)}}]},
                    "template": {"spec": _pod(job, cluster)},
                }},
            }],
        },
    }


def _replicated(job: Job) -> str:
    return "slice" if job.topology.platform == "tpu" else "hosts"


def _pod(job: Job, cluster: Cluster) -> dict[str, Any]:
    place, tpu = job.topology, job.topology.platform == "tpu"
    selector = {"cloud.google.com/gke-tpu-accelerator": place.gke_accelerator,
                "cloud.google.com/gke-tpu-topology": place.shape} if tpu else {
                "cloud.google.com/gke-accelerator": place.gke_accelerator}
    volumes = [({"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": name}}, path)
               for number, (name, path) in enumerate(cluster.claims)]
    if not tpu:  # NCCL's processes share memory, and a container has 64 MB of it
        volumes.append(({"name": "shm", "emptyDir": {"medium": "Memory"}}, "/dev/shm"))
    chips = {"google.com/tpu" if tpu else "nvidia.com/gpu": str(place.chips_per_host)}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_seconds,
        "nodeSelector": selector | dict(cluster.node_selector),
        "containers": [{
            "name": CONTAINER,
            "image": cluster.image,
            "command": ["bash", "-c", "\n".join([*cluster.setup, once(job.run_dir)])],
            "env": _environment(job),
            "resources": {"requests": chips, "limits": chips},
            "volumeMounts": [{"name": volume["name"], "mountPath": path} for volume, path in volumes],
        }],
        "volumes": [volume for volume, _ in volumes],
    }


def _environment(job: Job) -> list[dict[str, str]]:
    """Kubernetes would replace $(NAME) in a value, and reads $$ as $."""
    variables = {CONFIG_VARIABLE: job.config_json.replace("$(", "$$(")}
    if job.topology.platform == "gpu" and job.topology.hosts > 1:  # JOB_COMPLETION_INDEX says which process one is
        variables["JAX_COORDINATOR_ADDRESS"] = f"{job.name}-{_replicated(job)}-0-0.{job.name}:{COORDINATOR_PORT}"
        variables["JAX_NUM_PROCESSES"] = str(job.topology.hosts)
    return [{"name": name, "value": value} for name, value in variables.items()]


def to_yaml(*manifests: dict[str, Any]) -> str:
    import yaml

    return yaml.dump_all(manifests, Dumper=_dumper(), sort_keys=False, width=2**20)


def _dumper() -> Any:
    """PyYAML's, with text of several lines as it is."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None))
    return Dumper
