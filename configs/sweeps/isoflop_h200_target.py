"""The run that the forecast of isoflop_h200.py is about: four times its largest budget.

    maxlm train configs/sweeps/isoflop_h200_target.py --run-dir sweeps/h200/target \
        --set data.source=none --set data.path=sweeps/h200/data/installed-packages-...

Hardware: one H200. Reaches: what `maxlm forecast seal` said before it started, or not: docs/SCALING.md.
"""

from pathlib import Path

from maxlm.config import RunConfig
from maxlm.overrides import call_in_file


def config() -> RunConfig:
    return call_in_file(Path(__file__).with_name("isoflop_h200.py"), "target", "a RunConfig")
