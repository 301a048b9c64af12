"""51M parameters on bytes, wide and shallow: a matched run for comparing precisions, seeds or optimizers.

    maxlm data prepare TEXT... --source installed-packages --out data/bytes --tokenizer bytes --seq-len 1024
    maxlm train configs/bytes_50m.py --run-dir runs/bf16 --set data.path=data/bytes
    maxlm train configs/bytes_50m.py --run-dir runs/fp8 --set data.path=data/bytes --set precision.recipe=fp8

Hardware: one H100. benchmarks/fp8_quality.py makes the four runs, the plot and the record of docs/FP8.md.
How long: 3,080 steps of 65,536 bytes are 202 million tokens.
Reaches: docs/FP8.md.
"""

from maxlm.config import (
    CheckpointConfig,
    ComputeConfig,
    EvalConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(num_layers=4, hidden_dim=1024, num_heads=16, num_kv_heads=16, head_dim=64, mlp_dim=2816,
                          vocab_size=272, qk_norm=True),
        train=TrainConfig(num_steps=3080, global_batch_size=64, seq_len=1024),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        schedule=ScheduleConfig(name="cosine", warmup_steps=150, final_fraction=0.1),
        compute=ComputeConfig(layer_unroll="all"),
        checkpoint=CheckpointConfig(every_steps=100_000),
        eval=EvalConfig(every_steps=280, num_batches=16),
        logging=LoggingConfig(every_steps=20, tensorboard=False),
    )
