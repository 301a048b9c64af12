"""The shape of Llama 3.2 1B: 16 layers of width 2048, 1,235,814,400 parameters. One GPU by default, any pod by --set.

    maxlm data prepare TEXT... --out DATA --tokenizer tokenizer.json --seq-len 4096
    maxlm train configs/llama3_2_1b.py --run-dir runs/llama3_2_1b --set data.path=DATA
    maxlm bench configs/llama3_2_1b.py                                   (needs no data)

Hardware: one H100 80GB or H200. The same model in a 130-line JAX program took 57 GB at this batch.
On a pod the batch grows with the chips, and layers are scanned to keep compilation short, --set compute.layer_unroll=1
(`maxlm compile`: GB a chip, and the MFU that the compiled schedule could reach at the chip's peaks):
    v5e:8x8, 64 chips           --set train.global_batch_size=512 --set remat.policy=full                 8 of 17, 58%
    v6e:4x4, 16 chips           --set train.global_batch_size=256 --set remat.policy=full \\
                                --set train.grad_accumulation=2                                          10 of 34, 38%
    v5p:2x2x4, 16 chips         --set train.global_batch_size=256 --set remat.policy=names              59 of 103, 67%
How long: 20,000 steps are 655 million tokens, enough to see that a set-up learns. Twenty tokens a parameter
(Hoffmann et al. 2022, arXiv:2203.15556) are 24.7 billion: 11,800 steps of 512 rows.
Reaches: not measured yet. Meta's own weights were pruned and distilled from larger models on up to 9T tokens, so their
scores are no aim for this recipe.

Sources: the shape is that of the config.json published with the weights; the learning rate is Llama 3 8B's
(arXiv:2407.21783, table 3).
"""

from maxlm.config import (
    ComputeConfig,
    ModelConfig,
    OptimizerConfig,
    RopeConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_layers=16, hidden_dim=2048, num_heads=32, num_kv_heads=8, head_dim=64, mlp_dim=8192,
            vocab_size=128_256, tie_embeddings=True,
            rope=RopeConfig(theta=500_000.0, scaling="llama3", factor=32.0, original_max_len=8192),
        ),
        train=TrainConfig(num_steps=20_000, global_batch_size=8, seq_len=4096),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        schedule=ScheduleConfig(name="cosine", warmup_steps=1000, final_fraction=0.1),
        compute=ComputeConfig(layer_unroll="all"),
    )
