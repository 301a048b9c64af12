"""One scenario: a run meets its faults in turn, is started again as an orchestrator would, and is checked all along.

What is checked of each fault:
- exit: each process ended as the contract says (README.md): 0 where it was asked to stop, 2 on a full disk, else 75
  or a signal, which an orchestrator answers with a restart;
- hang: no process outlived the fault by more than the bound;
- lost: the next life goes on from the newest complete checkpoint that was left unharmed, harmed ones are kept, and a
  life asked to stop has saved the step it stopped at;
- digest: that checkpoint, and the finished run's, hold the undisturbed run's parameters, its rows are the same, and no
  step that was made again gave other bits;
- books: the ledger is whole and ends with the last step, and the clock accounts for the wall time to 1%.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from maxlm.checkpoint import layout
from maxlm.resilience.goodput import read_goodput
from maxlm.resilience.ledger import read_ledger
from maxlm.training.saved_run import CHECKPOINTS
from tests.chaos.faults import Fault, Plan
from tests.chaos.hosts import Hosts, small_disk
from tests.chaos.inflict import damage, inflict, repair
from tests.chaos.processes import POLL, Life, fork, run_maxlm, wait
from tests.chaos.setting import PHASE_SECONDS, Setting, digests_of
from tests.chaos.watch import Watch
from tests.training.runs import rows_of, timeless

SAVED, MISTAKE, RESTART = 0, 2, 75  # exit codes; 75 is EX_TEMPFAIL
DISK = 64 << 20
EXIT_BOUND = PHASE_SECONDS + 20.0  # seconds from a fault to the last exit: the watchdog's, and room for a busy machine
START_BOUND = 120.0  # seconds from a start to the first step, and between two steps, on a busy machine
EXTRA_STARTS = 3  # that a fault may need beyond the one that follows it
PASSING = ("pause", "blip")


@dataclass
class Strike:
    """What came of one fault. problems: (which check, what was found); empty where all is well."""

    fault: Fault
    landed: bool = False
    codes: list[int] = field(default_factory=list)  # of the life it struck; empty where that went on
    detail: str = ""
    restarts: int = 0
    exit_seconds: float = 0.0  # from the fault to the last exit
    seconds: float = 0.0  # of the whole: reaching the moment, the fault, its end
    cpu_seconds: float = 0.0  # of the lives that it ended or that ended in its time
    problems: list[tuple[str, str]] = field(default_factory=list)


class Stuck(RuntimeError):
    """The run cannot be brought to its end; the message says why."""


class Scenario:
    """folder: of this scenario alone. changes: `--set` of the disturbed run, for a twin that must be caught."""

    def __init__(self, plan: Plan, setting: Setting, hosts: Hosts, folder: Path,
                 changes: tuple[str, ...] = ()):
        self.plan, self.setting, self.hosts, self.folder = plan, setting, hosts, folder
        self.disk = folder / "disk"
        self.own_disk = small_disk(self.disk, DISK, hosts.networked)
        self.run_dir = self.disk / "run"
        self.checkpoints = self.run_dir / CHECKPOINTS
        self.words = setting.watched(self.run_dir, plan.processes, plan.eight_bit, *changes)
        self.strikes = [Strike(fault) for fault in plan.faults]
        self.harmed: set[int] = set()  # steps whose newest checkpoint we damaged
        self.samples: list[tuple[Strike, int]] = []
        self.lives = 0

    def run(self) -> list[Strike]:
        """Meets every fault, then trains to the end. Problems are in the strikes; nothing is raised."""
        strike = self.strikes[0]
        self._start(strike)
        try:
            for strike in self.strikes:
                clock = time.monotonic()
                self._meet(strike)
                strike.seconds += time.monotonic() - clock
            clock = time.monotonic()
            self._to_the_end(strike)
            self._compare(strike)
            strike.seconds += time.monotonic() - clock
        except Stuck as reason:
            strike.problems.append(("hang" if "waited" in str(reason) else "exit", str(reason)))
        finally:
            self.life.kill()
            repair(self.hosts, self.disk)
        return self.strikes

    def _start(self, strike: Strike) -> None:
        """The next life. `strike` is charged with what is found wrong as it starts."""
        self.life = Life(self.words, self.plan.processes, self.hosts, self.folder, self.lives)
        self.watch = Watch(self.run_dir, self.life)
        self.lives += 1
        self.owed = (strike, self._newest())  # who is charged if the life does not go on from there

    def _meet(self, strike: Strike) -> None:
        while not self._reached(strike.fault):
            if self.watch.done():
                return  # the run was over before the fault could strike
            self._start_again(strike)
        self._check_start()
        time.sleep(strike.fault.delay)
        strike.landed = bool(self.life.running())
        clock = time.monotonic()
        strike.detail = inflict(strike.fault, self.life, self.hosts, self.disk, self.own_disk)
        if strike.fault.kind in PASSING and self._goes_on():
            return
        self._await_exits(strike)
        strike.exit_seconds = time.monotonic() - clock
        self.life.kill()
        strike.cpu_seconds += self.life.cpu_seconds
        strike.codes = [self.life.codes[index] for index in range(self.plan.processes)]
        self._check_start()
        self._check_exits(strike)
        repair(self.hosts, self.disk)
        self._harm(strike)
        self._sample(strike)
        strike.restarts += 1
        self._start(strike)

    def _reached(self, fault: Fault) -> bool:
        """Waits for the fault's moment; False where the life ended before."""
        deadline = time.monotonic() + START_BOUND
        while self.life.running():
            if fault.moment == "restore" and self.watch.restoring():
                return True
            if fault.moment != "restore" and self.watch.step() >= fault.step:
                if self.watch.saving() if fault.moment == "save" else self._may_strike(fault):
                    return True
                time.sleep(POLL / 5)
                continue
            if time.monotonic() > deadline:
                raise Stuck(f"waited {START_BOUND:.0f} s for step {fault.step}: {self._last_words()}")
            time.sleep(POLL)
        return False

    def _may_strike(self, fault: Fault) -> bool:
        """Damage waits for a second checkpoint: a run whose only one is damaged stops for good, and says so."""
        return fault.kind != "damage" or len(self._unharmed()) > 1

    def _goes_on(self) -> bool:
        """Whether the life makes a step more, or finishes, after a fault that passed; False where it exits instead."""
        before, deadline = self.watch.step(), time.monotonic() + EXIT_BOUND
        while self.life.running() and time.monotonic() < deadline:
            if self.watch.step() > before:
                return True
            time.sleep(POLL)
        return not self.life.running() and self.watch.done()

    def _await_exits(self, strike: Strike) -> None:
        fault = strike.fault
        stopped = fault.targets if fault.kind == "hang" else ()  # they cannot exit; an orchestrator kills them
        others = [index for index in range(self.plan.processes) if index not in stopped]
        if not self.life.wait(EXIT_BOUND, others):
            left = sorted(set(others) & set(self.life.running()))
            strike.problems.append(("hang", f"processes {left} still there after {EXIT_BOUND:.0f} s"))

    def _check_exits(self, strike: Strike) -> None:
        fault = strike.fault
        for index, code in enumerate(strike.codes):
            killed = code < 0 or code == RESTART
            if fault.kind in ("kill one", "kill all", "damage", "hang") and index in fault.targets:
                right = code < 0 or self.watch.done()
            elif fault.kind in ("SIGTERM one", "SIGTERM all"):
                right = code == SAVED
            elif fault.kind == "disk full":
                right = killed or (code == MISTAKE and "space" in self.life.log(index)) or not self.own_disk
            else:
                right = killed or self.watch.done()
            if not right:
                strike.problems.append(("exit", f"process {index} exited {code}: {self._last_words(index)}"))

        if fault.kind.startswith("SIGTERM") and not self.watch.done():
            stopped, newest = rows_of(self.run_dir)[-1], self._newest()
            if not stopped.get("preempted") or stopped["step"] != newest:
                strike.problems.append(("lost", f"asked to stop: newest checkpoint {newest}, last row {stopped}"))

    def _check_start(self) -> None:
        """Once a life: that it went on from the newest complete checkpoint, and kept the harmed one it passed over."""
        strike, expected = self.owed
        found = self.watch.resumed_from()
        if found is None:
            return
        self.owed = (strike, None)
        if expected is not None and found < expected:
            strike.problems.append(("lost", f"resumed from step {found}; {expected} was complete and unharmed"))
        for step in {step for step in self.harmed if step > found}:
            self.harmed.remove(step)  # it is made again
            if not any(self.checkpoints.glob(f"{step}{layout.DAMAGED_SUFFIX}*")):
                strike.problems.append(("lost", f"the damaged checkpoint {step} was not kept"))

    def _newest(self) -> int | None:
        """The newest step that is complete and unharmed."""
        return max(self._unharmed(), default=None)

    def _unharmed(self) -> set[int]:
        return set(layout.complete_steps(self.checkpoints)) - self.harmed

    def _harm(self, strike: Strike) -> None:
        if strike.fault.kind == "damage" and (newest := self._newest()) is not None:
            strike.detail = damage(layout.step_path(self.checkpoints, newest), strike.fault)
            self.harmed.add(newest)

    def _sample(self, strike: Strike) -> None:
        """Keeps the newest unharmed checkpoint for `_compare`: hard links, because the run may delete it."""
        if (newest := self._newest()) is not None:
            kept = self.disk / "samples" / str(self.lives)
            shutil.copytree(self.checkpoints / str(newest), kept / str(newest), copy_function=_link)
            self.samples.append((strike, newest))

    def _start_again(self, strike: Strike) -> None:
        """After a life that nothing struck and that ended all the same."""
        codes = sorted(set(self.life.codes.values()))
        strike.restarts += 1
        if not all(code < 0 or code == RESTART for code in codes) or strike.restarts > 1 + EXTRA_STARTS:
            raise Stuck(f"unprovoked, after {strike.restarts} starts: exit codes {codes}: {self._last_words()}")
        self._start(strike)

    def _to_the_end(self, strike: Strike) -> None:
        while True:
            if not self.life.wait(START_BOUND):
                raise Stuck(f"waited {START_BOUND:.0f} s for the end: {self._last_words()}")
            self._check_start()
            strike.cpu_seconds += self.life.cpu_seconds
            if self.watch.done() and set(self.life.codes.values()) == {SAVED}:
                return
            self._start_again(strike)

    def _compare(self, last: Strike) -> None:
        reference = self.setting.reference(self.plan.processes, self.plan.eight_bit)
        for place, ((strike, step), digest) in enumerate(zip(self.samples, self._sampled_digests(), strict=True)):
            if digest != reference["digests"][step]:
                strike.problems.append(("digest", f"step {step} (sample {place}): {digest[:12] or 'unreadable'}"))
        log = self.folder / "digest.log"
        code = wait(fork(lambda: run_maxlm(["checkpoint", "digest", str(self.run_dir)]), log))
        final, expected = log.read_text().split()[-1:], reference["digests"][self.setting.steps]
        if code or final != [expected]:
            last.problems.append(("digest", f"final parameters: {final}, undisturbed {expected}"))
        if timeless(self.run_dir) != reference["rows"]:
            last.problems.append(("digest", "metrics.jsonl has other rows than the undisturbed run's"))
        self._check_books(last)

    def _check_books(self, last: Strike) -> None:
        ledger, clock = read_ledger(self.run_dir), read_goodput(self.run_dir)
        again = [record["step"] for record in ledger.records if record["kind"] == "nondeterminism"]
        if again:
            last.problems.append(("digest", f"steps {again} were made again with other bits"))
        steps = [record["step"] for record in ledger.steps()]
        if ledger.damaged or steps[-1:] != [self.setting.steps] or set(steps) != set(range(1, self.setting.steps + 1)):
            last.problems.append(("books", f"ledger: lines {ledger.damaged} altered, {len(set(steps))} steps"))
        if clock is None or abs(clock["unaccounted_seconds"]) > 0.01 * clock["wall_seconds"]:
            last.problems.append(("books", f"goodput.json: {clock and clock['unaccounted_seconds']} s unaccounted for"))

    def _sampled_digests(self) -> list[str]:
        folders = sorted((self.disk / "samples").glob("*"), key=lambda path: int(path.name))
        return digests_of([(kept, step) for kept, (_, step) in zip(folders, self.samples, strict=True)], self.folder)

    def _last_words(self, index: int = 0) -> str:
        return " / ".join(self.life.log(index).strip().splitlines()[-2:])[-400:]


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)
