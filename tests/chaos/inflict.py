"""Doing to a living run what a fault says, and undoing what an operator would undo before starting it again."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import time
from pathlib import Path

from tests.chaos.faults import Fault
from tests.chaos.hosts import Hosts
from tests.chaos.processes import Life

BALLAST = "ballast"


def inflict(fault: Fault, life: Life, hosts: Hosts, disk: Path, own_disk: bool) -> str:
    """Strikes; returns once a fault that passes has passed. Says what was done, where the fault leaves that open."""
    match fault.kind:
        case "kill one" | "kill all" | "damage":
            life.signal(fault.targets, signal.SIGKILL)
        case "SIGTERM one" | "SIGTERM all":
            life.signal(fault.targets, signal.SIGTERM)
        case "hang":
            life.signal(fault.targets, signal.SIGSTOP)
        case "pause":
            life.signal(fault.targets, signal.SIGSTOP)
            time.sleep(fault.seconds)
            life.signal(fault.targets, signal.SIGCONT)
        case "cut":
            hosts.cut(fault.targets[0])
        case "blip":
            hosts.cut(fault.targets[0])
            time.sleep(fault.seconds)
            hosts.heal()
        case "disk full":
            room = random.Random(fault.draw).randrange(40_000)  # a checkpoint of the tiny model takes more
            return _fill(disk, room) if own_disk else _limit(life, room // 20)
    return ""


def repair(hosts: Hosts, disk: Path) -> None:
    hosts.heal()
    (disk / BALLAST).unlink(missing_ok=True)


def _fill(disk: Path, room: int) -> str:
    """Takes all there is, then gives `room` bytes back: the run may be writing meanwhile."""
    ballast = os.open(disk / BALLAST, os.O_CREAT | os.O_WRONLY)
    size = 0
    with contextlib.suppress(OSError):
        while True:
            size += os.write(ballast, bytes(1 << 20))
    os.ftruncate(ballast, max(0, size - room))
    os.close(ballast)
    return f"{room} bytes free"


def _limit(life: Life, size: int) -> str:
    """What a full disk is where no small one could be mounted: files that may not grow."""
    for index in life.running():
        resource.prlimit(life.processes[index], resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    return f"files of {size} bytes at most"


def damage(checkpoint: Path, fault: Fault) -> str:
    """Does `fault.detail` to a file of `checkpoint`; says to which."""
    draw = random.Random(fault.draw)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    arrays = [path for path in files if path.parent.name == "d"]  # OCDBT keeps array data in folders of this name
    match fault.detail:
        case "truncate":
            file = draw.choice(files)
            _replace(file, file.read_bytes()[: draw.randrange(file.stat().st_size)])
        case "flip":
            file = draw.choice(arrays)
            content = bytearray(file.read_bytes())
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            _replace(file, bytes(content))
        case "delete":
            file = draw.choice(files)
            file.unlink()
        case "empty metadata":
            file = draw.choice([path for path in files if path not in arrays])
            _replace(file, b"")
        case other:
            raise ValueError(f"no damage is called {other!r}")
    return f"{fault.detail} of {file.relative_to(checkpoint.parent)}"


def _replace(file: Path, content: bytes) -> None:
    """Not in place: the harness keeps hard links to what it compares."""
    file.unlink()
    file.write_bytes(content)
