"""Does 8 bits cost quality? Held-out loss of matched runs, recipe against recipe, seed by seed: a record and a plot.

    for s in 0 1; do for r in bf16 fp8; do maxlm train configs/bytes_50m.py --run-dir RUNS/${r}_$s \\
        --set data.path=DATA --set train.seed=$s --set precision.recipe=$r; done; done
    python benchmarks/fp8_quality.py RUNS --chip 'NVIDIA H100 80GB HBM3' --commit HASH --out benchmarks/results

RUNS holds a run directory RECIPE_SEED each. Equal seeds see the same batches from the same start. Writes
fp8_quality.json, and docs' picture fp8_quality.png: the curves, and each recipe's gap to bf16 with the same seed.
The sparse runs (fp8_quality_moe) add --set model.num_experts=8 --set model.experts_per_token=2 --set
model.expert_dim=768 --set model.moe.scores=sigmoid --set model.moe.bias_rate=0.001 --set train.global_batch_size=128
--set train.num_steps=1528 --set eval.every_steps=382.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from maxlm.training.metrics import read_rows  # noqa: E402

BASE = "bf16"


def heldout(folder: Path) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in read_rows(folder) if "eval_loss" in row}


def speed(folder: Path) -> float:
    return statistics.median(row["tokens_per_second_per_chip"] for row in read_rows(folder) if "loss" in row)


def summary(runs: dict[tuple[str, int], Path]) -> dict:
    losses = {key: heldout(folder) for key, folder in runs.items()}
    last = {key: curve[max(curve)] for key, curve in losses.items()}
    seeds = sorted({seed for recipe, seed in runs if recipe == BASE})
    base = [last[BASE, seed] for seed in seeds]
    record = {"seeds": seeds, "seed_spread": max(base) - min(base), "recipes": {}}
    for recipe in sorted({recipe for recipe, _ in runs}):
        ends = [last[recipe, seed] for seed in seeds]
        gaps = [last[recipe, seed] - last[BASE, seed] for seed in seeds]
        record["recipes"][recipe] = {
            "final_loss": ends, "gap_to_bf16": gaps, "mean_gap": statistics.mean(gaps),
            "mean_gap_percent": 100 * statistics.mean(gaps) / statistics.mean(base),
            "median_tokens_per_second": [speed(runs[recipe, seed]) for seed in seeds],
            "curves": [sorted(losses[recipe, seed].items()) for seed in seeds],
        }
    return record


def plot(record: dict, path: Path) -> None:
    figure, (curves, gaps) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    reference = record["recipes"][BASE]["curves"]
    for color, (recipe, figures) in enumerate(record["recipes"].items()):
        for place, (seed, curve, base) in enumerate(zip(record["seeds"], figures["curves"], reference, strict=True)):
            style = {"color": f"C{color}", "linestyle": ("-", "--", ":")[place % 3], "label": f"{recipe}, seed {seed}"}
            curves.plot(*zip(*curve, strict=True), **style)
            if recipe != BASE:
                above = [100 * (loss / other - 1) for (_, loss), (_, other) in zip(curve, base, strict=True)]
                gaps.plot([step for step, _ in curve], above, **style)
    curves.set(xlabel="step", ylabel="held-out loss, nats a byte", ylim=(None, reference[0][0][1] * 1.02))
    gaps.axhline(0.3, color="0.6", linewidth=0.8)
    gaps.annotate("aim: 0.3%", (0.02, 0.3), xycoords=("axes fraction", "data"), va="bottom", color="0.4")
    gaps.axhline(0, color="0.8", linewidth=0.8)
    gaps.set(xlabel="step", ylabel="loss above bf16 of the same seed, %")
    figure.legend(*curves.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--chip", required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="fp8_quality", help="of the record and of the picture")
    options = parser.parse_args()
    runs = {(folder.name.rsplit("_", 1)[0], int(folder.name.rsplit("_", 1)[1])): folder
            for folder in sorted(options.runs.iterdir()) if (folder / "metrics.jsonl").exists()}
    first = json.loads((next(iter(runs.values())) / "config.json").read_text())
    record = {"benchmark": "fp8_quality", "chip": options.chip, "commit": options.commit,
              "steps": first["train"]["num_steps"], "model": first["model"], **summary(runs)}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(record, options.out / f"{options.name}.png")
    for recipe, figures in record["recipes"].items():
        print(f"{recipe}: {figures['final_loss']}, {figures['mean_gap_percent']:+.2f}% of bf16's")
    print(f"bf16 seeds are {record['seed_spread']:.5f} apart")


if __name__ == "__main__":
    main()
