"""Checkpoints of a run: state, data position and resolved config, written asynchronously and committed atomically.

DIR/STEP/ is one checkpoint: `state/` holds the arrays (Orbax OCDBT), `meta/meta.json` what they belong to.
A step is listed only once it is complete; a save that was killed leaves nothing that looks like one.

  layout.py       what is on disk: steps, completeness, keep policy, reading meta.json   (no JAX)
  leaves.py       any pytree <-> a flat dict of arrays under stable readable names
  orbax_io.py     the only module that talks to Orbax
  checkpointer.py the writer: asynchronous save, pruning, errors
  digest.py       SHA-256 of the parameters, independent of mesh
"""

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.digest import array_digest, tree_digest
from maxlm.checkpoint.layout import CheckpointError, CheckpointRow, latest_step, list_checkpoints, read_meta
from maxlm.checkpoint.leaves import named_leaves
from maxlm.checkpoint.orbax_io import restore_state

__all__ = [
    "CheckpointError",
    "CheckpointRow",
    "Checkpointer",
    "array_digest",
    "latest_step",
    "list_checkpoints",
    "named_leaves",
    "read_meta",
    "restore_state",
    "tree_digest",
]
