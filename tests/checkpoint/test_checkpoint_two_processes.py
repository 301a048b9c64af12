"""Two processes write one checkpoint, agree on the step to stop at, and what they wrote restores anywhere."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import checkpoint_cases as cases
import jax.numpy as jnp
import numpy as np

import maxlm
from maxlm.checkpoint import latest_step, list_checkpoints, read_meta, restore_state

WORKER = pathlib.Path(__file__).with_name("pair_worker.py")
PYTHONPATH = str(pathlib.Path(maxlm.__file__).parents[1])


def run_until(folder, number, told, at_step):
    """Starts both, sends `number` to process `told` once it printed `at_step`; returns the step both stopped at."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    pair = [
        subprocess.Popen([sys.executable, "-W", "ignore", WORKER, folder, str(port), str(i)],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         env={**os.environ, "PYTHONPATH": PYTHONPATH})
        for i in range(2)
    ]
    try:
        while (line := pair[told].stdout.readline()) != f"step {at_step}\n":
            assert line, pair[told].communicate()[1]
        pair[told].send_signal(number)
        ends = [process.communicate(timeout=60) for process in pair]
    finally:
        for process in pair:
            process.kill()
            process.wait()
    assert [process.returncode for process in pair] == [0, 0], ends
    stopped = [out.splitlines()[-1] for out, _ in ends]
    assert stopped[0] == stopped[1] and stopped[0].startswith("stopped ")
    return int(stopped[0].split()[1])


def test_two_processes_stop_together_and_resume(tmp_path):
    first = run_until(tmp_path, signal.SIGTERM, told=1, at_step=15)
    (tmp_path / f"{first + 1}.orbax-checkpoint-tmp").mkdir()  # as a killed save leaves it
    second = run_until(tmp_path, signal.SIGINT, told=0, at_step=first + 5)
    assert second > first >= 15
    assert latest_step(tmp_path) == second and read_meta(tmp_path) == {"step": second}
    assert [row.complete for row in list_checkpoints(tmp_path)] == [True, True]
    state = {"params": {"a": jnp.full((16, 4), second, jnp.float32), "b": jnp.zeros((16, 4), jnp.bfloat16)}}
    restored = restore_state(tmp_path, second, cases.abstract(cases.mesh(data=4, tensor=2), state))
    assert cases.raw(restored)["params/a"] == cases.raw(state)["params/a"]
    bfloat = np.zeros((), jnp.bfloat16)  # counting in bfloat16 stops at 256; do as the workers did
    for _ in range(second):
        bfloat = (bfloat + jnp.bfloat16(1)).astype(jnp.bfloat16)
    assert np.array_equal(restored["params"]["b"], np.full((16, 4), bfloat))
