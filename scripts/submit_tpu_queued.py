"""Asks for a Cloud TPU queued resource that trains a run, checked against its chips first.

    python3 scripts/submit_tpu_queued.py configs/llama3_70b.py --run-dir /runs/70b --topology v5p:4x4x8 \\
        --zone us-east5-a --spot --image REGISTRY/maxlm:1 --mount /runs --setup 'mount ADDRESS:/runs /runs' \\
        --set data.path=/runs/data/web

--dry-run prints the request and each host's start-up script, as shell. Restarts: docs/SUBMIT.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout that is not installed

from maxlm.submit import queued  # noqa: E402
from maxlm.submit.job import add_job_options, add_place_options, add_slices, job_of  # noqa: E402
from maxlm.submit.tool import call, script  # noqa: E402


def add_options(parser: argparse.ArgumentParser) -> None:
    add_job_options(parser)
    add_place_options(parser.add_argument)
    add_slices(parser)
    queued.add_options(parser)


def submit(arguments: argparse.Namespace) -> None:
    job, cluster = job_of(arguments, *queued.PLATFORMS), queued.cluster(arguments)
    startup = queued.startup_script(job, cluster)
    if arguments.dry_run:
        print(f"cat > startup.sh <<'END_OF_STARTUP'\n{startup}END_OF_STARTUP")
        print(shlex.join(queued.create(job, cluster, "startup.sh")))
    else:
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
            file.write(startup)
            file.flush()
            print(call(queued.create(job, cluster, file.name)).strip())
    for purpose, words in queued.follow_up(job, cluster).items():
        print(f"# {purpose}: {shlex.join(words)}")


if __name__ == "__main__":
    sys.exit(script(__doc__, add_options, submit))
