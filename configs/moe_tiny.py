"""A small decoder with experts, on the running Python's own library: 8 in each layer but the first, of which a token
takes 2. Balanced by a bias, with no auxiliary loss.

    maxlm train configs/moe_tiny.py --run-dir runs/moe_tiny

Hardware: any laptop; two minutes on 2 CPU cores, everything included (docs/MOE.md).
Reaches: 1.660 bits a held-out byte; the dense model with the same active parameters 1.683 (docs/MOE.md).
"""

from maxlm.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvalConfig,
    LoggingConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_layers=4, hidden_dim=192, num_heads=4, num_kv_heads=4, head_dim=48, mlp_dim=384, vocab_size=4096,
            qk_norm=True, num_experts=8, experts_per_token=2, expert_dim=192,
            moe=MoEConfig(scores="sigmoid", bias_rate=0.05, dense_layers=1),
        ),
        data=DataConfig(source="python-stdlib", tokenizer="bpe:4096", heldout_fraction=0.01),
        train=TrainConfig(num_steps=200, global_batch_size=32, seq_len=128),
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, b2=0.99, muon_momentum=0.9),
        schedule=ScheduleConfig(name="linear", warmup_steps=20, final_fraction=0.0),
        precision=PrecisionConfig(recipe="float32"),
        compute=ComputeConfig(layer_unroll="all"),
        checkpoint=CheckpointConfig(every_steps=100),
        eval=EvalConfig(every_steps=0, num_batches=0),
        logging=LoggingConfig(every_steps=10, sample_prompt="def read_lines(path):"),
    )
