"""Checkpoints of a run: state, data position and resolved config, written asynchronously and committed atomically.

A step is listed only once it is complete; a save that was killed leaves nothing that looks like one. All that is stored
has checksums, and nothing is restored that differs from them. In a folder, DIR/STEP/ is one checkpoint, as Orbax writes
it (layout.py); in an object store it is URL/STEP.SAVE/ (bucket.py).

  durable.py      a folder or an object store, and what anyone may ask of it: steps, rows, meta
  folder.py       the durable tier in a folder
  layout.py       what is there on disk: steps, completeness, keep policy, reading meta.json   (no JAX)
  orbax_io.py     the only module that talks to Orbax: writing
  chunks.py       reading what Orbax wrote, straight from its files
  integrity.py    checksums of every file: written before a step is visible, compared before it is trusted
  bucket.py       the durable tier in an object store
  parts.py        what each process writes there, in objects of bounded size
  object_store.py TensorStore's key-value stores: list, read, write, delete
  reading.py      onto devices or into numpy, whatever it is read from
  gather.py       arrays put together from blocks or objects that are checked as they are read
  leaves.py       any pytree <-> a flat dict of arrays under stable readable names
  pieces.py       parts of arrays as raw bytes, and how they cover each other
  verified.py     restore that checks what it reads; the newest good step, with damaged ones set aside
  local_tier.py   each process's own shards on its own host, often
  peers.py        restore from the local tiers of all hosts together
  agreement.py    what each process found, made known to all
  checkpointer.py the writer: asynchronous save, pruning, errors
  digest.py       SHA-256 of the parameters, independent of mesh
"""

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.digest import array_digest, tree_digest
from maxlm.checkpoint.durable import complete_steps, latest_step, list_checkpoints, read_meta, redirect, require_step
from maxlm.checkpoint.layout import CheckpointError, CheckpointRow, IntegrityError
from maxlm.checkpoint.leaves import named_leaves
from maxlm.checkpoint.verified import restore_state, verify

__all__ = [
    "CheckpointError",
    "CheckpointRow",
    "Checkpointer",
    "IntegrityError",
    "array_digest",
    "complete_steps",
    "latest_step",
    "list_checkpoints",
    "named_leaves",
    "read_meta",
    "redirect",
    "require_step",
    "restore_state",
    "tree_digest",
    "verify",
]
