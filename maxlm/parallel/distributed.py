"""One run in several processes, through JAX's own runtime: starting it, agreeing, and leaving together.

Process 0 hosts JAX's coordination service at HOST:PORT; the others come to it. Collectives between CPU processes go
through gloo. A process that dies closes its connections, which ends a gloo collective at once; where nothing notices
(a cut network, a TPU collective), the service misses its heartbeats and JAX aborts the rest (exit code 134).

While a run is being set up, a mistake that only one process sees (its own disk, the lock that process 0 takes) must
not leave the others waiting in a collective. So each phase of it runs inside `together`, and everything that has to
be the same everywhere goes through `check_identical`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from maxlm.parallel.launchers import coordinated, several_processes
from maxlm.schema import ConfigError

INITIALIZE_SECONDS = 120  # for all processes to arrive that a user starts
LAUNCHED_SECONDS = 600  # that a scheduler starts: one host may still be pulling its image
HEARTBEAT_SECONDS = 30  # without a sign of life a process counts as dead
SHUTDOWN_SECONDS = 30  # for all processes to leave, once their work is done
FAREWELL_SECONDS = 3  # that a failing process gives the others to fail in the same way

USER_MISTAKE, CRASHED, PEER_LOST = 2, 1, 75  # exit codes; 75 is EX_TEMPFAIL, which orchestrators restart

_NOTE_BYTES = 512  # what a process says of itself in an exchange: its exit code, then UTF-8 text


class PeerError(RuntimeError):
    """Another process of the run failed while this one was well. `exit_code` is what that process exits with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def processes(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Iterator[bool]:
    """Inside, JAX's devices are those of all processes of the run. Yields whether there are several.

    Give all three (HOST:PORT of process 0, how many, which one this is) or none. With none, JAX's own detection of a
    launcher is used where the environment says that there is more than one process, else the coordinator that the
    environment names (launchers.py), and one process starts nothing. Must come before anything that starts JAX's
    backend. Leaving it normally waits for the others.

    Raises ConfigError for flags that do not fit together and for a port that cannot be used. Ends the process with
    one line where the others have not come in time, because JAX would abort: with exit code 2 after INITIALIZE_SECONDS
    where there are flags; else, because then it is no mistake, with 75 after LAUNCHED_SECONDS.
    """
    launched = not _checked(coordinator, num_processes, process_id)
    if launched and not several_processes(os.environ):
        coordinator, num_processes, process_id = coordinated(os.environ) or (None, 1, None)
    if num_processes == 1:
        yield False
        return
    _start(coordinator, num_processes, process_id, launched)
    yield True
    stop()


def _checked(coordinator: str | None, num_processes: int | None, process_id: int | None) -> bool:
    """Whether the flags are given; raises ConfigError where they contradict."""
    flags = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) == len(flags):
        return False
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be given too: --coordinator, --num-processes and --process-id "
                          "go together")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--coordinator {coordinator} must be HOST:PORT of process 0, such as 10.0.0.1:1234")
    if num_processes < 1:
        raise ConfigError(f"--num-processes {num_processes} must be 1 or more")
    if not 0 <= process_id < num_processes:
        raise ConfigError(f"--process-id {process_id} must be from 0 to {num_processes - 1}, which is "
                          f"--num-processes {num_processes} less 1")
    return True


def _start(coordinator: str | None, num_processes: int | None, process_id: int | None, launched: bool) -> None:
    import jax

    if jax.config.jax_cpu_collectives_implementation is None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    times = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS, "shutdown_timeout_seconds": SHUTDOWN_SECONDS}
    seconds, code = (LAUNCHED_SECONDS, PEER_LOST) if launched else (INITIALIZE_SECONDS, USER_MISTAKE)
    deadline = time.monotonic() + seconds
    if coordinator is not None:
        if process_id:
            _reach(coordinator, deadline, f"for {seconds} s", code)
        else:
            _check_free(coordinator)
        times |= {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id,
                  "cluster_detection_method": "deactivate"}
    arrived = threading.Event()
    threading.Thread(target=_give_up, args=(arrived, deadline, num_processes, seconds, code), daemon=True).start()
    try:
        jax.distributed.initialize(initialization_timeout=2 * seconds, **times)
        jax.devices()  # where all exchange what devices they have
    except (RuntimeError, ValueError, OSError) as error:
        raise _apart(f"the processes of this run did not come together ({_first_line(error)}): give --coordinator, "
                     "--num-processes and --process-id", code) from error
    finally:
        arrived.set()


def _check_free(coordinator: str) -> None:
    """That this process can listen there. JAX, where it cannot, crashes now and then."""
    port = int(coordinator.rpartition(":")[2])
    family = socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(f"--coordinator {coordinator}: port {port} cannot be used on this host "
                              f"({error.strerror}): choose another for all processes") from error


def _apart(message: str, code: int) -> Exception:
    return ConfigError(message) if code == USER_MISTAKE else PeerError(message, code)


def _reach(coordinator: str, deadline: float, waited: str, code: int) -> None:
    """Returns once process 0 listens. JAX's own attempt would end in an abort with a stack trace."""
    host, _, port = coordinator.rpartition(":")
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise _apart(f"--coordinator {coordinator} could not be reached {waited} ({error.strerror or error}): "
                             "check the address, and that process 0 was started", code) from error
        time.sleep(0.2)


def _give_up(arrived: threading.Event, deadline: float, num_processes: int | None, seconds: float, code: int) -> None:
    if not arrived.wait(deadline - time.monotonic()):
        expected = "the others" if num_processes is None else f"all {num_processes} processes"
        fix = "start each with its own --process-id" if code == USER_MISTAKE else "see why the others did not start"
        print(f"maxlm: waited {seconds} s for {expected} of this run: {fix}", file=sys.stderr, flush=True)
        os._exit(code)


def stop() -> None:
    """Leaves JAX's runtime once every process is here."""
    import jax

    jax.distributed.shutdown()


def leave(code: int) -> None:
    """Ends a process of a run that failed; does nothing where there is one process, or where all left together.

    The interpreter's own way out would wait SHUTDOWN_SECONDS for processes that may be stuck in a collective with this
    one. Those that fail alike are given FAREWELL_SECONDS, so that each exits with its own code.
    """
    if not _initialized():
        return
    farewell = threading.Thread(target=stop, daemon=True)
    farewell.start()
    farewell.join(FAREWELL_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost_peer(error: BaseException | None) -> str | None:
    """What `error` or one of its causes says of a lost process, if that is what it is about."""
    while error is not None and _initialized():
        text = str(error)
        if any(word in text for word in ("Gloo", "coordination service", "CoordinationService", "heartbeat")):
            return _first_line(error)
        error = error.__cause__ or error.__context__
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def together(doing: str) -> Iterator[None]:
    """Runs its block, which must hold no collective, and returns when all processes have run theirs.

    Where it raised an Exception on some, it is raised there, and PeerError on the others: all fail, with one message
    and one exit code. One that is still busy (preparing text) is waited for. One process: nothing is added.
    """
    if _alone():
        yield
        return
    try:
        yield
    except Exception as error:
        with contextlib.suppress(RuntimeError):  # a peer that is gone is not what went wrong here
            _exchange(exit_code_of(error), _first_line(error))
        raise
    notes = _exchange(0, "")
    failed = [(process, code, text) for process, (code, text) in enumerate(notes) if code]
    if failed:
        process, code, text = failed[0]
        raise PeerError(f"process {process} failed {doing}: {text}", code)


def check_identical(values: Mapping[str, str]) -> None:
    """Raises ConfigError, on all processes alike, where one of the named values is not the same on every process."""
    if _alone():
        return
    for name, value in values.items():
        notes = _exchange(0, hashlib.sha256(value.encode()).hexdigest())
        others = [process for process, note in enumerate(notes) if note != notes[0]]
        if others:
            raise ConfigError(f"{name} is not the same on process {', '.join(map(str, others))} as on process 0: "
                              "start all processes of a run alike")


def exit_code_of(error: Exception) -> int:
    """The exit code that the command line gives this error, told by name so that nothing is imported for it."""
    if isinstance(error, PeerError):
        return error.exit_code
    if lost_peer(error):
        return PEER_LOST
    if isinstance(error, (ConfigError, OSError)) or type(error).__name__ in ("CheckpointError", "WorkerError"):
        return USER_MISTAKE
    return {"RunStopped": 3, "IntegrityError": 3}.get(type(error).__name__, CRASHED)


def _initialized() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _alone() -> bool:
    """Whether the run has one process. Does not start JAX."""
    return not _initialized() or sys.modules["jax"].process_count() == 1


def _exchange(code: int, text: str) -> list[tuple[int, str]]:
    """Everyone's (code, text), by process. Collective."""
    import numpy as np
    from jax.experimental import multihost_utils

    mine = np.zeros(_NOTE_BYTES, np.uint8)
    said = bytes([code]) + text.encode()[: _NOTE_BYTES - 1]
    mine[: len(said)] = np.frombuffer(said, np.uint8)
    every: Any = multihost_utils.process_allgather(mine)
    rows = (bytes(row) for row in every)
    return [(row[0], row[1:].rstrip(b"\0").decode(errors="ignore")) for row in rows]
