"""The real ladder: 4 budgets x 5 sizes of byte-level decoders on Python source, then forecast runs of 4x the largest.

    scripts/isoflop_h100.sh OUT [TEXT...]     # all of it: data, sweep, fit, seal, forecast runs, scores

Hardware: two H100, four runs at a time on each. Expected: 1.8e16 FLOPs in about 3 minutes, then the forecast runs, one
a GPU, 8e15 FLOPs each, in about a minute and a half. Not measured yet.

- Bytes, because unique text is what runs out first: the smallest model of the largest budget reads 200M tokens.
- Batches grow as budget^(1/3) (DeepSeek LLM, arXiv:2401.02954, equation 1), and every run has 700 steps or more:
  shorter ones do not lie on the curve of longer ones.
- One learning rate for all, the best of the base model on a CPU (400 steps; 1e-3 to 3.2e-2: docs/LOG.md): completep
  carries it over sizes, and what a larger batch would add to the rate (its square root) is about what a longer run
  takes away (tokens^-0.3: Bjorck et al. 2024, arXiv:2409.19913). Runs at half and twice the rate, a small and a large
  size of the second budget, say what that costs; column `rate_factor` keeps them out of the fit
  (`--where 'rate_factor==1'`).
- Attention in plain JAX: rows are short, models narrow, and cuDNN's way with packed rows asks the host in each layer.
- Two repeats of one run with other seeds give the noise floor.
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
    ResilienceConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from maxlm.scaling.grid import COLUMNS, NAME, Point, Sweep, isoflop, trials

# Budget (FLOPs), rows a batch, and (layers, width) around the size that should be best; the best doubles as the budget
# grows 2.5 times.
LADDER = (
    (2e15, 64, ((3, 192), (5, 192), (5, 256), (6, 320), (7, 384))),
    (8e14, 44, ((3, 128), (3, 192), (5, 192), (5, 256), (6, 320))),
    (3.2e14, 32, ((2, 128), (4, 128), (3, 192), (5, 192), (5, 256))),
    (1.28e14, 24, ((3, 64), (2, 128), (3, 128), (3, 192), (4, 192))),
)
REPEATED = 2  # the rung whose middle run is repeated, and of which two sizes are trained at other rates
SEEDS, FACTORS = (1, 2), (0.5, 2.0)
TARGETS, TARGET_ROWS = ((5, 256), (6, 320)), 100
RATE, SEQ_LEN, FEWEST_STEPS = 3e-3, 512, 700


def size(layers: int, width: int) -> Point:
    return {"model.num_layers": layers, "model.hidden_dim": width, "model.num_heads": width // 64,
            "model.num_kv_heads": width // 64, "model.mlp_dim": 8 * width // 3 // 64 * 64}


def base(rows: int) -> RunConfig:
    return RunConfig(
        model=ModelConfig(num_layers=3, hidden_dim=64, num_heads=1, num_kv_heads=1, head_dim=64, mlp_dim=128,
                          vocab_size=264, qk_norm=True,
                          parametrization=ParametrizationConfig("completep", base_width=64, base_depth=3)),
        data=DataConfig(path="sweeps/h100/data"),
        train=TrainConfig(global_batch_size=rows, seq_len=SEQ_LEN),
        optimizer=OptimizerConfig(learning_rate=RATE),
        schedule=ScheduleConfig(name="cosine", warmup_steps=1, final_fraction=0.1),
        compute=ComputeConfig(layer_unroll="all", attention="reference"),
        checkpoint=CheckpointConfig(every_steps=1_000_000),
        eval=EvalConfig(every_steps=0, num_batches=0),
        resilience=ResilienceConfig(digest_every_steps=1_000_000),
        logging=LoggingConfig(every_steps=100, tensorboard=False),
    )


def rung(budget: float, rows: int, shapes: tuple[tuple[int, int], ...]) -> list[Point]:
    points = isoflop(base(rows), (budget,), [size(*shape) for shape in shapes], warmup_fraction=0.05,
                     fewest_steps=FEWEST_STEPS)
    return [{**point, "train.global_batch_size": rows, "optimizer.learning_rate": RATE,
             COLUMNS: {**point[COLUMNS], "rate_factor": 1.0}} for point in points]


def sweep() -> Sweep:
    rungs = [rung(*level) for level in LADDER]
    again, middle = rungs[REPEATED], rungs[REPEATED][len(rungs[REPEATED]) // 2]
    repeats = [{**middle, NAME: f"{middle[NAME]}-seed{seed}", "train.seed": seed} for seed in SEEDS]
    rates = [{**one, NAME: f"{one[NAME]}-rate{factor:g}", "optimizer.learning_rate": RATE * factor,
              COLUMNS: {**one[COLUMNS], "rate_factor": factor}} for one in (again[1], again[-1]) for factor in FACTORS]
    points = [point for level in rungs for point in level] + repeats + rates
    points.sort(key=lambda point: -point["train.num_steps"])  # longest first: none is left alone at the end
    return Sweep(trials(base(1), points), flops_per_second=1e14, step_seconds=0.006, startup_seconds=30.0)


def targets() -> tuple[RunConfig, ...]:
    """The runs to forecast, of four times the largest budget: about the best size, and twice that."""
    points = rung(4 * LADDER[0][0], TARGET_ROWS, TARGETS)
    return tuple(trial.config for trial in trials(base(1), points))
