"""Submits a training run as a SkyPilot managed job, checked against its devices first.

    python3 scripts/submit_skypilot.py configs/llama3_8b.py --run-dir /runs/8b --topology h100:4x8 --spot \\
        --setup 'pip install "maxlm[cuda] @ git+URL"' --bucket /runs=gs://my-runs --set data.path=/runs/data/web

--dry-run prints the task. Restarts: docs/SUBMIT.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout that is not installed

from maxlm.submit import skypilot  # noqa: E402
from maxlm.submit.gke import to_yaml  # noqa: E402
from maxlm.submit.job import add_job_options, add_place_options, add_slices, job_of  # noqa: E402
from maxlm.submit.tool import call, script  # noqa: E402


def add_options(parser: argparse.ArgumentParser) -> None:
    add_job_options(parser)
    add_place_options(parser.add_argument)
    add_slices(parser)
    skypilot.add_options(parser)


def submit(arguments: argparse.Namespace) -> None:
    job = job_of(arguments, *skypilot.PLATFORMS)
    task = to_yaml(skypilot.task(job, skypilot.cluster(arguments)))
    if arguments.dry_run:
        print(task, end="")
        return
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(task)
        file.flush()
        print(call(["sky", "jobs", "launch", "--yes", "--detach-run", file.name]).strip())


if __name__ == "__main__":
    sys.exit(script(__doc__, add_options, submit))
