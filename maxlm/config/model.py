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
class MoEConfig:
    """How tokens find their experts, where `model.num_experts` is not 0. The router is float32 in every recipe.

    scores, normalize_weights, weight_scale: softmax or sigmoid of the router's logits; the chosen experts' scores,
    divided by their sum or not, times a constant, weigh their outputs.
    bias_rate: a bias that only selects moves by this much after each step, towards equal load (DeepSeek-V3,
    arXiv:2412.19437, section 2.1.2); 0: no bias.
    num_groups, groups_per_token: a token chooses among the experts of its best groups (same, section 2.1.2).
    balance_loss: coefficient of E * sum(load * score) (Switch, arXiv:2101.03961, equation 4), a mean over layers, taken
    over each sequence or over the (micro)batch of all devices. router_z_loss: of logsumexp^2 (ST-MoE, arXiv:2202.08906,
    equation 5). jitter: the router's input times a uniform draw from 1 +- jitter (Switch, section 2.2).
    shared_experts: every token also takes an MLP of this many expert_dims. dense_layers: the first layers keep a dense
    MLP. expert_bias: the experts' products have biases (gpt-oss).
    capacity_factor: 0 drops no token; above 0 each expert takes this multiple of an even share and drops the rest.
    buffer_factor: rows that a device has room for when experts are on several, as a multiple of an even share, what is
    beyond being dropped and counted (`dropped_tokens` in metrics.jsonl); 0: room for whatever may come.
    """

    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalize_weights: bool = True
    weight_scale: float = 1.0
    bias_rate: float = 0.0
    num_groups: int = 1
    groups_per_token: int = 1
    balance_loss: float = 0.0
    balance_over: Literal["sequence", "batch"] = "batch"
    router_z_loss: float = 0.0
    jitter: float = 0.0
    shared_experts: int = 0
    dense_layers: int = 0
    expert_bias: bool = False
    capacity_factor: float = 0.0
    buffer_factor: float = 0.0

    def __post_init__(self) -> None:
        check_types(self, "model.moe")
        positive("model.moe", num_groups=self.num_groups, groups_per_token=self.groups_per_token,
                 weight_scale=self.weight_scale)
        not_negative("model.moe", **{name: getattr(self, name) for name in (
            "bias_rate", "balance_loss", "router_z_loss", "jitter", "shared_experts", "dense_layers",
            "capacity_factor", "buffer_factor")})
        require(self.jitter < 1, f"model.moe.jitter={self.jitter} must be below 1")
        require(self.groups_per_token <= self.num_groups, f"model.moe.groups_per_token={self.groups_per_token} is more "
                f"than model.moe.num_groups={self.num_groups}")


@dataclass(frozen=True)
class ParametrizationConfig:
    """How initial values and learning rates change with the model's size, so that the best learning rate of a small
    model is that of a large one: 'mup' across widths, 'completep' across widths and depths (model/parametrization.py
    has the table and the sources). At `base_width` and `base_depth` all three are the same model."""

    name: Literal["standard", "mup", "completep"] = "standard"
    base_width: int = 256
    base_depth: int = 4  # completep only

    def __post_init__(self) -> None:
        check_types(self, "model.parametrization")
        positive("model.parametrization", base_width=self.base_width, base_depth=self.base_depth)


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
    parametrization: ParametrizationConfig = field(default_factory=ParametrizationConfig)
    num_experts: int = 0  # 0: every MLP is dense
    experts_per_token: int = 0
    expert_dim: int = 0  # hidden units of one expert
    moe: MoEConfig = field(default_factory=MoEConfig)

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
        self._check_experts()

    def _check_experts(self) -> None:
        moe, experts = self.moe, self.num_experts
        require(not experts or self.parametrization.name == "standard",
                f"model.parametrization.name={self.parametrization.name!r} has no rule for routers: set it to "
                "'standard' or model.num_experts to 0")
        if not experts:
            for name in ("experts_per_token", "expert_dim"):
                require(getattr(self, name) == 0, f"model.{name}={getattr(self, name)} needs model.num_experts above 0")
            require(moe == MoEConfig(), "model.moe is set but model.num_experts is 0: set both or neither")
            return
        positive("model", num_experts=experts, experts_per_token=self.experts_per_token, expert_dim=self.expert_dim)
        require(experts % moe.num_groups == 0,
                f"model.num_experts={experts} is not a multiple of model.moe.num_groups={moe.num_groups}")
        reach = experts // moe.num_groups * moe.groups_per_token
        require(self.experts_per_token <= reach, f"model.experts_per_token={self.experts_per_token} is more than the "
                f"{reach} experts that a token can choose among")
        require(moe.dense_layers < self.num_layers and moe.dense_layers % len(self.layer_pattern) == 0,
                f"model.moe.dense_layers={moe.dense_layers} must be below model.num_layers={self.num_layers} and a "
                f"multiple of the {len(self.layer_pattern)} layers of model.layer_pattern")
        require(self.activation != "gelu", "model.activation='gelu' has no experts: use 'swiglu' or 'geglu'")
        require(not (moe.capacity_factor and moe.buffer_factor),
                "model.moe.capacity_factor bounds the rows already: set model.moe.buffer_factor=0")
