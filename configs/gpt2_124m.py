"""The size of GPT-2 small: 12 layers of width 768, 123.6M parameters, on one GPU.

    maxlm data prepare TEXT... --out DATA --tokenizer tokenizer.json --seq-len 1024
    maxlm train configs/gpt2_124m.py --run-dir runs/gpt2_124m --set data.path=DATA
    maxlm bench configs/gpt2_124m.py                                     (needs no data)

It is GPT-2's shape (width, depth, heads, GELU MLP, tied head, context 1024) but not GPT-2: RMSNorm for LayerNorm,
rotary for learned positions (which are 0.8M of GPT-2's 124.4M parameters), no biases, no dropout. GPT-2's 50,257
tokens are padded to 50,304, a multiple of 128; any tokenizer of up to that many serves.

Hardware: one H100 80GB or H200; with --set train.global_batch_size=8, a GPU of 24 GB or less.
How long: 38,000 steps of 65,536 tokens are 2.5 billion tokens, twenty a parameter (arXiv:2203.15556). At the
523,180 tokens/s of a lean PyTorch loop of this job on one H100, 80 minutes.
Reaches: not measured yet.

Sources: Radford et al. 2019 for the shape; learning rate of GPT-3 small (arXiv:2005.14165, table 2.1).
"""

from maxlm.config import (
    ComputeConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_layers=12, hidden_dim=768, num_heads=12, num_kv_heads=12, head_dim=64, mlp_dim=3072,
            vocab_size=50_304, tie_embeddings=True, activation="gelu",
        ),
        train=TrainConfig(num_steps=38_000, global_batch_size=64, seq_len=1024),
        optimizer=OptimizerConfig(learning_rate=6e-4),
        schedule=ScheduleConfig(name="cosine", warmup_steps=700, final_fraction=0.1),
        compute=ComputeConfig(layer_unroll="all"),
    )
