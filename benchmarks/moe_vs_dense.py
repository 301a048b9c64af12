"""configs/moe_tiny.py beside the dense model with the same active parameters: held-out loss, and how even the load is.

    python benchmarks/moe_vs_dense.py --out OUT [--runs RATE:SEED ...]

Both train on the same batches with the same settings, once for each learning rate and seed (of weights and order of the
data); the dense twin's MLP is as wide as the experts of a token. Writes OUT/record.json and OUT/moe_vs_dense.png; runs
stay in OUT, and one that is there is not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

from maxlm.config import MoEConfig, RunConfig
from maxlm.flops import parameter_count, training_flops_per_token
from maxlm.overrides import load_config
from maxlm.training.benchmark import commit
from maxlm.training.metrics import read_rows

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "moe_tiny.py"


def dense_twin(config: RunConfig) -> RunConfig:
    model = config.model
    width = model.expert_dim * (model.experts_per_token + model.moe.shared_experts)
    return dataclasses.replace(config, model=dataclasses.replace(
        model, mlp_dim=width, num_experts=0, experts_per_token=0, expert_dim=0, moe=MoEConfig()))


def run(kind: str, rate: float, seed: int, out: Path) -> list[dict]:
    """The rows of a run, made now unless it is there."""
    folder, changes = out / f"{kind}_{rate:g}_{seed}", [f"optimizer.learning_rate={rate}", f"train.seed={seed}",
                                                        "eval.every_steps=50"]
    if kind == "dense":
        twin = dense_twin(load_config(str(CONFIG))).model
        changes += [f"model.mlp_dim={twin.mlp_dim}", "model.num_experts=0", "model.experts_per_token=0",
                    "model.expert_dim=0", "model.moe.scores=softmax", "model.moe.bias_rate=0.0",
                    "model.moe.dense_layers=0"]
    if not (folder / "DONE").exists():
        first = next(out.glob("*/data"), None)
        if first and not (folder / "data").exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "data").symlink_to(first.resolve())
        words = [word for change in changes for word in ("--set", change)]
        subprocess.run([sys.executable, "-m", "maxlm", "train", CONFIG, "--run-dir", folder, *words], check=True)
    return read_rows(folder)


def summary(kind: str, config: RunConfig, runs: dict[tuple[float, int], list[dict]]) -> dict:
    count, last = parameter_count(config.model), config.train.num_steps
    rows = [{
        "learning_rate": rate, "seed": seed,
        "eval_loss": [[row["step"], row["eval_loss"]] for row in found if "eval_loss" in row],
        "bits_per_byte": [row["eval_bits_per_byte"] for row in found if "eval_loss" in row][-1],
        "max_over_mean": [[row["step"], row["load_max_over_mean"]] for row in found if "load_max_over_mean" in row],
        "largest_after_a_fifth": max((row["load_max_over_mean"] for row in found
                                      if row["step"] > last / 5 and "load_max_over_mean" in row), default=None),
        "seconds": sum(config.logging.every_steps * row["step_seconds"] for row in found if "step_seconds" in row),
    } for (rate, seed), found in runs.items()]
    return {"kind": kind, "parameters": count.total, "active_parameters": count.active, "runs": rows,
            "flops_per_token": training_flops_per_token(config.model, config.train.seq_len)}


def plot(record: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    moe, dense = (result["runs"] for result in record["results"])
    for run_, twin, style in zip(moe, dense, ("-", "--", ":", "-.", (0, (1, 3))), strict=True):
        steps, losses = zip(*run_["eval_loss"], strict=True)
        gap = [loss - of_twin for loss, (_, of_twin) in zip(losses, twin["eval_loss"], strict=True)]
        left.plot(steps, gap, linestyle=style, marker=".", color="#c0392b",
                  label=f"rate {run_['learning_rate']:g}, seed {run_['seed']}: {losses[-1]:.3f}")
        right.plot(*zip(*run_["max_over_mean"], strict=True), linestyle=style, color="#c0392b")
    left.set(xlabel="step", ylabel="held-out loss less the dense twin's (nats a token)",
             title="same batches, equal active FLOPs; last loss in the legend")
    left.axhline(0, color="black", linewidth=0.7)
    right.set(xlabel="step", ylabel="largest load over the mean, worst layer", title="bias alone, no loss")
    right.axhline(1.3, color="black", linewidth=0.7)
    right.set_yscale("log")
    left.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", default=["1e-2:0", "1.5e-2:0", "2e-2:0", "1e-2:1", "1.5e-2:1"])
    options = parser.parse_args()
    config, results = load_config(str(CONFIG)), []
    wanted = [(float(rate), int(seed)) for rate, _, seed in (one.partition(":") for one in options.runs)]
    for kind, shape in (("moe", config), ("dense", dense_twin(config))):
        runs = {(rate, seed): run(kind, rate, seed, options.out) for rate, seed in wanted}
        results.append(summary(kind, shape, runs))
    record = {"benchmark": "moe_vs_dense", "device_kind": "cpu", "commit": commit(), "results": results}
    (options.out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(record, options.out / "moe_vs_dense.png")
    for result in results:
        for run_ in result["runs"]:
            print(result["kind"], run_["learning_rate"], run_["seed"], run_["eval_loss"][-1][1], run_["bits_per_byte"],
                  run_["largest_after_a_fifth"], round(run_["seconds"]))


if __name__ == "__main__":
    main()
