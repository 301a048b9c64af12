"""A process that the watchdog watches:  python watchdog_worker.py RUN_DIR WHAT

WHAT: 'sleep' hangs in Python, 'locked' hangs in C holding the interpreter's lock, 'slow' and 'compile' are healthy.
Prints 'ended' where it was let to.
"""

import ctypes
import pathlib
import sys
import time

from maxlm.config.resilience import WatchdogConfig
from maxlm.resilience import Goodput, watchdog

BOUND = 1.0


def hang_here():
    time.sleep(60)


def main(run_dir, what):
    watchdog.LAST_RESORT_SECONDS = 1.0
    config = WatchdogConfig(step_seconds=BOUND, step_factor=3.0, phase_seconds=10.0)
    goodput = Goodput(run_dir)
    with watchdog.Watchdog(config, run_dir, goodput, process=0) as watched:
        with goodput.phase("compile"):
            time.sleep(3 * BOUND if what == "compile" else 0)
        with goodput.stepping():
            for step in range(1, 5):
                time.sleep({"slow": 0.6, "locked": 0.3}.get(what, 0.01) * BOUND)
                watched.dispatched(step)
                watched.finished(step)
                goodput.step_done(step)
            if what == "sleep":
                hang_here()
            if what == "locked":
                ctypes.PyDLL(None).sleep(60)
    print("ended")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2])
