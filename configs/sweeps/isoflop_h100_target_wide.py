"""A run that a forecast from isoflop_h100.py is about: four times its largest budget, twice the best size.

    maxlm train configs/sweeps/isoflop_h100_target_wide.py --run-dir OUT/target_wide

Hardware: one H100. Reaches: what `maxlm forecast seal` said before it started, or not: docs/SCALING.md.
"""

from pathlib import Path

from maxlm.config import RunConfig
from maxlm.overrides import call_in_file


def config() -> RunConfig:
    return call_in_file(Path(__file__).with_name("isoflop_h100.py"), "targets", "RunConfigs")[1]
