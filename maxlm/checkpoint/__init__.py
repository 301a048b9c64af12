"""Checkpoints of a run: state, data position and resolved config, written asynchronously and committed atomically.

DIR/STEP/ is one checkpoint: `state/` holds the arrays (Orbax OCDBT), `meta/meta.json` what they belong to.
A step is listed only once it is complete; a save that was killed leaves nothing that looks like one. Every file has
its checksums in STEP/manifest.json, and nothing is restored that differs from them.

  layout.py       what is on disk: steps, completeness, keep policy, reading meta.json   (no JAX)
  leaves.py       any pytree <-> a flat dict of arrays under stable readable names
  orbax_io.py     the only module that talks to Orbax: writing
  reading.py      reading what Orbax wrote, with TensorStore
  integrity.py    checksums of every file: written before a step is visible, compared before it is trusted
  verified.py     restore that checks what it reads; the newest good step, with damaged ones set aside
  local_tier.py   each process's own shards on its own host, often
  peers.py        restore from the local tiers of all hosts together
  agreement.py    what each process found, made known to all
  checkpointer.py the writer: asynchronous save, pruning, errors
  digest.py       SHA-256 of the parameters, independent of mesh
"""

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.digest import array_digest, tree_digest
from maxlm.checkpoint.layout import (
    CheckpointError,
    CheckpointRow,
    IntegrityError,
    latest_step,
    list_checkpoints,
    read_meta,
    redirect,
)
from maxlm.checkpoint.leaves import named_leaves
from maxlm.checkpoint.verified import restore_state, verify

__all__ = [
    "CheckpointError",
    "CheckpointRow",
    "Checkpointer",
    "IntegrityError",
    "array_digest",
    "latest_step",
    "list_checkpoints",
    "named_leaves",
    "read_meta",
    "redirect",
    "restore_state",
    "tree_digest",
    "verify",
]
