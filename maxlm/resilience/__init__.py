"""What keeps a run safe: one process group a run directory (run_lock.py), stopping on request (preemption.py) or for
its own safety (stopped.py), a record of every step (ledger.py) and of where the time went (goodput.py), and what is
done about bad losses (anomaly.py), hangs (watchdog.py, collectives.py) and slow hosts (stragglers.py)."""

from maxlm.resilience.anomaly import AnomalyMonitor, Spike
from maxlm.resilience.goodput import Goodput, process_started, read_goodput
from maxlm.resilience.ledger import Ledger, lineage_of, read_ledger
from maxlm.resilience.preemption import StopRequest
from maxlm.resilience.run_lock import RunLock
from maxlm.resilience.stopped import RunStopped
from maxlm.resilience.stragglers import HostTimes
from maxlm.resilience.watchdog import Watchdog

__all__ = ["AnomalyMonitor", "Goodput", "HostTimes", "Ledger", "RunLock", "RunStopped", "Spike", "StopRequest",
           "Watchdog", "lineage_of", "process_started", "read_goodput", "read_ledger"]
