"""Which environments mean several processes, and a run in one that is not JAX's own to detect."""

import http.server
import subprocess
import sys
import threading

import pytest

from maxlm.parallel.launchers import coordinated, several_processes
from tests.multiprocess.launch import PROGRAM, finish, free_port, with_devices
from tests.training.runs import arguments, prepared, rows_of, write_config


@pytest.mark.parametrize(
    "environment, several",
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False),  # the batch script, outside srun
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "WARNING: could not determine TPU worker hostnames, please set it"}, False),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, True),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0", "JOBSET_NAME": "run", "JOB_COMPLETION_INDEX": "0"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}, True),
    ],
)
def test_environments(environment, several):
    assert several_processes({"TPU_SKIP_MDS_QUERY": "1", **environment}) is several


@pytest.mark.parametrize("workers, several", [("a:1:10.0.0.1,b:1:10.0.0.2", True), ("a", False), (None, False)])
def test_compute_engine_says_how_many_hosts(workers, several):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            assert self.path.endswith("/attributes/worker-network-endpoints")
            self.send_response(200 if workers else 404)
            self.end_headers()
            self.wfile.write((workers or "").encode())

        def log_message(self, *words):
            pass

    with http.server.HTTPServer(("localhost", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert several_processes({"GCE_METADATA_IP": f"localhost:{server.server_port}"}) is several
        server.shutdown()


def test_a_long_list_of_workers_is_in_a_file(tmp_path):
    path = tmp_path / "addresses"
    path.write_text("10.0.0.1:8476,10.0.0.2:8476\n")
    assert several_processes({"TPU_SKIP_MDS_QUERY": "1", "TPU_PROCESS_ADDRESSES_PATH": str(path)})


NAMED = {"JAX_COORDINATOR_ADDRESS": "run-hosts-0-0.run:1234", "JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"}


@pytest.mark.parametrize(
    "environment, found",
    [
        ({}, None),
        ({"JOB_COMPLETION_INDEX": "3", "JOBSET_NAME": "run"}, None),  # one of many runs of an indexed job
        (NAMED, ("run-hosts-0-0.run:1234", 4, 3)),
        ({**NAMED, "JAX_PROCESS_ID": "2"}, ("run-hosts-0-0.run:1234", 4, 2)),
        ({"JAX_COORDINATOR_ADDRESS": "run-slice-0-0.run", "JAX_COORDINATOR_PORT": "6002", "NNODES": "2",
          "NODE_RANK": "1"}, ("run-slice-0-0.run:6002", 2, 1)),  # XPK's names
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, ("a:1", 2, 1)),
    ],
)
def test_a_coordinator_that_the_environment_names(environment, found):
    assert coordinated(environment) == found


@pytest.mark.parametrize(
    "environment, complaint",
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "0"}, "the number of processes must be too"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}, "and a smaller index"),
        ({**NAMED, "JOB_COMPLETION_INDEX": "4"}, "and a smaller index"),
        ({**NAMED, "JAX_COORDINATOR_ADDRESS": "a"}, "must be HOST:PORT"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT"),
    ],
)
def test_an_environment_that_does_not_fit(environment, complaint):
    with pytest.raises(ValueError, match=complaint):
        coordinated(environment)


@pytest.mark.slow
def test_pods_of_a_jobset_train_together(tmp_path):
    """Two processes that are told what a GPU pod is told (submit/gke.py), and the mistake of one that is not."""
    config = write_config(tmp_path / "tiny.py", prepared(tmp_path / "data"))
    run, address = tmp_path / "run", f"localhost:{free_port()}"
    started = []
    for index in range(2):
        environment = with_devices(1) | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2",
                                         "JOB_COMPLETION_INDEX": str(index), "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
        words = [str(word) for word in arguments(config, run, "logging.sample_prompt=")]
        started.append(subprocess.Popen([sys.executable, PROGRAM, *words], env=environment, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    ends = finish(started)
    assert [end.code for end in ends] == [0, 0], [end.error for end in ends]
    assert (run / "DONE").exists() and rows_of(run)[-1]["step"] == 6
    assert "on 2 cpu device(s)" in ends[0].error
