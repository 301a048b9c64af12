"""Restore that checks what it reads, and the walk from the newest checkpoint back to the newest good one."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from maxlm.checkpoint import agreement, integrity, layout, reading
from maxlm.checkpoint.layout import IntegrityError
from maxlm.checkpoint.local_tier import LocalTier
from maxlm.checkpoint.peers import LocalSteps

_NO_ARRAYS = (0, 0)  # of integrity.damage: names, sizes and metadata only


@dataclass
class Restored:
    """A checkpoint as it was saved: its step, the `meta` given to `Checkpointer.save`, and the state."""

    step: int
    meta: dict[str, Any]
    state: Any = field(repr=False)


def restore_state(directory: str | os.PathLike[str], step: int | None, like: Any) -> Any:
    """The state of `step` (None: the newest complete one), verified and placed as `like` says (reading.restore_like).

    Every process must call it; each checks its share of the files, and all get the same answer. Values are
    bit-identical to what was saved. Raises IntegrityError where the checkpoint is damaged (nothing is renamed),
    CheckpointError where names, shapes or dtypes differ or the files may not be read.
    """
    path = layout.step_path(directory, layout.require_step(directory, step))
    damage = _damage(path)
    if damage is None:
        state, damage = restore_verified(path, like)
    if damage is not None:
        raise _refused(path, damage)
    return state


def require_intact(path: Path) -> None:
    """Raises IntegrityError where the checkpoint at `path` is damaged. One process reads all of it."""
    damage = integrity.damage(path)
    if damage is not None:
        raise _refused(path, damage)


def verify(directory: str | os.PathLike[str]) -> list[tuple[int, str | None]]:
    """(step, what is damaged or None) for every step folder of `directory`, ascending; reads every byte of them."""
    return [(step, integrity.damage(layout.step_path(directory, step))) for step in layout.present_steps(directory)]


def restore_verified(path: Path, like: Any) -> tuple[Any, str | None]:
    """(the state at `path`, None), or (None, what is damaged), the same on every process.

    Checksums are compared while TensorStore reads, so that what one brings into the page cache the other finds there.
    """
    with ThreadPoolExecutor(1) as background:
        checked = background.submit(integrity.damage, path, (jax.process_index(), jax.process_count()))
        state, failure = None, None
        try:
            state = reading.restore_like(path, like)
        except IntegrityError as error:
            failure = error
        damage = _agreed(checked.result)
    if damage is not None:
        return None, damage
    unreadable = agreement.first_of(str(failure) if failure else None)
    if unreadable is not None:  # every byte is as it was written, and yet TensorStore refuses it
        raise IntegrityError(unreadable) from failure
    return state, None


def newest_good(
    directory: Path, target: Callable[[int, dict[str, Any]], Any], *, strict: bool, say: Callable[[str], None],
    local: LocalTier | None = None,
) -> Restored | None:
    """The newest good checkpoint in `directory` and the local tier; None where there has never been one.

    target: (step, its meta) -> what `restore_state` takes as `like`; it may refuse by raising. A damaged or
    half-written checkpoint is renamed STEP.damaged, which `say` reports in one line; with `strict`, and where no good
    one is left, IntegrityError is raised instead. Every process must call it, and all get the same step.
    """
    copies = LocalSteps(local) if local is not None else None
    if copies:
        _report(copies.notes, strict, say)
    durable = agreement.of_first(layout.present_steps(directory) if jax.process_index() == 0 else None)
    restored = None
    for step in sorted({*durable, *(copies.steps if copies else ())}, reverse=True):
        if copies and step in copies.steps:
            restored = copies.restore(step, target)
            _report(copies.notes, strict, say)
        if restored is None and step in durable:
            restored = _durable(directory, step, target, strict, say)
        if restored is not None:
            return Restored(step, *restored)
    _refuse_to_begin_again(directory, local)
    return None


def _durable(
    directory: Path, step: int, target: Callable[[int, dict[str, Any]], Any], strict: bool, say: Callable[[str], None]
) -> tuple[dict[str, Any], Any] | None:
    """(meta, state) of `step`; None where it is damaged, and set aside now."""
    path = layout.step_path(directory, step)
    state, damage = None, _damage(path)
    if damage is None:
        meta = layout.read_document(path)["meta"]
        state, damage = restore_verified(path, target(step, meta))
    if damage is None:
        return meta, state
    if strict:
        raise IntegrityError(
            f"{path} is damaged ({damage}): --strict refuses to go on without it; without --strict it is set aside "
            "and the run resumes from the checkpoint before it"
        )
    name = agreement.on_all(lambda: layout.set_aside(path).name if jax.process_index() == 0 else None)[0]
    say(f"checkpoint {step} is damaged ({damage}): set aside as {name}")
    return None


def _report(notes: list[str], strict: bool, say: Callable[[str], None]) -> None:
    """Says, once, what any process set aside of its local copies."""
    texts = [text for found in agreement.gather(notes) for text in found]
    notes.clear()
    if texts and strict:
        raise IntegrityError(f"{'; '.join(texts)}: --strict refuses to go on")
    for text in texts:
        say(text)


def _refuse_to_begin_again(directory: Path, local: LocalTier | None) -> None:
    """Raises IntegrityError where there were checkpoints and none of them is good any more."""
    aside = layout.set_aside_before(directory) if jax.process_index() == 0 else []
    aside += local.set_aside_before() if local is not None else []
    aside = [name for names in agreement.gather(aside) for name in names]
    if aside:
        raise IntegrityError(
            f"no good checkpoint is left in {directory} ({', '.join(aside[-3:])} set aside as damaged): put back a "
            "good copy, or choose another --run-dir to train from the beginning"
        )


def _damage(path: Path) -> str | None:
    return _agreed(lambda: integrity.damage(path, _NO_ARRAYS))


def _agreed(look: Callable[[], str | None]) -> str | None:
    return next((found for found in agreement.on_all(look) if found is not None), None)


def _refused(path: Path, damage: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is damaged ({damage}): choose another checkpoint (`maxlm checkpoint verify`), or let `maxlm train` "
        "set it aside"
    )
