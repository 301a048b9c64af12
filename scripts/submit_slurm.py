"""Submits a training run to a Slurm cluster, checked against its devices first.

    python3 scripts/submit_slurm.py configs/llama3_8b.py --run-dir /shared/runs/8b --topology h100:4x8 \\
        --partition gpu --time 1-00:00 --setup 'source /shared/venv/bin/activate' --set data.path=/shared/data/web

--dry-run prints the batch script. A sweep is submitted as a job array by `maxlm sweep SWEEP --launcher slurm`.
Restarts: docs/SUBMIT.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout that is not installed

from maxlm.submit import slurm  # noqa: E402
from maxlm.submit.job import add_job_options, add_place_options, job_of  # noqa: E402
from maxlm.submit.tool import call, script  # noqa: E402


def add_options(parser: argparse.ArgumentParser) -> None:
    add_job_options(parser)
    add_place_options(parser.add_argument)
    slurm.add_options(parser.add_argument)


def submit(arguments: argparse.Namespace) -> None:
    job = job_of(arguments, *slurm.PLATFORMS)
    batch = slurm.single(job, slurm.cluster(arguments))
    if arguments.dry_run:
        print(batch)
        return
    Path(job.run_dir).parent.mkdir(parents=True, exist_ok=True)
    print(call(["sbatch"], batch).strip())


if __name__ == "__main__":
    sys.exit(script(__doc__, add_options, submit))
