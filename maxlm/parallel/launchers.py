"""Whether the environment says that this process is one of several: Slurm, Open MPI, TPU slices, a JobSet of GPUs.

JAX detects the first three itself and finds the coordinator, the number of processes and which one this is. But it also
does so where there is one process, and may then wait for others; so it is asked only where this module says yes.
Kubernetes has no such convention: there the job's manifest names the coordinator (`coordinated`).
"""

from __future__ import annotations

import glob
from collections.abc import Mapping

from maxlm.schema import require

_METADATA_SECONDS = 2
ADDRESS, PORT = "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT"
NUMBER = ("JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE", "NNODES")
INDEX = ("JAX_PROCESS_ID", "OMPI_COMM_WORLD_RANK", "NODE_RANK", "JOB_COMPLETION_INDEX")


def several_processes(environment: Mapping[str, str]) -> bool:
    """True inside `srun` or `mpirun` with more than one task, on a TPU slice of several hosts (on GKE by its
    environment variables, on Compute Engine by its metadata server), and for several TPU slices."""
    return (
        _number(environment, "SLURM_STEP_NUM_TASKS") > 1
        or ("OMPI_MCA_orte_hnp_uri" in environment and _number(environment, "OMPI_COMM_WORLD_SIZE") > 1)
        or _number(environment, "MEGASCALE_NUM_SLICES") > 1
        or any(_several_hosts(names) for names in _worker_lists(environment))
        or _compute_engine_workers(environment) > 1
    )


def coordinated(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """(HOST:PORT of process 0, how many, which one this is) from variables of the environment, or None where no
    coordinator is named. Number and index may have the names of XPK (GKE) and Open MPI; an indexed job sets its own.

    Raises ConfigError where the variables do not fit: each process would take itself for the only one.
    """
    address = environment.get(ADDRESS)
    if not address:
        require(_number(environment, "OMPI_COMM_WORLD_SIZE") < 2, "Open MPI 5 does not say where process 0 is: "
                                                                  f"mpirun -x {ADDRESS}=HOST:PORT maxlm ...")
        return None
    if PORT in environment and ":" not in address:
        address = f"{address}:{environment[PORT]}"
    require(address.rpartition(":")[2].isdecimal(), f"{ADDRESS}={address} must be HOST:PORT, or set {PORT}")
    number, index = (next((_number(environment, name) for name in names if environment.get(name, "").isdecimal()), None)
                     for names in (NUMBER, INDEX))
    require(number is not None and index is not None and index < number,
            f"{ADDRESS} is set, so the number of processes must be too ({', '.join(NUMBER)}), and a smaller index "
            f"({', '.join(INDEX)})")
    return address, number, index


def _worker_lists(environment: Mapping[str, str]) -> list[str]:
    """What GKE says of the hosts of a TPU slice. Newer versions write long lists into a file."""
    lists = [environment.get(name, "") for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")]
    if path := environment.get("TPU_PROCESS_ADDRESSES_PATH"):
        with open(path, encoding="utf-8") as file:
            lists.append(file.read().strip())
    return lists


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
