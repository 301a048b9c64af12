"""The shell around `maxlm train`: how it is started, and whether it is started again.

Exit code 0 alone does not say that a run is done: stopped by SIGTERM it saves and exits 0 too. RUN_DIR/DONE tells.

| `maxlm train` ends with | then |
|---|---|
| 0, and DONE is there | done |
| 0, and no DONE: asked to stop, and saved | started again, not counted |
| 2, a user's mistake; 3, stopped for safety | never started again |
| 75, a lost process or a hang; anything else, a crash | started again up to N times |
"""

from __future__ import annotations

import shlex

CONFIG_VARIABLE = "MAXLM_CONFIG"  # the job's environment has the config as JSON
NEVER_RETRIED = (2, 3)
RESTART = 75
LOOKS = "0 2 4"  # seconds before each look for DONE, which another host may have written
PAUSE_SECONDS = 10  # before the next start: processes of the last one may still be leaving


def train(run_dir: str) -> str:
    """Bash that becomes `maxlm train` of the job's config."""
    return (f'config=$(mktemp -d)/config.json && printf %s "${CONFIG_VARIABLE}" > "$config" && '
            f'exec maxlm train "$config" --run-dir {shlex.quote(run_dir)}')


def _done(run_dir: str) -> str:
    """Bash that succeeds if DONE is there; listing the folder makes a network file system look again, soon or late."""
    return f"for second in {LOOKS}; do sleep $second; ls {run_dir} | grep -qx DONE && break; done"


def supervised(start: str, run_dir: str, retries: int, stopped: str = "") -> str:
    """Bash that runs `start` until there is nothing left to start; it exits with what came of it.

    `run_dir` is shell text, `stopped` what to do about a run that was asked to stop and saved (default: go on here).
    """
    return f"""crashes=0
while true; do
  {start}
  code=$?
  if [ $code -eq 0 ]; then {_done(run_dir)} && exit 0; fi
  case $code in
    0) echo "stopped as asked and saved: starting again" >&2
       {stopped or f"sleep {PAUSE_SECONDS}"} ;;
    {'|'.join(map(str, NEVER_RETRIED))}) exit $code ;;
    *) crashes=$((crashes + 1))
       if [ $crashes -gt {retries} ]; then exit $code; fi
       echo "ended with exit code $code: starting again, $crashes of {retries}" >&2
       sleep {PAUSE_SECONDS} ;;
  esac
done
"""


def once(run_dir: str) -> str:
    """Bash for a container's first process, whose scheduler reads its exit code: one start.

    SIGTERM is passed on, and a run that stopped as asked exits 75, because 0 would mean that it is done.
    """
    return f"""({train(run_dir)}) &
child=$!
trap 'told=1; kill -TERM $child' TERM
while told=; wait $child; code=$?; [ "$told" ]; do :; done
if [ $code -eq 0 ]; then {_done(shlex.quote(run_dir))} || exit {RESTART}; fi
exit $code
"""
