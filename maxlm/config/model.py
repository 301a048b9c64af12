"""The model's section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from maxlm.schema import check_types, not_negative, positive, require


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its long-context scalings.

    linear: positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595).
    llama3: low frequencies divided by `factor`, a ramp between the two frequency factors (Llama 3.1).
    yarn: NTK-by-parts with attention temperature (Peng et al. 2023, arXiv:2309.00071).
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_max_len: int = 8192
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn

    def __post_init__(self) -> None:
        check_types(self, "model.rope")
        positive("model.rope", factor=self.factor, original_max_len=self.original_max_len,
                  beta_fast=self.beta_fast, beta_slow=self.beta_slow)
        require(self.theta > 1, f"model.rope.theta={self.theta} must be greater than 1")
        require(
            self.low_freq_factor < self.high_freq_factor,
            f"model.rope.low_freq_factor={self.low_freq_factor} must be below high_freq_factor={self.high_freq_factor}",
        )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. `layer_pattern` repeats over the layers and is the unit of the layer loop."""

    num_layers: int = 12
    hidden_dim: int = 768
    num_heads: int = 12
    num_kv_heads: int = 12
    head_dim: int = 64
    mlp_dim: int = 3072
    vocab_size: int = 32_768
    tie_embeddings: bool = True
    activation: Literal["swiglu", "geglu", "gelu"] = "swiglu"  # gelu: no gate, two matrices
    norm_placement: Literal["pre", "post", "both"] = "pre"  # 'post' norms each sublayer's output (OLMo 2)
    norm_eps: float = 1e-5
    qk_norm: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)
    layer_pattern: tuple[Literal["global", "local"], ...] = ("global",)
    sliding_window: int = 4096  # tokens a 'local' layer sees, its own included
    attention_softcap: float = 0.0  # 0 means none (Gemma 2, arXiv:2408.00118)
    logit_softcap: float = 0.0
    init_std: float = 0.02
    num_experts: int = 0
    experts_per_token: int = 0
    expert_dim: int = 0

    def __post_init__(self) -> None:
        check_types(self, "model")
        for name in ("num_layers", "hidden_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "vocab_size",
                     "norm_eps", "sliding_window", "init_std"):
            positive("model", **{name: getattr(self, name)})
        not_negative("model", attention_softcap=self.attention_softcap, logit_softcap=self.logit_softcap)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} must be a multiple of model.num_kv_heads={self.num_kv_heads}",
        )
        require(self.head_dim % 2 == 0, f"model.head_dim={self.head_dim} must be even (rotary embedding pairs dims)")
        require(len(self.layer_pattern) > 0, "model.layer_pattern must name at least one layer kind")
        require(
            self.num_layers % len(self.layer_pattern) == 0,
            f"model.num_layers={self.num_layers} must be a multiple of the {len(self.layer_pattern)} layers of "
            "model.layer_pattern",
        )
        require(
            self.num_experts == 0 and self.experts_per_token == 0 and self.expert_dim == 0,
            "model.num_experts, experts_per_token and expert_dim must be 0: mixture of experts is not built yet",
        )
