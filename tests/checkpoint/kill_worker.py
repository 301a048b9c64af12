"""Restarts a saving process over and over and kills it with SIGKILL: by turns inside a save and at random moments.

    python kill_worker.py FOLDER SEED TRIALS     prints one JSON object: what the kills hit

Each life first checks what it finds, as a run that resumes does: the newest complete checkpoint must hold exactly the
bytes of its step, and no step that a former life saw complete may be lost. Then it saves step after step until killed.
A life is a fork of this process, which has imported everything but started no JAX backend: 0.3 s instead of 2.
"""

import functools
import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

from maxlm.checkpoint import Checkpointer, array_digest, named_leaves, orbax_io, read_meta, tree_digest
from maxlm.checkpoint.layout import complete_steps

SIZE = 200_000
KEEP_LAST = 2
ENTRIES = 21  # files and folders of a save just before its commit


def state(step):
    words = np.random.default_rng(step).integers(0, 2**31, (3, SIZE), dtype=np.int32)
    return {"params": {f"w{i}": row for i, row in enumerate(words)}, "step": np.int32(step)}


def life(folder, report):
    newest = int((folder / "seen").read_text() or 0) if (folder / "seen").exists() else 0
    steps = complete_steps(folder / "checkpoints")
    assert max(steps, default=0) >= newest, f"step {newest} was complete and is lost: {steps}"
    for step in steps:
        assert tree_digest(folder / "checkpoints", step) == array_digest(
            named_leaves({"params": state(step)["params"]})
        ), f"step {step} is complete but damaged"
        assert read_meta(folder / "checkpoints", step) == {"step": step}
    checkpointer = Checkpointer(folder / "checkpoints", keep_last=KEEP_LAST)
    names = {p.name for p in (folder / "checkpoints").iterdir()}
    assert all(name.isdigit() for name in names), f"leftovers were not cleaned: {names}"
    os.write(report, b"r")
    step = max(steps, default=0)
    while True:
        step += 1
        checkpointer.save(step, jax.tree.map(jax.numpy.asarray, state(step)), {"step": step})
        if complete := complete_steps(folder / "checkpoints"):
            (folder / "seen.new").write_text(str(complete[-1]))
            (folder / "seen.new").replace(folder / "seen")


def inside_a_save(checkpoints, child, entries):
    """Returns when `child`, which it stops, has a save under way that holds `entries` files and folders or more, or
    when it has ended. However slow the machine is, this waits."""
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        for save in checkpoints.glob("*-tmp"):
            if sum(len(folders) + len(files) for _, folders, files in os.walk(save)) >= entries:
                os.kill(child, signal.SIGSTOP)
                os.waitid(os.P_PID, child, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
                if save.exists():  # not done meanwhile
                    return
                os.kill(child, signal.SIGCONT)
        time.sleep(0.001)


def run_and_kill(folder, wait):
    """One life, killed after `wait(process id)`. Returns False where it ended by itself, which is a failed check."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            life(folder, write)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os.close(write)
    ready = select.select([read], [], [], 300)[0] and os.read(read, 1) == b"r"
    if ready:
        wait(child)
    os.kill(child, signal.SIGKILL)
    os.close(read)
    status = os.waitpid(child, 0)[1]
    return bool(ready) and os.WIFSIGNALED(status)


def main(folder, seed, trials):
    orbax_io._orbax()
    chosen = random.Random(seed)
    hits = {"trials": 0, "mid_save": 0, "mid_delete": 0, "extra_kept": 0}
    for trial in range(trials):
        entries, seconds = chosen.randint(1, ENTRIES), chosen.uniform(0.0, 0.8)
        wait = (functools.partial(inside_a_save, folder / "checkpoints", entries=entries) if trial % 2 == 0 else
                lambda _, seconds=seconds: time.sleep(seconds))
        if not run_and_kill(folder, wait):
            sys.exit(f"trial {hits['trials']} of seed {seed} failed")
        names = [p.name for p in (folder / "checkpoints").iterdir()]
        hits["trials"] += 1
        hits["mid_save"] += any(name.endswith("-tmp") for name in names)
        hits["mid_delete"] += any(name.endswith(".deleting") for name in names)
        hits["extra_kept"] += sum(name.isdigit() for name in names) > KEEP_LAST
    steps = complete_steps(folder / "checkpoints")
    print(json.dumps({**hits, "steps": steps[-1] if steps else 0}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
