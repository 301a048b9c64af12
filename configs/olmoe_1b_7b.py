"""The shape of OLMoE-1B-7B: 16 layers of width 2048, 64 experts of 1024 of which a token takes 8; 6.9B parameters, 1.3B
of them active.

    maxlm data prepare TEXT... --out DATA --tokenizer tokenizer.json --seq-len 4096
    maxlm train configs/olmoe_1b_7b.py --run-dir SHARED/olmoe --set data.path=DATA --set mesh.expert=8
    maxlm bench configs/olmoe_1b_7b.py --set model.num_layers=8 --set train.global_batch_size=8 \\
        --set compute.layer_unroll=all --set remat.policy=none                                   (one H100, no data)

Hardware: float32 parameters and AdamW moments are 83 GB: two H200 or more, or from 8 v5p on. `mesh.expert` splits the
experts (1, 2, 4, ... 64), `mesh.fsdp` takes the devices left.
For example (`maxlm compile`: GB a chip, and the MFU that the compiled schedule could reach at the chip's peaks)
    v6e:4x4, 16 chips           --set train.grad_accumulation=4 --set remat.policy=full                  31 of 34, 27%
    v5p:2x2x4, 16 chips         --set train.grad_accumulation=8 --set remat.policy=dots                 49 of 103, 53%
    v5e:8x8, 64 chips           --set train.grad_accumulation=4 --set remat.policy=full                  10 of 17, 37%
Passes over the experts' rows are most of it on v6e.
How long: the paper's 5.1 trillion tokens are 1.2 million steps; twenty tokens an active parameter are 6,300.
Reaches: not measured yet. docs/MOE.md has the speed of its layer on an H100.

Sources: arXiv:2409.02060, table 1 (router and losses), appendix B (shape, AdamW, schedule). It routes by softmax
without normalising the weights, keeps load even by a loss over the batch, and drops no token.
"""

from maxlm.config import (
    CheckpointConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RematConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_layers=16, hidden_dim=2048, num_heads=16, num_kv_heads=16, head_dim=128, mlp_dim=1024,
            vocab_size=50_304, tie_embeddings=False, qk_norm=True, num_experts=64, experts_per_token=8, expert_dim=1024,
            moe=MoEConfig(normalize_weights=False, balance_loss=0.01, router_z_loss=0.001),
        ),
        train=TrainConfig(num_steps=6_300, global_batch_size=1024, seq_len=4096),
        optimizer=OptimizerConfig(learning_rate=4e-4, eps=1e-8),
        schedule=ScheduleConfig(name="cosine", warmup_steps=2000, final_fraction=0.1),
        remat=RematConfig(policy="names"),
        checkpoint=CheckpointConfig(every_steps=250, keep_last=2),
    )
