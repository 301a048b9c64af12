"""The shape of Llama 3 405B: 126 layers of width 16384, 405,853,388,800 parameters, for the largest pods.

    maxlm plan configs/llama3_405b.py --topology v5p:8x8x16
    maxlm data prepare TEXT... --out DATA --tokenizer tokenizer.json --seq-len 8192
    maxlm train configs/llama3_405b.py --run-dir SHARED/llama3_405b --set data.path=DATA OVERRIDES

Hardware: float32 parameters and AdamW moments are 4.9 TB, and with full rematerialisation each sequence of 8192 that a
chip works on keeps 34 GB of layer inputs there.
For example (`maxlm compile`: GB a chip, and the MFU that the compiled schedule could reach at the chip's peaks)
    v5p:8x8x16, 1,024 chips     --set mesh.fsdp=512 --set mesh.tensor=2 --set train.grad_accumulation=2  61 of 103, 70%
        the same in one piece, without --set train.grad_accumulation=2                                  97 of 103, 72%
    v6e:16x16, 256 chips        --set mesh.fsdp=64 --set mesh.tensor=4 --set train.grad_accumulation=32 \\
                                --set remat.policy=full_offload --set compute.offload_optimizer=true     30 of 34, 40%
    7x:8x8x8, 512 chips         --set mesh.fsdp=512 --set mesh.tensor=2 --set train.grad_accumulation=2 127 of 203, 66%
On 256 v6e parameters and moments alone are 19 of 33 GB and a sequence's layer inputs 34, or 8.6 with tensor=4: moments
and layer inputs wait in the hosts' memory there, 21 GB a chip, and no estimate knows the link to it.
How long: the released weights saw 15.6T tokens, 930,000 steps of 16.8M.
Reaches: not measured; none of these meshes has been run by us.

Sources: arXiv:2407.21783, table 3 for the shape and the peak learning rate, section 3.4.1 for AdamW, the warm-up of
8,000 steps, the cosine down to 1% and the largest of its three batch sizes (16M tokens).
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
            num_layers=126, hidden_dim=16_384, num_heads=128, num_kv_heads=8, head_dim=128, mlp_dim=53_248,
            vocab_size=128_256, tie_embeddings=False, rope=RopeConfig(theta=500_000.0),
        ),
        train=TrainConfig(num_steps=930_000, global_batch_size=2048, seq_len=8192),
        optimizer=OptimizerConfig(learning_rate=8e-5),
        schedule=ScheduleConfig(name="cosine", warmup_steps=8000, final_fraction=0.01),
        remat=RematConfig(policy="full"),
        checkpoint=CheckpointConfig(every_steps=100, keep_last=2, keep_every=5000),
    )
