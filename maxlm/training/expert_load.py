"""What the routers did: their figures in a row of metrics.jsonl, and RUN_DIR/expert_load.png."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.config import RunConfig
from maxlm.model.moe.load import Load
from maxlm.training.metrics import read_rows

PLOT_FILE = "expert_load.png"


class RouterFigures:
    """Takes in each step's Load, which comes with the step's other metrics, and makes figures of it for a row.

    `load_max_over_mean`, `load_entropy` (1: even, 0: one expert): of the layer that has the worst, over the steps since
    the row before. `dead_experts`: of all layers, which no token of these steps chose. `balance_loss`,
    `router_z_loss`, `router_logit_rms`: means over layers and these steps, before their coefficients.
    `dropped_choices`: of all layers and steps since this start of the run. `experts`: the same by layer, its `dropped`
    of these steps alone, and `load` by layer and expert: its share over an even one.
    """

    def __init__(self, config: RunConfig, say: Callable[[str], None]):
        self._num_experts, self._say = config.model.num_experts, say
        self._loads: list[Load] = []
        self._dropped, self._told = 0, config.model.moe.capacity_factor > 0  # there dropping is what was asked for

    def finished(self, step: int, load: Load | None) -> None:
        """Says once that a buffer was full."""
        if load is None:
            return
        self._loads.append(load)
        lost = int(np.sum(load.dropped))
        self._dropped += lost
        if lost and not self._told:
            self._told = True
            self._say(f"step {step}: {lost} choices of experts found no room and were left out: raise "
                      "model.moe.buffer_factor (dropped_choices in metrics.jsonl counts them)")

    def figures(self) -> dict[str, Any]:
        """For a row of metrics; `{}` without experts."""
        if not self._loads:
            return {}
        chosen_LE, dropped_L, balance_L, z_L, logit_L = (
            np.sum(np.asarray(parts, np.float64), axis=0) for parts in zip(*self._loads, strict=True))
        balance_L, z_L, logit_L = (total / len(self._loads) for total in (balance_L, z_L, logit_L))
        self._loads = []
        share_LE = chosen_LE / np.maximum(chosen_LE.sum(axis=1, keepdims=True), 1)
        logs_LE = np.log(np.maximum(share_LE, 1e-30)) / math.log(max(self._num_experts, 2))
        entropy_L = -np.sum(share_LE * logs_LE, axis=1)
        most_L, dead_L = share_LE.max(axis=1) * self._num_experts, (share_LE == 0).sum(axis=1)
        by_layer = {"max_over_mean": most_L, "entropy": entropy_L, "dead": dead_L, "dropped": dropped_L,
                    "balance_loss": balance_L, "z_loss": z_L, "logit_rms": logit_L,
                    "load": share_LE * self._num_experts}
        return {
            "load_max_over_mean": float(most_L.max()), "load_entropy": float(entropy_L.min()),
            "dead_experts": int(dead_L.sum()), "dropped_choices": self._dropped,
            "balance_loss": float(balance_L.mean()), "router_z_loss": float(z_L.mean()),
            "router_logit_rms": float(logit_L.mean()),
            "experts": {name: np.round(a, 3).tolist() for name, a in by_layer.items()},
        }


def plot_expert_load(run_dir: Path) -> None:
    """Draws each expert's load over time, layer under layer; nothing where the run has no experts."""
    rows = [row for row in read_rows(run_dir) if row.get("experts")]
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    load_SLE = np.asarray([row["experts"]["load"] for row in rows])
    steps, (_, layers, experts) = [row["step"] for row in rows], load_SLE.shape
    figure, axes = plt.subplots(figsize=(9, min(3 + 0.06 * layers * experts, 14)))
    image = axes.imshow(load_SLE.reshape(len(rows), -1).T, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2,
                        interpolation="nearest", extent=(steps[0], max(steps[-1], steps[0] + 1), layers * experts, 0))
    axes.set_yticks([experts * (layer + 0.5) for layer in range(layers)], [str(layer) for layer in range(layers)])
    for layer in range(1, layers):
        axes.axhline(layer * experts, color="black", linewidth=0.5)
    axes.set(xlabel="step", ylabel="sparse layer (its experts below each other)",
             title=f"{run_dir.resolve().name}: load of each expert over an even share")
    figure.colorbar(image, extend="max")
    partial = run_dir / (PLOT_FILE + ".partial")
    try:
        figure.savefig(partial, dpi=120, bbox_inches="tight", format="png")
        os.replace(partial, run_dir / PLOT_FILE)
    finally:
        plt.close(figure)
        partial.unlink(missing_ok=True)
