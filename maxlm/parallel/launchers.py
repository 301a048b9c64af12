"""Whether the environment says that this process is one of several: Slurm, Open MPI, TPU slices.

JAX detects these launchers itself and finds the coordinator, the number of processes and which one this is. But it also
does so where there is one process, and may then wait for others; so it is asked only where this module says yes.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping

_METADATA_SECONDS = 2


def several_processes(environment: Mapping[str, str]) -> bool:
    """True inside `srun` or `mpirun` with more than one task, on a TPU slice of several hosts (on GKE by its
    environment variables, on Compute Engine by its metadata server), and for several TPU slices."""
    return (
        _number(environment, "SLURM_STEP_NUM_TASKS") > 1
        or ("OMPI_MCA_orte_hnp_uri" in environment and _number(environment, "OMPI_COMM_WORLD_SIZE") > 1)
        or _number(environment, "MEGASCALE_NUM_SLICES") > 1
        or any(_several_hosts(environment.get(name, "")) for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"))
        or _compute_engine_workers(environment) > 1
    )


def _several_hosts(names: str) -> bool:
    """Whether this is a list of hosts. Off a TPU, libtpu puts a warning into these variables, with a comma in it."""
    return "," in names and " " not in names


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else 0


def _compute_engine_workers(environment: Mapping[str, str]) -> int:
    """Hosts of this TPU slice; 0 where this is no TPU VM of Compute Engine. Asks the network only if a TPU is here."""
    here = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    if "GCE_METADATA_IP" not in environment and (not here or "TPU_SKIP_MDS_QUERY" in environment):
        return 0
    import urllib.request

    host = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/worker-network-endpoints",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as answer:
            return len(answer.read().decode().split(","))
    except (OSError, ValueError):
        return 0
