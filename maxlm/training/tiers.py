"""Where a run's checkpoints go, and after which steps: the config's two tiers, as the loop uses them."""

from __future__ import annotations

from pathlib import Path

import jax

from maxlm.checkpoint import Checkpointer, redirect
from maxlm.config import RunConfig
from maxlm.parallel.distributed import together
from maxlm.training.saved_run import CHECKPOINTS


def open_checkpoints(config: RunConfig, run_dir: Path) -> Checkpointer:
    """The run's one writer. With `checkpoint.path`, RUN_DIR/checkpoints is a link to it. Raises CheckpointError."""
    folder, keep, spike = run_dir / CHECKPOINTS, config.checkpoint, config.resilience.spike
    with together("preparing the checkpoints"):
        if keep.path is not None and jax.process_index() == 0:
            redirect(folder, keep.path)
    return Checkpointer(
        folder, keep_last=keep.keep_last, keep_every=keep.keep_every,
        keep_behind=spike.skip_batches if spike.action == "rollback" else 0,
        local_path=keep.local_path, local_keep_last=keep.local_keep_last,
    )


def due_locally(config: RunConfig, step: int) -> bool:
    """Whether the local tier saves `step`, unless the durable one does."""
    every = config.checkpoint.local_every_steps
    return every > 0 and step % every == 0
