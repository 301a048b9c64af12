"""The shape of Mixtral 8x7B: 32 layers of width 4096, 8 experts of 14336 of which a token takes 2; 46.7B parameters,
12.9B of them active.

    maxlm plan configs/mixtral_8x7b.py --topology v5p:4x4x8
    maxlm data prepare TEXT... --out DATA --tokenizer tokenizer.json --seq-len 8192
    maxlm train configs/mixtral_8x7b.py --run-dir SHARED/mixtral --set data.path=DATA

Hardware: float32 parameters and AdamW moments are 560 GB: 8 H200 or more, or from 32 v5p on. `mesh.fsdp` alone, which
takes all devices by default, gathers a layer's eight experts and lets no token travel; `mesh.expert` (2, 4, 8) sends
tokens instead, and needs room for an uneven load (`moe.buffer_factor`).
For example (`maxlm compile`: GB a chip, and the MFU that the compiled schedule could reach at the chip's peaks)
    v5p:4x4x8, 128 chips        as it is                                                                59 of 103, 67%
    v6e:16x16, 256 chips        as it is                                                                 30 of 34, 45%
    7x:4x4x4, 64 chips          --set mesh.fsdp=64 --set mesh.tensor=2                                 115 of 203, 53%
How long: twenty tokens an active parameter (arXiv:2203.15556) are 258 billion, 31,000 steps.
Reaches: not measured yet; none of these meshes has been run by us.

Sources: arXiv:2401.04088, table 1 for the shape, section 2.1 for the router: softmax over the chosen two. How it was
trained is not published: the balance loss is the default of the released code (0.02), the rest is Llama 2 70B's
(arXiv:2307.09288, section 2.2).
"""

from maxlm.config import (
    CheckpointConfig,
    ModelConfig,
    MoEConfig,
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
            vocab_size=32_000, tie_embeddings=False, rope=RopeConfig(theta=1_000_000.0),
            num_experts=8, experts_per_token=2, expert_dim=14_336, moe=MoEConfig(balance_loss=0.02),
        ),
        train=TrainConfig(num_steps=31_000, global_batch_size=1024, seq_len=8192),
        optimizer=OptimizerConfig(learning_rate=1.5e-4, eps=1e-5),
        schedule=ScheduleConfig(name="cosine", warmup_steps=2000, final_fraction=0.1),
        remat=RematConfig(policy="full"),
        checkpoint=CheckpointConfig(every_steps=250, keep_last=2, keep_every=5000),
    )
