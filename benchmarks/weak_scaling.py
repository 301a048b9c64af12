"""Weak scaling on paper and in the compiler: one recipe from 64 to 8,192 chips, the batch growing with them.

    python3 benchmarks/weak_scaling.py --out benchmarks/results/weak_scaling.json --plot docs/weak_scaling.png
    (2 CPU cores, no chip: some seconds for the model, 10 to 40 s for each compile)

At each size the analytic model chooses the layout (mesh, microbatch, remat) among those that fit; --compile names the
sizes at which the real compiler is asked too, about the same layout. 8,192 v5p chips are two slices of 4,096.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

from maxlm.overrides import load_config
from maxlm.planning.compiled import versions
from maxlm.planning.report import compile_report
from maxlm.planning.search import candidates
from maxlm.planning.topology import find_target

ROOT = Path(__file__).resolve().parent.parent
SIZES = {64: ("4x4x4", 1), 128: ("4x4x8", 1), 256: ("4x8x8", 1), 512: ("8x8x8", 1), 1024: ("8x8x16", 1),
         2048: ("8x16x16", 1), 4096: ("16x16x16", 1), 8192: ("16x16x16", 2)}
ROOM = 0.93  # of the memory: the analytic model is mostly within a tenth of the compiler's


def point(recipe: str, chips: int, rows_per_chip: int, ask_compiler: bool) -> dict:
    shape, slices = SIZES[chips]
    config, target = load_config(str(ROOT / "configs" / f"{recipe}.py")), find_target(f"v5p:{shape}", slices)
    config = replace(config, train=replace(config.train, global_batch_size=rows_per_chip * chips, grad_accumulation=1))
    best = next(c for c in candidates(config, target) if c.expected.memory_bytes <= ROOM * target.usable_bytes)
    expected = best.expected
    found = {"chips": chips, "topology": target.name, "slices": slices, "layout": dict(best.values),
             "global_batch_size": config.train.global_batch_size, "mfu": expected.mfu, "step_seconds": expected.seconds,
             "bytes_per_chip": expected.memory_bytes, "collective_bytes_per_chip": dict(expected.wire_bytes)}
    if ask_compiler:
        record = compile_report(best.config, target)
        moved = {axis: sum(kinds.values()) for axis, kinds in record["collective_bytes"].items()}
        found["compiled"] = {"fits": record["fits"], "mfu": record["mfu_estimate"],
                             "step_seconds": record["step_seconds_estimate"],
                             "bytes_per_chip": record["bytes_per_chip"], "collective_bytes_per_chip": moved}
    return found


def draw(record: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = record["points"]
    chips = [p["chips"] for p in points]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    gigabytes = lambda moved: sum(moved.values()) / 1e9  # noqa: E731
    left.plot(chips, [gigabytes(p["collective_bytes_per_chip"]) for p in points], marker="o", label="analytic model")
    right.plot(chips, [p["mfu"] for p in points], marker="o", label="analytic model")
    compiled = [p for p in points if "compiled" in p]
    asked = [p["chips"] for p in compiled]
    for axes, values in ((left, [gigabytes(p["compiled"]["collective_bytes_per_chip"]) for p in compiled]),
                         (right, [p["compiled"]["mfu"] for p in compiled])):
        if asked:
            axes.plot(asked, values, "x", markersize=10, label="compiled")
    left.set(xscale="log", ylabel="collectives, GB sent by a chip a step", xlabel="v5p chips", ylim=(0, None))
    right.set(xscale="log", ylabel="MFU at the roofline (a bound)", xlabel="v5p chips", ylim=(0, 1))
    for axes in (left, right):
        axes.set_xticks(chips, [f"{size:,}" for size in chips], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{record['recipe']}, sequences a chip and step: {record['rows_per_chip']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="llama3_70b")
    parser.add_argument("--rows-per-chip", type=int, default=1, help="sequences a chip and step (default: 1)")
    parser.add_argument("--compile", type=int, nargs="*", default=[64, 512, 4096], metavar="CHIPS")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    points = []
    for chips in SIZES:
        points.append(point(arguments.recipe, chips, arguments.rows_per_chip, chips in arguments.compile))
        print(json.dumps(points[-1]), flush=True)
    record = {"benchmark": "weak_scaling", "recipe": arguments.recipe, "rows_per_chip": arguments.rows_per_chip,
              "versions": versions(), "points": points}
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.plot:
        draw(record, arguments.plot)


if __name__ == "__main__":
    main()
