"""The shape of Llama 3 70B: 80 layers of width 8192, 70,553,706,496 parameters, for pods.

    maxlm plan configs/llama3_70b.py --topology v5p:4x8x8                                  (what to --set; no chip)
    maxlm data prepare TEXT... --out DATA --tokenizer tokenizer.json --seq-len 8192
    maxlm train configs/llama3_70b.py --run-dir SHARED/llama3_70b --set data.path=DATA

Hardware: float32 parameters and AdamW moments are 847 GB, split over `mesh.fsdp` and `mesh.tensor`. With full
rematerialisation each sequence of 8192 that a chip works on keeps 10.7 GB of layer inputs there, so how many those
are at once, batch / (mesh.data * mesh.fsdp * train.grad_accumulation), decides what fits.
For example (`maxlm compile`: GB a chip, and the MFU that the compiled schedule could reach at the chip's peaks)
    v5p:4x8x8, 256 chips        --set mesh.fsdp=128 --set mesh.tensor=2 --set train.grad_accumulation=8 \\
                                --set remat.policy=dots                                                 73 of 103, 75%
        the same with full rematerialisation, --set mesh.fsdp=256                                       67 of 103, 74%
    v6e:16x16, 256 chips        --set mesh.fsdp=256 --set train.grad_accumulation=4                      30 of 34, 51%
    7x:4x4x8, 128 chips         --set mesh.fsdp=128 --set mesh.tensor=2                                140 of 203, 60%
    four v5p slices of 256      --set mesh.data=4 --set mesh.fsdp=256
    64 H200                     --set mesh.fsdp=64 --set train.grad_accumulation=4
How long: 168,000 steps of 8.4M tokens are 1.4 trillion tokens, twenty a parameter (arXiv:2203.15556). At the
960 tokens/s/chip that MaxText publishes for 256 v6e (bfloat16, sequence 8192), that is 66 days there.
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
            num_layers=80, hidden_dim=8192, num_heads=64, num_kv_heads=8, head_dim=128, mlp_dim=28_672,
            vocab_size=128_256, tie_embeddings=False, rope=RopeConfig(theta=500_000.0),
        ),
        train=TrainConfig(num_steps=168_000, global_batch_size=1024, seq_len=8192),
        optimizer=OptimizerConfig(learning_rate=1.5e-4),
        schedule=ScheduleConfig(name="cosine", warmup_steps=2000, final_fraction=0.01),
        remat=RematConfig(policy="full"),
        checkpoint=CheckpointConfig(every_steps=250, keep_last=2, keep_every=5000),
    )
