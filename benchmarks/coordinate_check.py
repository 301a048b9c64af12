"""Whether a parametrization transfers: activations over width and depth, and where the best learning rate lies.

    python3 benchmarks/coordinate_check.py --json benchmarks/results/coordinate_check_cpu.json --plot check.png

For each parametrization and each size of a tiny decoder on a synthetic language: the root mean square of the residual
stream and of the logits after a few steps, and of their change since the start, which should not grow with size; and
the loss after `--steps` steps at each of a grid of learning rates, all rates of a size trained in one program
(maxlm/training/packed.py). With `--steps 60 --widths 32 128 --depths 2 8` five minutes of a CPU core.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

import jax
import numpy as np

from maxlm.config import RunConfig
from maxlm.model import Transformer
from maxlm.model.parametrization import multipliers
from maxlm.schema import from_dict
from maxlm.training.packed import PackedRuns, run_of, stacked

NAMES = ("standard", "mup", "completep")
WIDTHS, DEPTHS = (32, 64, 128, 256), (2, 4, 8, 16)
BASE_WIDTH, BASE_DEPTH = 32, 2
RATES = tuple(2.0**-k for k in range(11, 3, -1))
VOCAB, ROWS, LENGTH, FEW = 64, 16, 32, 5


def config_of(name: str, width: int, depth: int, rate: float, steps: int) -> RunConfig:
    return from_dict(RunConfig, {
        "model": {"num_layers": depth, "hidden_dim": width, "num_heads": width // 16, "num_kv_heads": width // 16,
                  "head_dim": 16, "mlp_dim": 2 * width, "vocab_size": VOCAB, "init_std": 0.05,
                  "parametrization": {"name": name, "base_width": BASE_WIDTH, "base_depth": BASE_DEPTH}},
        "train": {"num_steps": steps, "global_batch_size": ROWS, "seq_len": LENGTH},
        "optimizer": {"learning_rate": rate, "weight_decay": 0.0, "clip_norm": 0.0},
        "schedule": {"name": "linear", "warmup_steps": steps // 10, "final_fraction": 0.0},
        "precision": {"recipe": "float32"},
    })


def language(seed: int = 0) -> np.ndarray:
    """Probabilities [V, V, V] of the next token after two: few are likely, and which depends on both."""
    random = np.random.default_rng(seed)
    logits = 2.5 * random.standard_normal((VOCAB, 1, VOCAB)) + 1.5 * random.standard_normal((VOCAB, VOCAB, VOCAB))
    weights = np.exp(logits)
    return (weights / weights.sum(-1, keepdims=True)).cumsum(-1)


def batch_of(table: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng([7, seed])
    tokens = np.zeros((ROWS, LENGTH + 1), np.int32)
    tokens[:, :2] = random.integers(0, VOCAB, (ROWS, 2))
    for place in range(2, LENGTH + 1):
        likely = table[tokens[:, place - 1], tokens[:, place - 2]]
        tokens[:, place] = np.minimum((random.random((ROWS, 1)) > likely).sum(-1), VOCAB - 1)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.ones((ROWS, LENGTH), np.int32),
            "positions": positions}


def activations(params: Transformer, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Residual stream before the final norm and logits, [B, T, ...]."""
    model = jax.tree.map(lambda a: a, params)  # a copy to take the final norm from
    hidden, _ = model.hidden(model.embed(batch["tokens"]), batch["positions"], batch["segment_ids"])
    logits = model.logits(hidden)
    model.final_norm = lambda x: x
    stream, _ = model.hidden(model.embed(batch["tokens"]), batch["positions"], batch["segment_ids"])
    return {"residual": np.asarray(stream) / multipliers(params.config).output, "logits": np.asarray(logits)}


def coordinates(name: str, width: int, depth: int, rate: float = 2.0**-6) -> dict[str, float]:
    """Root mean squares after FEW steps, and of the change since the start."""
    runs, table = PackedRuns([config_of(name, width, depth, rate, 10 * FEW)]), language()
    states, probe = runs.init(), batch_of(table, 10**6)
    before = activations(run_of(states, 0).params, probe)
    for step in range(FEW):
        states, _ = runs.step(states, stacked([batch_of(table, step)]))
    after = activations(run_of(states, 0).params, probe)
    size = lambda a: float(np.sqrt(np.mean(np.square(a))))  # noqa: E731
    return {f"{key}{suffix}": size(value) for key in after
            for suffix, value in (("", after[key]), ("_change", after[key] - before[key]))}


def losses(name: str, width: int, depth: int, steps: int, rates: tuple[float, ...] = RATES) -> list[float]:
    """Held-out loss at each learning rate after `steps` steps."""
    runs, table = PackedRuns([config_of(name, width, depth, rate, steps) for rate in rates]), language()
    states = runs.init()
    for step in range(steps):
        states, _ = runs.step(states, stacked([batch_of(table, step)] * len(rates)))
    heldout = [runs.losses(states, stacked([batch_of(table, 10**6 + k)] * len(rates))) for k in range(8)]
    nats, tokens = (np.sum([part[i] for part in heldout], axis=0) for i in range(2))
    return (nats / tokens).tolist()


def plot(record: dict, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for j, name in enumerate(NAMES):
        rows = [row for row in record["rows"] if row["parametrization"] == name]
        for key, style in (("residual_change", "o-"), ("logits_change", "s-")):
            for over, fixed, line in (("width", "depth", style), ("depth", "width", style + "-")):
                chosen = [r for r in rows if r[fixed] == {"depth": BASE_DEPTH, "width": BASE_WIDTH}[fixed]]
                base = {"width": BASE_WIDTH, "depth": BASE_DEPTH}[over]
                axes[0, j].plot([r[over] / base for r in chosen], [r[key] for r in chosen], line,
                                label=f"{key}, {over}")
        axes[0, j].set(xscale="log", yscale="log", title=name, xlabel="size / base", ylabel="root mean square")
        for row in rows:
            axes[1, j].plot(record["rates"], row["losses"], "." + ("-" if row["depth"] == BASE_DEPTH else "--"),
                            label=f"width {row['width']}, {row['depth']} layers")
        axes[1, j].set(xscale="log", xlabel="learning rate", ylabel="held-out loss")
        for row in axes[:, j]:
            row.legend(fontsize=6)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    sizes = [(width, BASE_DEPTH) for width in arguments.widths]
    sizes += [(BASE_WIDTH, depth) for depth in arguments.depths if depth != BASE_DEPTH]
    rows = []
    for name in NAMES:
        for width, depth in sizes:
            clock = time.perf_counter()
            row = {"parametrization": name, "width": width, "depth": depth, **coordinates(name, width, depth),
                   "losses": losses(name, width, depth, arguments.steps)}
            row["best_rate"] = RATES[int(np.nanargmin(row["losses"]))]
            rows.append(row | {"seconds": time.perf_counter() - clock})
            print(name, width, depth, f"best rate {row['best_rate']:.4g}, loss {min(row['losses']):.4f}, logits "
                  f"changed by {row['logits_change']:.3f}", flush=True)
    record = {"benchmark": "coordinate_check", "rates": RATES, "steps": arguments.steps, "rows": rows,
              "base_width": BASE_WIDTH, "base_depth": BASE_DEPTH, "versions": {"jax": jax.__version__},
              "device_kind": jax.devices()[0].device_kind}
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.plot:
        plot(record, arguments.plot)


if __name__ == "__main__":
    main()
