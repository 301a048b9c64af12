"""The shape of Llama 3 8B: 32 layers of width 4096, 8,030,261,248 parameters, for a pod slice or several GPU hosts.

    maxlm data prepare TEXT... --out DATA --tokenizer tokenizer.json --seq-len 8192
    maxlm train configs/llama3_8b.py --run-dir SHARED/llama3_8b --set data.path=DATA

Hardware: float32 parameters and AdamW moments are 96 GB, split over `mesh.fsdp` and `mesh.tensor`; the batch must be a
multiple of mesh.data * mesh.fsdp.
For example (`maxlm compile`: GB a chip, and the MFU that the compiled schedule could reach at the chip's peaks)
    v5p:4x4x8, 128 chips        --set remat.policy=names                                                90 of 103, 81%
    v6e:16x16, 256 chips        as it is                                                                 12 of 34, 50%
    v5e:16x16 --slices 2        --set mesh.data=2                                                         8 of 17, 69%
    two v5p slices of 128       --set mesh.data=2
    8 H100 or H200              --set mesh.fsdp=8 --set train.global_batch_size=8
How long: 38,000 steps of 4.2M tokens are 160 billion tokens, twenty a parameter (arXiv:2203.15556). At the rates that
others publish for this job, MaxText's 7,207 tokens/s/chip on 256 v6e and torchtitan's 6,667 on 8 H100 (bfloat16,
sequence 8192), that is a day on 256 v6e and 35 days on 8 H100.
Reaches: not measured yet; none of these meshes has been run by us.

Sources: arXiv:2407.21783, table 3 for the shape and the peak learning rate, section 3.4.1 for AdamW with a cosine down
to 1% of it. The released weights saw 15T tokens.
"""

from maxlm.config import (
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    RematConfig,
    RopeConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_layers=32, hidden_dim=4096, num_heads=32, num_kv_heads=8, head_dim=128, mlp_dim=14_336,
            vocab_size=128_256, tie_embeddings=False, rope=RopeConfig(theta=500_000.0),
        ),
        train=TrainConfig(num_steps=38_000, global_batch_size=512, seq_len=8192),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        schedule=ScheduleConfig(name="cosine", warmup_steps=2000, final_fraction=0.01),
        remat=RematConfig(policy="full"),
        checkpoint=CheckpointConfig(every_steps=500, keep_last=2, keep_every=5000),
    )
