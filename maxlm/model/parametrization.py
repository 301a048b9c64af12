"""How initial values, multipliers and learning rates depend on width and depth: one table for each parametrization.

With m = hidden_dim / base_width and l = num_layers / base_depth, relative to the base model, where all three agree:

                                 standard    mup           completep
    initial std of the layers' matrices   1    m^-1/2        m^-1/2
    GPT-2's 1 / sqrt(2 L) on what is added to the residual stream
                                          L    L             base_depth
    each sublayer's output                1    1             1 / l
    final hidden states, before the head  1    1 / m         1 / m
    learning rate of the layers' matrices 1    1 / m         1 / m
    their decoupled weight decay          1    m             m        (so that rate times decay does not change)
    AdamW's eps, layers                   1    1 / m         1 / (m l)
    AdamW's eps, embedding, head, final norm 1    1 / m      1 / m

mup: Yang et al. 2022 (arXiv:2203.03466), table 8, for Adam, with the output multiplier that lets the head be tied.
completep: Dey et al. 2025 (arXiv:2505.01618), table 1, alpha = 1. Embedding, head and norm gains keep their initial
values and rate. Attention keeps 1 / sqrt(head_dim), so widen by heads and not by head_dim, and mlp_dim with the width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from maxlm.config import ModelConfig


class Multipliers(NamedTuple):
    """What a model of one size multiplies by; the module's docstring has the table."""

    matrix_init: float = 1.0  # init_std is divided by it
    residual_init: float = 1.0  # likewise, for the matrices whose product is added to the residual stream
    sublayer: float = 1.0
    output: float = 1.0
    matrix_rate: float = 1.0
    layer_eps: float = 1.0
    table_eps: float = 1.0


def multipliers(model: ModelConfig) -> Multipliers:
    chosen = model.parametrization
    gpt2 = math.sqrt(2 * model.num_layers)  # Radford et al. 2019, section 2.3
    if chosen.name == "standard":
        return Multipliers(residual_init=gpt2)
    width = model.hidden_dim / chosen.base_width
    depth = model.num_layers / chosen.base_depth if chosen.name == "completep" else 1.0
    if chosen.name == "completep":
        gpt2 = math.sqrt(2 * chosen.base_depth)
    return Multipliers(
        matrix_init=math.sqrt(width), residual_init=gpt2 * math.sqrt(width), sublayer=1 / depth, output=1 / width,
        matrix_rate=1 / width, layer_eps=1 / (width * depth), table_eps=1 / width,
    )
