"""Parameters and floating-point operations of a decoder, counted from its config. No arrays, standard library only.

The convention of `training_flops_per_token`, on which every MFU that maxlm reports rests:

- A product of [m, k] by [k, n] is 2mkn FLOPs. Only matrix products count: no norms, softmax or rotary work.
- The backward pass is twice the forward pass. Rematerialisation adds nothing: it is not useful work.
- The output head counts, tied or not. The embedding look-up does not: it is a gather.
- Of a mixture of experts the router, the shared experts and the `experts_per_token` experts of a token count.
- Attention counts the query-key pairs that a causal mask shows, (T + 1) / 2 keys a query on average, fewer under a
  sliding window. A packed row counts as one document, so MFU does not depend on the data.

`training_flops_per_token_full_attention` is the other convention in use, 6N + 12*L*H*K*T (PaLM, arXiv:2204.02311,
appendix B), which counts the whole T x T square in every layer: for comparison with figures published that way.
"""

from __future__ import annotations

from dataclasses import dataclass

from maxlm.config import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by kind, over all layers. `head` is 0 where the head is the embedding."""

    embedding: int
    attention: int
    mlp: int  # dense layers and shared experts
    norms: int  # RMSNorm gains, QK-norm's included
    head: int
    router: int = 0
    experts: int = 0  # all routed experts, their biases included
    active_experts: int = 0  # those of one token
    biases: int = 0  # of the routers: they select, nothing multiplies them

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.non_embedding

    @property
    def active(self) -> int:
        """Those that one token meets: all but the experts it does not take."""
        return self.total - self.experts + self.active_experts

    @property
    def non_embedding(self) -> int:
        """All but the vocabulary's two tables: the N of Kaplan et al. 2020 (arXiv:2001.08361), section 2.1."""
        return self.attention + self.mlp + self.norms + self.router + self.experts + self.biases

    @property
    def matmul(self) -> int:
        """Those that multiply a token: its layers' matrices and the output head, tied or not."""
        return self.attention + self.mlp + self.router + self.active_experts + (self.head or self.embedding)


def parameter_count(model: ModelConfig) -> ParameterCount:
    """Exact parameter counts of `maxlm.model.Transformer` for this config. Only experts can have biases."""
    width, head = model.hidden_dim, model.head_dim
    query_and_output = 2 * width * model.num_heads * head
    key_and_value = 2 * width * model.num_kv_heads * head
    mlp_matrices = 2 if model.activation == "gelu" else 3
    sublayer_norms = 4 if model.norm_placement == "both" else 2
    norms_per_layer = sublayer_norms * width + (2 * head if model.qk_norm else 0)
    table = model.vocab_size * width
    moe, sparse = model.moe, model.num_layers - model.moe.dense_layers if model.num_experts else 0
    expert = 3 * width * model.expert_dim + (2 * model.expert_dim + width if moe.expert_bias else 0)
    shared = 3 * width * model.expert_dim * moe.shared_experts
    return ParameterCount(
        embedding=table,
        attention=model.num_layers * (query_and_output + key_and_value),
        mlp=(model.num_layers - sparse) * mlp_matrices * width * model.mlp_dim + sparse * shared,
        norms=model.num_layers * norms_per_layer + width,
        head=0 if model.tie_embeddings else table,
        router=sparse * width * model.num_experts,
        experts=sparse * model.num_experts * expert,
        active_experts=sparse * model.experts_per_token * expert,
        biases=sparse * model.num_experts if moe.bias_rate else 0,
    )


def forward_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """FLOPs of a forward pass over a row of `seq_len` tokens, per token."""
    repeats = model.num_layers // len(model.layer_pattern)
    windows = [model.sliding_window if kind == "local" else seq_len for kind in model.layer_pattern]
    keys_seen = repeats * sum(mean_visible_keys(seq_len, window) for window in windows)
    return 2.0 * parameter_count(model).matmul + 4.0 * model.num_heads * model.head_dim * keys_seen


def training_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """FLOPs of a forward and a backward pass over a row of `seq_len` tokens, per token."""
    return 3.0 * forward_flops_per_token(model, seq_len)


def training_flops_per_token_full_attention(model: ModelConfig, seq_len: int) -> float:
    """6N + 12*L*H*K*T: as `training_flops_per_token` but with the whole square of attention in every layer."""
    square = model.num_layers * model.num_heads * model.head_dim * seq_len
    return 6.0 * parameter_count(model).matmul + 12.0 * square


def mean_visible_keys(seq_len: int, window: int) -> float:
    """Keys that a causal query sees on average in a row of `seq_len`, itself included, `window` at the most."""
    window = min(window, seq_len)
    growing, full = window * (window + 1) / 2, (seq_len - window) * window
    return (growing + full) / seq_len
