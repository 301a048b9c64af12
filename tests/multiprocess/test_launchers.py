"""Which environments mean several processes."""

import http.server
import threading

import pytest

from maxlm.parallel.launchers import several_processes


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
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, False),  # give the flags
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
