"""Restore that checks what it reads, and the walk from the newest checkpoint back to the newest good one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax

from maxlm.checkpoint import agreement
from maxlm.checkpoint.durable import Directory, Durable, opened, require_step
from maxlm.checkpoint.layout import IntegrityError
from maxlm.checkpoint.local_tier import LocalTier
from maxlm.checkpoint.peers import LocalSteps


@dataclass
class Restored:
    """A checkpoint as it was saved: its step, the `meta` given to `Checkpointer.save`, and the state."""

    step: int
    meta: dict[str, Any]
    state: Any = field(repr=False)


def restore_state(directory: Directory, step: int | None, like: Any) -> Any:
    """The state of `step` (None: the newest complete one), verified and placed as `like` says (reading.restore_like).

    Every process must call it; each checks its share of the files, and all get the same answer. Values are
    bit-identical to what was saved. Raises IntegrityError where the checkpoint is damaged (nothing is renamed),
    CheckpointError where names, shapes or dtypes differ or the files may not be read.
    """
    durable, step = opened(directory), require_step(directory, step)
    damage = _metadata_damage(durable, step)
    if damage is None:
        state, damage = restore_verified(durable, step, like)
    if damage is not None:
        raise _refused(durable, step, damage)
    return state


@contextmanager
def intact(durable: Durable, step: int) -> Iterator[None]:
    """Around reads of the checkpoint of `step` by one process, which compare the checksums of what they read. Raises
    IntegrityError, with what to do, where it is damaged."""
    damage = durable.damage(step, metadata_only=True)
    try:
        if damage is None:
            yield
            return
    except IntegrityError as error:
        damage = str(error)
    raise _refused(durable, step, damage)


def verify(directory: Directory) -> list[tuple[int, str | None]]:
    """(step, what is damaged or None) for every checkpoint in `directory`, ascending; reads every byte of them."""
    durable = opened(directory)
    return [(step, durable.damage(step)) for step in durable.present_steps()]


def restore_verified(durable: Durable, step: int, like: Any) -> tuple[Any, str | None]:
    """(the state of `step`, None), or (None, what is damaged), the same on every process."""
    restored: list[Any] = []

    def look() -> tuple[str | None, str | None]:
        try:
            state, damage = durable.restore(step, like)
        except IntegrityError as error:  # every byte is as it was written, and yet TensorStore refuses it
            return None, str(error)
        restored.append(state)
        return damage, None

    looks = agreement.on_all(look)
    for damage, _ in looks:
        if damage is not None:
            return None, damage
    for _, unreadable in looks:
        if unreadable is not None:
            raise IntegrityError(unreadable)
    return restored[0], None


def newest_good(
    durable: Durable, target: Callable[[int, dict[str, Any]], Any], *, strict: bool, say: Callable[[str], None],
    local: LocalTier | None = None,
) -> Restored | None:
    """The newest good checkpoint in `durable` and the local tier; None where there has never been one.

    target: (step, its meta) -> what `restore_state` takes as `like`; it may refuse by raising. A damaged or
    half-written checkpoint is renamed STEP.damaged, which `say` reports in one line; with `strict`, and where no good
    one is left, IntegrityError is raised instead. Every process must call it, and all get the same step.
    """
    copies = LocalSteps(local) if local is not None else None
    if copies:
        _report(copies.notes, strict, say)
    saved = agreement.on_all(lambda: durable.present_steps() if jax.process_index() == 0 else None)[0]
    restored = None
    for step in sorted({*saved, *(copies.steps if copies else ())}, reverse=True):
        if copies and step in copies.steps:
            restored = copies.restore(step, target)
            _report(copies.notes, strict, say)
        if restored is None and step in saved:
            restored = _durable(durable, step, target, strict, say)
        if restored is not None:
            return Restored(step, *restored)
    _refuse_to_begin_again(durable, local)
    return None


def _durable(
    durable: Durable, step: int, target: Callable[[int, dict[str, Any]], Any], strict: bool, say: Callable[[str], None]
) -> tuple[dict[str, Any], Any] | None:
    """(meta, state) of `step`; None where it is damaged, and set aside now."""
    state, damage = None, _metadata_damage(durable, step)
    if damage is None:
        meta = durable.document(step)["meta"]
        state, damage = restore_verified(durable, step, target(step, meta))
    if damage is None:
        return meta, state
    if strict:
        raise IntegrityError(
            f"{durable.path(step)} is damaged ({damage}): --strict refuses to go on without it; without --strict it "
            "is set aside and the run resumes from the checkpoint before it"
        )
    name = agreement.on_all(lambda: durable.set_aside(step) if jax.process_index() == 0 else None)[0]
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


def _refuse_to_begin_again(durable: Durable, local: LocalTier | None) -> None:
    """Raises IntegrityError where there were checkpoints and none of them is good any more."""

    def look() -> list[str]:
        found = durable.set_aside_before() if jax.process_index() == 0 else []
        return found + (local.set_aside_before() if local is not None else [])

    aside = [name for names in agreement.on_all(look) for name in names]
    if aside:
        raise IntegrityError(
            f"no good checkpoint is left in {durable} ({', '.join(aside[-3:])} set aside as damaged): put back a "
            "good copy, or choose another --run-dir to train from the beginning"
        )


def _metadata_damage(durable: Durable, step: int) -> str | None:
    found = agreement.on_all(lambda: durable.damage(step, metadata_only=True))
    return next((damage for damage in found if damage is not None), None)


def _refused(durable: Durable, step: int, damage: str) -> IntegrityError:
    return IntegrityError(
        f"{durable.path(step)} is damaged ({damage}): choose another checkpoint (`maxlm checkpoint verify`), or let "
        "`maxlm train` set it aside"
    )
