"""Harnesses that are wrong on purpose, each of which one check must catch: prints {twin: [check, ...]} as JSON.

    python tests/chaos/twins.py WORK       WORK: a folder where `scripts/chaos.py --short --work WORK` has run

A process of its own, because the harness forks and must not have started JAX.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.chaos import SHORT_STEPS, prepare  # noqa: E402


def main(work: Path) -> None:
    networked = prepare()
    from tests.chaos import scenario
    from tests.chaos.faults import Fault, Plan
    from tests.chaos.hosts import Hosts
    from tests.chaos.setting import Setting

    class Forgetful(scenario.Scenario):
        """Loses a checkpoint that was complete when the run died."""

        def _start(self, strike):
            super()._start(strike)
            if (newest := self.owed[1]) is not None:
                shutil.rmtree(self.checkpoints / str(newest))

    class Careless(scenario.Scenario):
        """Throws damaged checkpoints away."""

        def _check_start(self):
            for kept in self.checkpoints.glob("*.damaged*"):
                shutil.rmtree(kept)
            super()._check_start()

    class Forger(scenario.Scenario):
        """Changes a line of the ledger."""

        def _compare(self, last):
            ledger = self.run_dir / "ledger.jsonl"
            lines = ledger.read_text().splitlines(keepends=True)
            lines[3] = lines[3].replace('"index": ', '"index": 1')
            ledger.write_text("".join(lines))
            super()._compare(last)

    def twin(kind: type[scenario.Scenario], fault: Fault, changes: tuple[str, ...] = ()) -> list[str]:
        folder = work / f"twin{len(found)}"
        folder.mkdir()
        strikes = kind(Plan(0, 1, (fault,)), setting, hosts, folder, changes).run()
        return sorted({check for strike in strikes for check, _ in strike.problems})

    setting, hosts = Setting(work, SHORT_STEPS), Hosts(work, 9, 1, networked)
    kill, damage = Fault("kill all", "step", (0,), 14, 0.0), Fault("damage", "step", (0,), 14, 0.0, detail="truncate")
    found: dict[str, list[str]] = {}
    found["none"] = twin(scenario.Scenario, kill)
    found["other seed"] = twin(scenario.Scenario, kill, ("train.seed=1",))
    found["a checkpoint is lost"] = twin(Forgetful, kill)
    found["a damaged checkpoint is deleted"] = twin(Careless, damage)
    found["a line of the ledger is altered"] = twin(Forger, kill)
    scenario.EXIT_BOUND = 0.1
    missed = Fault("kill all", "step", (), 4, 0.0)  # reaches no process, so the run outlives it
    found["a process stays"] = twin(scenario.Scenario, missed)
    hosts.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
