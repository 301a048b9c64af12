"""Submits a training run to Google Kubernetes Engine as a JobSet, checked against its chips first.

    python3 scripts/submit_gke.py configs/llama3_70b.py --run-dir /runs/70b --topology v5p:4x4x8 --slices 2 \\
        --image REGISTRY/maxlm:1 --claim runs:/runs --queue research --set mesh.data=2 --set data.path=/runs/data/web

--dry-run prints the manifest. Kueue starts it when its chips are free. Restarts: docs/SUBMIT.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout that is not installed

from maxlm.submit import gke  # noqa: E402
from maxlm.submit.job import add_job_options, add_place_options, add_slices, job_of  # noqa: E402
from maxlm.submit.tool import call, script  # noqa: E402


def add_options(parser: argparse.ArgumentParser) -> None:
    add_job_options(parser)
    add_place_options(parser.add_argument)
    add_slices(parser)
    gke.add_options(parser.add_argument)


def submit(arguments: argparse.Namespace) -> None:
    manifest = gke.to_yaml(gke.jobset(job_of(arguments, *gke.PLATFORMS), gke.cluster(arguments)))
    if arguments.dry_run:
        print(manifest, end="")
        return
    print(call(["kubectl", "create", "-f", "-"], manifest).strip())


if __name__ == "__main__":
    sys.exit(script(__doc__, add_options, submit))
