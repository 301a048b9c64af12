"""Where a run's numbers go: `metrics.jsonl`, TensorBoard, and `loss.png`."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"
FOLDER = "tensorboard"


class MetricsWriter:
    """Appends rows to RUN_DIR/metrics.jsonl and to TensorBoard. On resume, rows after `start_step` (written by a
    run that was killed after its last checkpoint) are dropped first: those steps are about to be made again."""

    def __init__(self, run_dir: Path, start_step: int, tensorboard: bool):
        self.path = run_dir / FILE
        rows = [row for row in read_rows(run_dir) if row["step"] <= start_step]
        self._evaluated = {row["step"] for row in rows if "eval_loss" in row}
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(partial, self.path)
        self._file = self.path.open("a", buffering=1)
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(run_dir / FOLDER), purge_step=start_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """One JSON object. Numbers that are not finite are written as null, which JSON can hold."""
        row = {**row, "time": time.time()}
        try:
            self._file.write(json.dumps({k: v if _finite(v) else None for k, v in row.items()}) + "\n")
        except OSError as error:  # a full disk; the file object does not say whose
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if self._board:
            for name, value in row.items():
                if isinstance(value, float) and name != "time":
                    group = "eval" if name.startswith("eval_") else "train"
                    self._board.add_scalar(f"{group}/{name}", value, row["step"])

    def has_evaluation(self, step: int) -> bool:
        """Whether an earlier start of the run has written the evaluation of `step`."""
        return step in self._evaluated

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run so far; a last line cut short by a kill is left out."""
    path = run_dir / FILE
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def plot_loss(run_dir: Path) -> None:
    """Draws RUN_DIR/loss.png: training loss over tokens, held-out loss on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_rows(run_dir)
    train = [(r["tokens"], r["loss"]) for r in rows if r.get("loss") is not None]
    held = [(r["tokens"], r["eval_loss"]) for r in rows if r.get("eval_loss") is not None]
    figure, axes = plt.subplots(figsize=(8, 5))
    if train:
        axes.plot(*zip(*train, strict=True), linewidth=1, color="#7a9cc6", label="training")
    if held:
        axes.plot(*zip(*held, strict=True), "o-", markersize=4, color="#c0392b", label="held out")
    axes.set(xlabel="tokens", ylabel="loss (nats a token)", title=run_dir.resolve().name)
    axes.grid(alpha=0.3)
    if train or held:
        axes.legend()
    partial = run_dir / "loss.png.partial"
    try:
        figure.savefig(partial, dpi=120, bbox_inches="tight", format="png")
        os.replace(partial, run_dir / "loss.png")
    finally:
        plt.close(figure)
        partial.unlink(missing_ok=True)
