"""The shape of Qwen3-30B-A3B: 48 layers of width 2048, 128 experts of 768 of which a token takes 8; 30.5B parameters,
3.3B of them active.

    maxlm data prepare TEXT... --out DATA --tokenizer tokenizer.json --seq-len 4096
    maxlm train configs/qwen3_30b_a3b.py --run-dir SHARED/qwen3 --set data.path=DATA --set mesh.expert=8

Hardware: float32 parameters and AdamW moments are 366 GB: 8 H200 or more, or from 32 v5p on, with `mesh.expert=8` and
`mesh.fsdp` taking the devices left.
For example (`maxlm compile`: GB a chip, and the MFU that the compiled schedule could reach at the chip's peaks)
    v5p:4x4x8, 128 chips        as it is                                                                74 of 103, 46%
    v6e:8x16, 128 chips         --set remat.policy=full                                                  23 of 34, 21%
    7x:4x4x4, 64 chips          --set mesh.fsdp=64 --set mesh.tensor=2                                 156 of 203, 27%
Passes over the experts' rows are most of it on v6e and 7x.
How long: twenty tokens an active parameter (arXiv:2203.15556) are 66 billion, 16,000 steps. The paper's is 36 trillion.
Reaches: not measured yet; none of these meshes has been run by us.

Sources: the shape and the balance coefficient are those of the config.json published with the weights;
arXiv:2505.09388, section 2, for QK-norm, no shared experts and a balance loss over the global batch. Learning rate and
batch are not published: OLMoE's (arXiv:2409.02060).
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
            num_layers=48, hidden_dim=2048, num_heads=32, num_kv_heads=4, head_dim=128, mlp_dim=6144,
            vocab_size=151_936, tie_embeddings=False, qk_norm=True, norm_eps=1e-6,
            rope=RopeConfig(theta=1_000_000.0), num_experts=128, experts_per_token=8, expert_dim=768,
            moe=MoEConfig(balance_loss=0.001),
        ),
        train=TrainConfig(num_steps=16_000, global_batch_size=1024, seq_len=4096),
        optimizer=OptimizerConfig(learning_rate=4e-4),
        schedule=ScheduleConfig(name="cosine", warmup_steps=2000, final_fraction=0.1),
        remat=RematConfig(policy="names"),
        checkpoint=CheckpointConfig(every_steps=250, keep_last=2),
    )
