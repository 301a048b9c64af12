"""What keeps a run safe: one process group a run directory (run_lock.py), stopping on request (preemption.py)."""

from maxlm.resilience.preemption import StopRequest
from maxlm.resilience.run_lock import RunLock

__all__ = ["RunLock", "StopRequest"]
