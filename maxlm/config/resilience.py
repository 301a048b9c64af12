"""The section of the configuration that says how a run guards itself."""

from __future__ import annotations

from dataclasses import dataclass

from maxlm.schema import check_types, not_negative, positive


@dataclass(frozen=True)
class ResilienceConfig:
    """digest_every_steps: steps between digests of parameters and optimizer state in the ledger, which has one at every
    saved step besides. corruption_check_every_steps: steps between checks for silent corruption, in which every device
    repeats its neighbour's computation; each costs about one step and a half of time (0: never)."""

    digest_every_steps: int = 100
    corruption_check_every_steps: int = 0

    def __post_init__(self) -> None:
        check_types(self, "resilience")
        positive("resilience", digest_every_steps=self.digest_every_steps)
        not_negative("resilience", corruption_check_every_steps=self.corruption_check_every_steps)
