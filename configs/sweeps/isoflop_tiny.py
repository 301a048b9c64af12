"""An isoFLOP ladder for a laptop: 3 budgets x 4 sizes of byte-level decoders on the Python standard library.

    maxlm sweep configs/sweeps/isoflop_tiny.py --out sweeps/tiny --dry-run
    maxlm sweep configs/sweeps/isoflop_tiny.py --out sweeps/tiny --jobs 2
    maxlm fit sweeps/tiny/runs.jsonl --law chinchilla --out sweeps/tiny/fit

Hardware: 2 CPU cores; how long is what --dry-run estimates, not measured. Enough to see the whole way, not to trust an
exponent: for that use more budgets, further apart (isoflop_h100.py).
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
from maxlm.scaling.grid import Sweep, isoflop, trials

BASE = RunConfig(
    model=ModelConfig(num_layers=2, hidden_dim=64, num_heads=4, num_kv_heads=4, head_dim=16, mlp_dim=176,
                      vocab_size=264, qk_norm=True),
    data=DataConfig(source="python-stdlib", tokenizer="bytes"),
    train=TrainConfig(global_batch_size=8, seq_len=128),
    optimizer=OptimizerConfig(learning_rate=4e-3),
    schedule=ScheduleConfig(name="cosine", warmup_steps=1, final_fraction=0.1),
    precision=PrecisionConfig(recipe="float32"),
    compute=ComputeConfig(layer_unroll="all"),
    checkpoint=CheckpointConfig(every_steps=1000),
    eval=EvalConfig(every_steps=0, num_batches=60),
    logging=LoggingConfig(every_steps=100, tensorboard=False),
)
BUDGETS = (1.2e12, 2.5e12, 5e12)
WIDTHS = (32, 48, 64, 96)


def size(width: int) -> dict[str, int]:
    return {"model.hidden_dim": width, "model.mlp_dim": 8 * width // 3 // 16 * 16, "model.head_dim": width // 4}


def sweep() -> Sweep:
    points = isoflop(BASE, BUDGETS, [size(width) for width in WIDTHS], warmup_fraction=0.05, fewest_steps=700)
    return Sweep(trials(BASE, points), startup_seconds=10.0)
