"""Which exit codes are started again, on the shell that is submitted, with a `maxlm` that only exits."""

import os
import signal
import subprocess
import time

import pytest

from maxlm.submit import shell


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a script against a maxlm that ends as told, start by start ('done': 0, and DONE); (exit code, starts)."""
    monkeypatch.setattr(shell, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(shell, "LOOKS", "0")
    (tmp_path / "run").mkdir()
    told, maxlm = tmp_path / "told", tmp_path / "maxlm"
    maxlm.write_text(f"""#!/bin/bash
echo "$@" >> {tmp_path}/starts
code=$(sed -n "$(wc -l < {tmp_path}/starts)p" {told})
[ "$code" = done ] && touch {tmp_path}/run/DONE && exit 0
[ "$code" = wait ] && trap 'exit 0' TERM && touch {tmp_path}/ready && while true; do sleep 0.05; done
[ "${{code#-}}" != "$code" ] && kill $code $$
exit $code
""")
    maxlm.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "MAXLM_CONFIG": '{"a": "b c"}'}

    def started(script, *codes):
        told.write_text("".join(f"{code}\n" for code in codes))
        return subprocess.Popen(["bash", "-c", script], env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL)

    def ended(script, *codes):
        code = started(script, *codes).wait(timeout=60)
        return code, len((tmp_path / "starts").read_text().splitlines())

    ended.started, ended.folder, ended.run_dir = started, tmp_path, str(tmp_path / "run")
    return ended


@pytest.mark.parametrize(
    "codes, code, starts",
    [
        (["done"], 0, 1),
        ([2], 2, 1),
        ([3], 3, 1),
        ([75, 75, "done"], 0, 3),
        ([1, -9, "done"], 0, 3),
        ([75, 1, 134], 134, 3),
        ([0, 0, 0, "done"], 0, 4),  # stopped as asked: not counted
        ([1, 0, 1, 2], 2, 4),
    ],
)
def test_supervised(run, codes, code, starts):
    script = shell.supervised(f"bash -c '{shell.train(run.run_dir)}'", run.run_dir, retries=2)
    assert run(script, *codes) == (code, starts)


@pytest.mark.parametrize("given, code", [("done", 0), (0, 75), (2, 2), (3, 3), (75, 75), (1, 1)])
def test_once(run, given, code):
    assert run(shell.once(run.run_dir), given) == (code, 1)


def test_a_container_that_is_told_to_stop(run):
    """SIGTERM comes to the shell alone. What it exits with says that there is more to do."""
    process = run.started(shell.once(run.run_dir), "wait")
    until = time.monotonic() + 30
    while not (run.folder / "ready").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75


def test_the_config_arrives_whole(run):
    (run.folder / "maxlm").write_text('#!/bin/bash\ncat "$2"; echo " $3 $4"\n')
    out = subprocess.run(["bash", "-c", shell.train("/a run")], capture_output=True, text=True, check=True, env={
        **os.environ, "PATH": f"{run.folder}:{os.environ['PATH']}", "MAXLM_CONFIG": '{"a": "b $(c) \'d\'"}'}).stdout
    assert out == '{"a": "b $(c) \'d\'"} --run-dir /a run\n'
