"""Several hosts on one machine: each with its own network and name, joined by a bridge whose ports can be pulled.

A cut made this way is a real one: packets vanish without a reset, as with a dead switch, and nothing in the processes
can tell. It needs Linux user namespaces (`private` starts the program again inside some, no root needed). A proxy could
not do it: gloo's processes publish their own addresses and connect to each other directly.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

_INSIDE = "MAXLM_CHAOS_NAMESPACES"
_NEW_NETWORK, _NEW_NAME = 0x40000000, 0x04000000  # CLONE_NEWNET, CLONE_NEWUTS
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_PORTS = iter(range(7000, 65000))


def private() -> bool:
    """Whether this process has namespaces of its own. Where it can, it starts its program again inside new ones."""
    if _INSIDE in os.environ:
        return os.environ[_INSIDE] == "yes"
    command = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--uts"]
    needed = all(shutil.which(program) for program in ("unshare", "nsenter", "ip", "mount"))
    works = needed and not subprocess.run([*command, "ip", "link", "add", "probe", "type", "bridge"],
                                          capture_output=True).returncode
    os.environ[_INSIDE] = "yes" if works else "no"
    if works:
        os.execvp(command[0], [*command, sys.executable, *sys.orig_argv[1:]])
    return False


class Hosts:
    """`count` hosts. `networked` False: they are all this machine, and cannot be cut off.

    lane: hosts of different lanes do not see each other. folder: for the hosts' name list.
    """

    def __init__(self, folder: Path, lane: int, count: int, networked: bool):
        self.networked, self._lane, self._holders = networked, lane, []
        self.names = [f"chaos{lane}-{host}" if networked else "localhost" for host in range(count)]
        if networked:
            self._name(folder)
            _run("ip", "link", "set", "lo", "up")
            _run("ip", "link", "add", f"bridge{lane}", "type", "bridge")
            _run("ip", "link", "set", f"bridge{lane}", "up")
            for host in range(count):
                self._add(host)

    def coordinator(self) -> str:
        """HOST:PORT for the coordinator of a new life, on the first host."""
        if self.networked:
            return f"{self.names[0]}:{next(_PORTS)}"
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            return f"localhost:{probe.getsockname()[1]}"

    def enter(self, host: int) -> None:
        """Moves the calling process onto `host`."""
        if not self.networked:
            return
        for kind in ("net", "uts"):
            with open(f"/proc/{self._holders[host]}/ns/{kind}") as namespace:
                _checked(ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0))

    def cut(self, host: int) -> None:
        """Pulls the host's cable."""
        _run("ip", "link", "set", self._port(host), "down")

    def heal(self) -> None:
        if self.networked:
            for host in range(len(self.names)):
                _run("ip", "link", "set", self._port(host), "up")

    def close(self) -> None:
        for holder in self._holders:
            os.kill(holder, signal.SIGKILL)
            os.waitpid(holder, 0)
        if self.networked:
            _run("umount", "/etc/hosts")  # the name list is busy as long as another lies over it

    def _port(self, host: int) -> str:
        return f"port{self._lane}-{host}"

    def _address(self, host: int) -> str:
        return f"10.77.{self._lane}.{host + 1}"

    def _name(self, folder: Path) -> None:
        """Adds the hosts to what /etc/hosts says in this mount namespace."""
        table = folder / f"hosts{self._lane}"
        lines = [f"{self._address(host)} {name}\n" for host, name in enumerate(self.names)]
        table.write_text(Path("/etc/hosts").read_text() + "".join(lines))
        _run("mount", "--bind", table, "/etc/hosts")

    def _add(self, host: int) -> None:
        """A network needs a process that lives in it: a holder that sleeps."""
        read, write = os.pipe()
        holder = os.fork()
        if holder == 0:
            libc = ctypes.CDLL(None, use_errno=True)
            libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
            _checked(libc.unshare(_NEW_NETWORK | _NEW_NAME))
            socket.sethostname(self.names[host])
            os.write(write, b"!")
            while True:
                time.sleep(3600)
        os.read(read, 1)
        os.close(read)
        os.close(write)
        self._holders.append(holder)
        inside = ("nsenter", "--target", holder, "--net", "ip")
        _run("ip", "link", "add", self._port(host), "type", "veth", "peer", "name", "eth0", "netns", holder)
        _run("ip", "link", "set", self._port(host), "master", f"bridge{self._lane}", "up")
        _run(*inside, "link", "set", "lo", "up")
        _run(*inside, "addr", "add", f"{self._address(host)}/24", "dev", "eth0")
        _run(*inside, "link", "set", "eth0", "up")


def small_disk(folder: Path, size: int, private: bool) -> bool:
    """Makes `folder` a disk of `size` bytes of its own; False where mounting is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    return private and not subprocess.run(options, capture_output=True).returncode


def _run(*words: object) -> None:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")


def _checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
