"""The real ladder: 4 budgets x 5 sizes of byte-level decoders on the text of installed packages, and a 4x forecast run.

    maxlm sweep configs/sweeps/isoflop_h200.py --out sweeps/h200 --dry-run --chip 'NVIDIA H200' --jobs 4
    maxlm sweep configs/sweeps/isoflop_h200.py --out sweeps/h200 --jobs 4
    maxlm fit sweeps/h200/runs.jsonl --law chinchilla --out sweeps/h200/fit
    maxlm forecast seal sweeps/h200/runs.jsonl --law chinchilla --config configs/sweeps/isoflop_h200_target.py \
        --out sweeps/h200/forecast
    maxlm train configs/sweeps/isoflop_h200_target.py --run-dir sweeps/h200/target \
        --set data.source=none --set data.path=sweeps/h200/data/installed-packages-...
    maxlm forecast score sweeps/h200/forecast --run-dir sweeps/h200/target

Hardware: one H200, four runs at a time. Budgets lie four apart and each takes five of eight shapes, so that shapes are
shared between budgets; two repeats with other seeds give the noise floor. Batches are small (8,192 tokens) because runs
of fewer than about 700 steps do not lie on the curve of longer ones. One learning rate serves all sizes (completep).
How long: not measured yet. 2.2e16 FLOPs in 370,000 steps, most of them bound by dispatch and not by arithmetic, and
1.3e16 FLOPs in 60,000 steps for the forecast run.
"""

from maxlm.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvalConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParametrizationConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from maxlm.scaling.grid import Point, Sweep, isoflop, trials

SHAPES = ((2, 48), (2, 64), (3, 80), (3, 112), (5, 128), (5, 176), (6, 224), (7, 288))  # layers, width: N doubles
BUDGETS = (5e13, 2e14, 8e14, 3.2e15)  # N* doubles, so each takes the five shapes from the next one on
TARGET = (6, 224)  # about the best shape for four times the largest budget
SIZES, REPEATED, SEEDS = 5, 1, (1, 2)
BATCH, SEQ_LEN = 16, 512


def size(layers: int, width: int) -> Point:
    return {"model.num_layers": layers, "model.hidden_dim": width, "model.num_heads": width // 16,
            "model.num_kv_heads": width // 16, "model.mlp_dim": 8 * width // 3 // 16 * 16}


def base() -> RunConfig:
    return RunConfig(
        model=ModelConfig(num_layers=2, hidden_dim=48, num_heads=3, num_kv_heads=3, head_dim=16, mlp_dim=128,
                          vocab_size=264, qk_norm=True,
                          parametrization=ParametrizationConfig("completep", base_width=64, base_depth=2)),
        data=DataConfig(source="installed-packages", tokenizer="bytes", heldout_fraction=0.02),
        train=TrainConfig(global_batch_size=BATCH, seq_len=SEQ_LEN),
        optimizer=OptimizerConfig(learning_rate=4e-3),
        schedule=ScheduleConfig(name="cosine", warmup_steps=1, final_fraction=0.1),
        compute=ComputeConfig(layer_unroll="all"),
        checkpoint=CheckpointConfig(every_steps=10_000),
        eval=EvalConfig(every_steps=0, num_batches=400),
        logging=LoggingConfig(every_steps=200, tensorboard=False),
    )


def sweep() -> Sweep:
    points = []
    for first, budget in enumerate(BUDGETS):
        shapes = [size(*shape) for shape in SHAPES[first : first + SIZES]]
        made = isoflop(base(), (budget,), shapes, warmup_fraction=0.05, fewest_steps=700)
        points += made
        if first == REPEATED:
            middle = made[SIZES // 2]
            points += [{**middle, "name": f"{middle['name']}-seed{seed}", "train.seed": seed} for seed in SEEDS]
    return Sweep(trials(base(), points), flops_per_second=5e13, step_seconds=0.003, startup_seconds=25.0)


def target() -> RunConfig:
    """The run to forecast: four times the largest budget."""
    (point,) = isoflop(base(), (4 * BUDGETS[-1],), [size(*TARGET)], warmup_fraction=0.05)
    return trials(base(), [point])[0].config
