"""The one writer of a run's checkpoints."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import jax

from maxlm.checkpoint import agreement, layout, leaves, verified
from maxlm.checkpoint.durable import Directory, opened, read_meta
from maxlm.checkpoint.layout import CheckpointError
from maxlm.checkpoint.local_tier import LocalTier


class Checkpointer:
    """Saves asynchronously, commits atomically, prunes by policy. Every process of a run makes one and calls it alike.

    Two tiers: `save` writes to `directory`, a folder or the URL of an object store, where all processes meet;
    `save_local` to each host's own `local_path`.

    A save copies the state to the host, returns, and writes in the background. When it is complete, checkpoints
    that are neither among the newest `keep_last` nor multiples of `keep_every` (0: none), nor the newest one that lies
    `keep_behind` steps behind, are deleted, never before.
    What goes wrong in the background is raised as CheckpointError by the next call, whichever it is.
    The constructor removes what killed saves left, so only the holder of the run's lock may make one;
    readers use `latest_step`, `read_meta`, `restore_state` and `tree_digest`.
    """

    def __init__(
        self, directory: Directory, *, keep_last: int, keep_every: int = 0, keep_behind: int = 0,
        local_path: str | os.PathLike[str] | None = None, local_keep_last: int = 2,
    ) -> None:
        if keep_last < 1 or keep_every < 0 or keep_behind < 0:
            raise ValueError(f"{keep_last=} must be at least 1, {keep_every=} and {keep_behind=} at least 0")
        self.durable = opened(directory)
        self._keep = keep_last, keep_every, keep_behind
        self._primary = jax.process_index() == 0
        self._background: threading.Thread | None = None
        self._error: CheckpointError | None = None
        start = agreement.of_first(f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:8]}")
        agreement.on_all(lambda: self.durable.prepare(start))
        self._steps: list[int] = self._complete_steps()
        self._local: LocalTier | None = None
        if local_path is not None:
            run = agreement.on_all(lambda: self.durable.run_name() if self._primary else None)[0]
            agreement.on_all(lambda: self._open_local(local_path, run, start, local_keep_last))

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None. Waits for a save in progress."""
        self.wait()
        return self.newest_known

    @property
    def newest_known(self) -> int | None:
        """The newest step known to be complete; asks nobody and waits for nothing."""
        return max(self._steps, default=None)

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> bool:
        """Copies `state` to the host and starts writing it; on return the caller may donate or overwrite it.

        state: any pytree of arrays (NNX modules, Optax states, scalars). meta: anything JSON can hold.
        Waits for the save before this one. False, and nothing is written, where `step` is saved already:
        a run is a function of its step, so the bytes would be the same. Raises CheckpointError.
        """
        self.wait()
        if step in self._steps:
            return False
        arrays, document = _to_write(state, meta)
        try:
            self.durable.begin(step, arrays, document)
        except Exception as error:
            raise self._failed(step, error) from error
        self._background = threading.Thread(target=self._finish, args=(step,), name="checkpoint")
        self._background.start()
        return True

    def save_local(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Like `save`, into the local tier: every process writes its own shards on its own host, waits for no other and
        for no durable save. Raises CheckpointError."""
        assert self._local is not None, "made without local_path"
        self._local.save(step, *_to_write(state, meta))

    def restore(self, step: int | None, like: Any) -> Any:
        """`restore_state` from this directory, after a save in progress."""
        self.wait()
        return verified.restore_state(str(self.durable), step, like)

    def restore_newest(
        self, target: Callable[[int, dict[str, Any]], Any], *, strict: bool = False, say: Callable[[str], None]
    ) -> verified.Restored | None:
        """`verified.newest_good` of this directory: None where nothing was ever saved; damaged checkpoints are set
        aside on the way."""
        self.wait()
        found = verified.newest_good(self.durable, target, strict=strict, say=say, local=self._local)
        self._steps = self._complete_steps()
        if found is not None and self._local is not None:
            self._local.discard_after(found.step)  # what not all hosts have would only be in the way
        return found

    def rewind(self, step: int, *, expected: bool) -> None:
        """Deletes every checkpoint after `step`, in both tiers, the newest first: the run is about to make those steps
        again, and differently. Every process must call it. Raises CheckpointError, with nothing deleted, where none
        would be left though one is `expected`."""
        self.wait()
        doomed = [later for later in self._steps if later > step]
        if expected and len(doomed) == len(self._steps):
            raise CheckpointError(f"{self.durable} has no checkpoint up to step {step} to go back to: raise "
                                  "checkpoint.keep_last, or lower resilience.spike.skip_batches")
        if self._local is not None:
            self._local.discard_after(step)
        if self._primary:
            for later in reversed(doomed):
                self._delete(later)
        self._steps = [kept for kept in self._steps if kept <= step]

    def restore_meta(self, step: int | None = None) -> dict[str, Any]:
        """The `meta` that was saved with `step` (None: the newest complete one)."""
        self.wait()
        return read_meta(str(self.durable), step)

    def wait(self) -> None:
        """Returns when nothing is being written. Raises CheckpointError where the last save failed."""
        if self._background is not None:
            self._background.join()
            self._background = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._local is not None:
            self._local.wait()

    def close(self) -> None:
        """Waits, then lets go of Orbax's threads; must be called before the interpreter exits."""
        try:
            self.wait()
        finally:
            self.durable.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except CheckpointError:
            if kind is None:  # what is already being raised says more
                raise

    def _finish(self, step: int) -> None:
        """In the background: waits until the step is complete and durable, and only then deletes what it replaces."""
        try:
            self.durable.finish()
        except BaseException as error:
            self._error = self._failed(step, error)
            return
        steps = [*self._steps, step]
        doomed = layout.steps_to_delete(steps, *self._keep)
        self._steps = sorted(set(steps) - set(doomed))
        if not self._primary:
            return
        try:
            for old in doomed:
                self._delete(old)
        except CheckpointError as error:
            self._error = error

    def _delete(self, step: int) -> None:
        try:
            self.durable.delete(step)
        except Exception as error:
            raise self.durable.explain(error, step, "deleting") from error

    def _failed(self, step: int, error: BaseException) -> CheckpointError:
        self.durable.discard()
        explained = self.durable.explain(error, step, "saving")
        explained.__cause__ = error
        return explained

    def _complete_steps(self) -> list[int]:
        """As process 0 sees them: network file systems may show others an older folder."""
        return agreement.on_all(lambda: self.durable.complete_steps() if self._primary else None)[0]

    def _open_local(self, folder: str | os.PathLike[str], run: str, start: str, keep_last: int) -> None:
        self._local = LocalTier(folder, run, start, keep_last=keep_last)


def _to_write(state: Any, meta: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of `state` by name, and the document that is saved with them."""
    arrays = leaves.plain_arrays(state)
    index = leaves.index_of(arrays)
    return arrays, {"format": layout.FORMAT, "arrays": index, "meta": json.loads(json.dumps(meta))}
