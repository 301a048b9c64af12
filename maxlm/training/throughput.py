"""From seconds a step to tokens/s/chip and model FLOP utilisation."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from maxlm.config import RunConfig
from maxlm.flops import training_flops_per_token
from maxlm.hardware import chip_of

# What the chip's matrix units compute in, by recipe: XLA's default for float32 products on a GPU is TF32. TPUs have
# no published figure for it, so a float32 run there reports no MFU. The FP8 recipes, whose head and attention are in
# bfloat16, are measured against its peak: a step that is faster then shows a higher MFU.
ARITHMETIC = {"bf16": "bf16", "float32": "tf32", "fp8": "bf16", "fp8_rowwise": "bf16",
              "fp8_block": "bf16"}


class Throughput:
    """Rates of one run on one mesh. Every position of a batch counts as a token, padding included."""

    def __init__(self, config: RunConfig, mesh: Mesh):
        device: jax.Device = mesh.devices.flat[0]
        chip = chip_of(device.device_kind)
        self.chips = chip.chips(mesh.size) if chip else mesh.size
        self.peak_flops = chip.peak(ARITHMETIC[config.precision.recipe]) if chip else None
        self.flops_per_token = training_flops_per_token(config.model, config.train.seq_len)
        self.tokens_per_step = config.train.global_batch_size * config.train.seq_len

    def tokens_per_second_per_chip(self, step_seconds: float) -> float:
        return self.tokens_per_step / step_seconds / self.chips

    def mfu(self, step_seconds: float) -> float | None:
        """Model FLOP utilisation (PaLM, arXiv:2204.02311, appendix B; here with causal attention halved) against the
        chip's dense peak for the recipe; None for a chip that is not known."""
        if self.peak_flops is None:
            return None
        return self.tokens_per_second_per_chip(step_seconds) * self.flops_per_token / self.peak_flops
