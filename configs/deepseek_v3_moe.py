"""The shape of DeepSeek-V3: 61 layers of width 7168, the first 3 dense, the others with 256 experts of 2048, of which a
token takes 8, and one for all tokens.

    maxlm data prepare TEXT... --out DATA --tokenizer tokenizer.json --seq-len 4096
    maxlm train configs/deepseek_v3_moe.py --run-dir SHARED/deepseek --set data.path=DATA \\
        --set mesh.expert=32 --set mesh.fsdp=16                                        (v5p:8x8x8, 512 chips)

Attention is grouped-query attention (128 heads, 16 of keys and values), which stands in for multi-head latent attention
until that is built, and there is no multi-token prediction. So there are 676B parameters, 42B of them active, where the
model itself has 671B and 37B.
Hardware: float32 parameters and AdamW moments are 8.1 TB.
For example (`maxlm compile`: GB a chip, and the MFU that the compiled schedule could reach at the chip's peaks)
    v5p:8x8x8, 512 chips        --set mesh.expert=32 --set mesh.fsdp=16                                 54 of 103, 46%
    v5p:8x8x16, 1,024 chips     --set mesh.expert=128 --set mesh.fsdp=8 --set train.grad_accumulation=5 51 of 103, 49%
    7x:8x8x8, 512 chips         --set mesh.data=4 --set mesh.expert=256 --set train.grad_accumulation=5 180 of 203, 30%
Passes over the experts' rows are what holds it back (docs/PODS.md).
How long: 14.8 trillion tokens, as published, are 235,000 steps of the largest batch.
Reaches: not measured; none of these meshes has been run by us.

Sources: arXiv:2412.19437, section 4.2 for the shape, the router (sigmoid, weights normalised and times 2.5, a token in
4 groups of 8), the selection bias's rate of 0.001, the sequence-wise balance loss of 0.0001, AdamW, and the schedule,
whose growth of the batch from 3072 to 15360 is left out. No token is dropped there; here a device has room for twice
its even share, and what is beyond is counted.
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
            num_layers=61, hidden_dim=7168, num_heads=128, num_kv_heads=16, head_dim=128, mlp_dim=18_432,
            vocab_size=129_280, tie_embeddings=False, norm_eps=1e-6, init_std=0.006,
            num_experts=256, experts_per_token=8, expert_dim=2048,
            moe=MoEConfig(scores="sigmoid", weight_scale=2.5, bias_rate=0.001, num_groups=8, groups_per_token=4,
                          balance_loss=0.0001, balance_over="sequence", shared_experts=1, dense_layers=3,
                          buffer_factor=2.0),
        ),
        train=TrainConfig(num_steps=235_000, global_batch_size=15_360, seq_len=4096, grad_accumulation=15),
        optimizer=OptimizerConfig(learning_rate=2.2e-4),
        schedule=ScheduleConfig(name="cosine", warmup_steps=2000, final_fraction=0.1),
        remat=RematConfig(policy="full"),
        checkpoint=CheckpointConfig(every_steps=250, keep_last=2, keep_every=5000),
    )
