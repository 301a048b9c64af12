"""A Slurm cluster of this machine alone: munged, slurmctld and slurmd of our own, on ports of 127.0.0.1.

Everything they write is in one folder, and exactly the processes started here are stopped. Credentials expire after
5 seconds (120 by default), because a job that was put back into the queue is held for as long. The packages of Debian
are slurm-wlm and munge.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
CPUS = 4
CONFIG = """
ClusterName=maxlm
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={slurmctld}
SlurmdPort={slurmd}
SrunPortRange=0
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=300
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=test Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


class CannotStart(Exception):
    """Why there is no Slurm on this machine."""


@contextlib.contextmanager
def cluster(folder: pathlib.Path) -> Iterator[dict[str, str]]:
    """Inside, Slurm runs; yields the environment in which its commands find it. Raises CannotStart."""
    missing = [tool for tool in TOOLS if _where(tool) is None]
    if missing:
        raise CannotStart(f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge)")
    if os.geteuid() != 0:
        raise CannotStart("slurmd needs root")
    processes: list[tuple[subprocess.Popen[bytes], pathlib.Path]] = []
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    environment["SLURM_CONF"] = str(folder / "slurm.conf")

    def start(*words: str) -> None:
        log = folder / f"{words[0]}.out"
        with log.open("wb") as out:
            processes.append((subprocess.Popen([_where(words[0]), *words[1:]], stdout=out, stderr=out,
                                               stdin=subprocess.DEVNULL, env=environment), log))

    try:
        _write(folder)
        start("munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket",
              f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed")
        _wait(processes, lambda: (folder / "munge.socket").exists())
        start("slurmctld", "-D")
        start("slurmd", "-D", "-N", "localhost")
        _wait(processes, lambda: b"idle" in subprocess.run(
            ["sinfo", "--noheader", "--format=%T"], env=environment, capture_output=True).stdout)
        yield environment
    finally:
        for process, _ in reversed(processes):
            process.terminate()
        for process, _ in processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _where(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _write(folder: pathlib.Path) -> None:
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    with socket.socket() as first, socket.socket() as second:
        ports = []
        for probe in (first, second):
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, user="root", slurmctld=ports[0], slurmd=ports[1],
                                                     cpus=CPUS))


def _wait(processes: list, ready, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not ready():
        for process, log in processes:
            if process.poll() is not None:
                raise CannotStart(f"{log.stem} ended with exit code {process.returncode}: {_last(log)}")
        if time.monotonic() > until:
            raise CannotStart(f"it is not ready after {seconds:.0f} s: {_last(processes[-1][1])}")
        time.sleep(0.2)


def _last(log: pathlib.Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
