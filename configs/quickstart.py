"""A small decoder on the running Python's own standard library: the first five minutes.

    maxlm train configs/quickstart.py --run-dir runs/quickstart        (or: make demo)

Hardware: any laptop; sized for 2 CPU cores and 24 GiB, where it takes three to five minutes.
Reaches: fewer bits a held-out byte than gzip -9 does on the same files; the run's last lines compare them.
"""

from maxlm.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvalConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_layers=4, hidden_dim=192, num_heads=4, num_kv_heads=4, head_dim=48, mlp_dim=512, vocab_size=4096,
            qk_norm=True,
        ),
        data=DataConfig(source="python-stdlib", tokenizer="bpe:4096", heldout_fraction=0.02),
        train=TrainConfig(num_steps=600, global_batch_size=16, seq_len=128),
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, b2=0.99, muon_momentum=0.9),
        schedule=ScheduleConfig(name="linear", warmup_steps=20, final_fraction=0.0),
        precision=PrecisionConfig(recipe="float32"),
        compute=ComputeConfig(layer_unroll="all"),
        checkpoint=CheckpointConfig(every_steps=200),
        eval=EvalConfig(every_steps=0, num_batches=0),
        logging=LoggingConfig(every_steps=20, sample_prompt="def read_lines(path):"),
    )
