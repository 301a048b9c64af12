"""Is the roofline honest? Step time and memory of GPU steps, predicted before they are measured.

    python3 benchmarks/roofline_check.py predict --out benchmarks/results/roofline_predictions.json     (no GPU needed)
    python3 benchmarks/roofline_check.py measure --out DIR [--cases NAME ...]        (on the GPUs; one to four of them)
    python3 benchmarks/roofline_check.py score --records DIR \\
        --predictions benchmarks/results/roofline_predictions.json --out benchmarks/results/roofline_check.json

predict writes, for each case and chip, the analytic model's step time and memory (maxlm/planning/analytic.py), the
commit they come from, and when. measure compiles each case in a process of its own, writes down the bytes that
`maxlm compile --topology gpu` reports, and only then runs it: the record has that prediction beside the device's own
peak. score compares; the aims are 15% of the step time and 5% of the peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

from maxlm.config import RunConfig
from maxlm.hardware import CHIPS, chip_of
from maxlm.overrides import apply_overrides, load_config
from maxlm.parallel.mesh import axis_sizes
from maxlm.planning.analytic import estimate

ROOT = Path(__file__).resolve().parent.parent
PREDICTED_FOR = ("H100 SXM", "H200 SXM")
TIME_AIM, MEMORY_AIM = 0.15, 0.05
UNROLLED = ("compute.layer_unroll=all", "remat.policy=none")
EIGHT_B = ("model.num_layers=6", "model.vocab_size=32000", "train.seq_len=4096")
EXPERT4 = ("model.num_layers=8", "train.global_batch_size=32", "mesh.fsdp=1", "mesh.expert=4",
           "model.moe.buffer_factor=1.25")
OLMOE = ("train.seq_len=4096", *UNROLLED)


@dataclass(frozen=True)
class Case:
    """A recipe with overrides, on `devices` GPUs of one host."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    devices: int = 1

    def config(self) -> RunConfig:
        return apply_overrides(load_config(str(ROOT / "configs" / f"{self.recipe}.py")), self.overrides)


CASES = (
    Case("dense_1b_bf16", "llama3_2_1b", ("train.global_batch_size=8",)),
    Case("dense_1b_fp8", "llama3_2_1b", ("train.global_batch_size=8", "precision.recipe=fp8")),
    Case("dense_1b_names", "llama3_2_1b", ("train.global_batch_size=8", "remat.policy=names")),
    Case("dense_1b_scanned_full", "llama3_2_1b",
         ("train.global_batch_size=16", "remat.policy=full", "compute.layer_unroll=1")),
    Case("dense_8b_layers_bf16", "llama3_8b", (*EIGHT_B, *UNROLLED, "train.global_batch_size=8")),
    Case("dense_8b_layers_fp8", "llama3_8b",
         (*EIGHT_B, *UNROLLED, "train.global_batch_size=8", "precision.recipe=fp8")),
    Case("gpt2_124m", "gpt2_124m", ("train.global_batch_size=32",)),
    Case("moe_olmoe_4_layers", "olmoe_1b_7b", (*OLMOE, "model.num_layers=4", "train.global_batch_size=8")),
    Case("moe_olmoe_4_layers_fp8", "olmoe_1b_7b",
         (*OLMOE, "model.num_layers=4", "train.global_batch_size=8", "precision.recipe=fp8")),
    Case("moe_olmoe_8_layers", "olmoe_1b_7b", (*OLMOE, "model.num_layers=8", "train.global_batch_size=8")),
    Case("dense_1b_fsdp2", "llama3_2_1b", ("train.global_batch_size=16", "mesh.fsdp=2"), 2),
    Case("dense_8b_layers_fp8_fsdp2", "llama3_8b",
         (*EIGHT_B, *UNROLLED, "train.global_batch_size=16", "precision.recipe=fp8", "mesh.fsdp=2"), 2),
    Case("dense_1b_data2", "llama3_2_1b", ("train.global_batch_size=16", "mesh.fsdp=1", "mesh.data=2"), 2),
    Case("moe_olmoe_4_layers_expert2", "olmoe_1b_7b",
         (*OLMOE, "model.num_layers=4", "train.global_batch_size=16", "mesh.fsdp=1", "mesh.expert=2",
          "model.moe.buffer_factor=1.25"), 2),
    Case("dense_1b_fsdp4", "llama3_2_1b", ("train.global_batch_size=32", "mesh.fsdp=4"), 4),
    Case("moe_olmoe_8_layers_expert4", "olmoe_1b_7b",
         (*OLMOE, *EXPERT4, "compute.expert_exchange=all_gather"), 4),
    Case("moe_olmoe_8_layers_expert4_slots", "olmoe_1b_7b",
         (*OLMOE, *EXPERT4, "compute.expert_exchange=all_to_all"), 4),
    Case("moe_olmoe_8_layers_expert4_fp8", "olmoe_1b_7b",
         (*OLMOE, *EXPERT4, "compute.expert_exchange=all_gather", "precision.recipe=fp8"), 4),
)


def predict(out: Path) -> None:
    rows = []
    for case in CASES:
        config = case.config()
        axes = axis_sizes(config.mesh, case.devices)
        for name in PREDICTED_FOR:
            chip = next(chip for chip in CHIPS if chip.name == name)
            found = estimate(config, chip, axes)
            rows.append({
                "case": case.name, "chip": name, "devices": case.devices, "step_seconds": found.seconds,
                "bytes_per_chip": found.memory_bytes, "mfu": found.mfu,
                "tokens_per_second_per_chip": found.tokens_per_second_per_chip, "seconds_by_kind": dict(found.kinds),
                "exposed_collective_seconds": found.exposed_seconds, "bytes_by_kind": dict(found.memory_by_kind),
                "recipe": case.recipe, "overrides": list(case.overrides),
            })
    record = {"benchmark": "roofline_predictions", "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
              "commit": _commit(), "rows": rows}
    out.write_text(json.dumps(record, indent=1) + "\n")
    for row in rows:
        print(f"{row['case']:28s} {row['chip']:9s} x{row['devices']} {row['step_seconds'] * 1e3:8.1f} ms "
              f"{row['bytes_per_chip'] / 1e9:6.1f} GB  MFU {row['mfu']:.1%}")


def measure(out: Path, names: list[str], steps: int) -> None:
    """Each case in a process of its own: a peak of memory is a process's."""
    out.mkdir(parents=True, exist_ok=True)
    common = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "PYTHONPATH": str(ROOT)}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3").split(",")
    for case in CASES:
        if names and case.name not in names:
            continue
        command = [sys.executable, __file__, "one", "--case", case.name, "--out", str(out), "--steps", str(steps)]
        environment = common | {"CUDA_VISIBLE_DEVICES": ",".join(visible[:case.devices])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        said = (done.stdout.strip() or done.stderr.strip()).splitlines()
        print(f"{case.name}: {said[-1] if said else ''}"[:300], flush=True)
        if done.returncode:
            (out / f"{case.name}.failed.txt").write_text(done.stdout + done.stderr)


def one(case: Case, out: Path, steps: int) -> None:
    import jax

    from maxlm.parallel.mesh import make_mesh
    from maxlm.training.benchmark import measure as bench
    from maxlm.training.step import compile_step

    if jax.device_count() != case.devices:
        sys.exit(f"skipped: it is for {case.devices} devices and there are {jax.device_count()}")
    config = case.config()
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        memory = compile_step(config, mesh).memory_analysis()
    compiled = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    compiled += memory.temp_size_in_bytes
    told = {"case": case.name, "compiled_bytes_per_chip": compiled,
            "generated_code_bytes": memory.generated_code_size_in_bytes}
    (out / f"{case.name}.compiled.json").write_text(json.dumps(told) + "\n")
    record = bench(config, steps=steps)
    peaks = [device.memory_stats()["peak_bytes_in_use"] for device in jax.local_devices() if device.memory_stats()]
    record |= told | {"peak_bytes_in_use": max(peaks, default=None)}
    (out / f"{case.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['step_seconds']['median'] * 1e3:.1f} ms, compiled {compiled / 1e9:.2f} GB, peak "
          f"{(record['peak_bytes_in_use'] or 0) / 1e9:.2f} GB")


def score(records: Path, predictions: Path, out: Path | None) -> None:
    predicted = json.loads(predictions.read_text())
    rows = []
    for path in sorted(records.glob("*.json")):
        record = json.loads(path.read_text())
        if "step_seconds" not in record:
            continue
        chip = chip_of(record["device_kind"])
        of_case = [row for row in predicted["rows"] if row["case"] == record["case"] and row["chip"] == chip.name]
        assert len(of_case) == 1, f"{path}: {len(of_case)} predictions of {record['case']} on {chip.name}"
        rows.append(_compared(record, of_case[0]))
    assert rows, f"{records}: no record"
    for row in rows:
        print(f"{row['case']:28s} x{row['devices']} {row['measured_ms']:8.1f} ms, predicted {row['predicted_ms']:8.1f} "
              f"({row['time_error']:+.1%}); peak {row['measured_gb']:6.2f} GB, compiled {row['compiled_gb']:6.2f} "
              f"({row['compiled_memory_error']:+.1%}), analytic {row['analytic_gb']:6.2f} "
              f"({row['analytic_memory_error']:+.1%})")
    summary = {
        "time_within_15_percent": sum(abs(row["time_error"]) <= TIME_AIM for row in rows),
        "compiled_memory_within_5_percent": sum(abs(row["compiled_memory_error"]) <= MEMORY_AIM for row in rows),
        "analytic_memory_within_5_percent": sum(abs(row["analytic_memory_error"]) <= MEMORY_AIM for row in rows),
        "cases": len(rows),
    }
    print(json.dumps(summary))
    if out:
        record = {"benchmark": "roofline_check", "predictions_written": predicted["written"],
                  "predictions_commit": predicted["commit"], **summary, "rows": rows}
        out.write_text(json.dumps(record, indent=1) + "\n")


def _compared(record: dict, predicted: dict) -> dict:
    measured, peak = record["step_seconds"]["median"], record["peak_bytes_in_use"] or record["bytes_per_chip"]
    return {
        "case": record["case"], "device_kind": record["device_kind"], "devices": record["devices"],
        "measured_ms": measured * 1e3, "predicted_ms": predicted["step_seconds"] * 1e3,
        "time_error": predicted["step_seconds"] / measured - 1,
        "measured_gb": peak / 1e9, "compiled_gb": record["compiled_bytes_per_chip"] / 1e9,
        "compiled_memory_error": record["compiled_bytes_per_chip"] / peak - 1,
        "analytic_gb": predicted["bytes_per_chip"] / 1e9,
        "analytic_memory_error": predicted["bytes_per_chip"] / peak - 1,
        "measured_commit": record["commit"], "versions": record["versions"], "date": record["date"],
    }


def _commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return os.environ.get("MAXLM_COMMIT") or (done.stdout.strip() if done.returncode == 0 else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("predict").add_argument("--out", type=Path, required=True)
    for name in ("measure", "one"):
        verb = verbs.add_parser(name)
        verb.add_argument("--out", type=Path, required=True)
        verb.add_argument("--steps", type=int, default=15)
        verb.add_argument("--cases", nargs="*", default=[]) if name == "measure" else verb.add_argument("--case")
    verb = verbs.add_parser("score")
    verb.add_argument("--records", type=Path, required=True)
    verb.add_argument("--predictions", type=Path, required=True)
    verb.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "predict":
        predict(arguments.out)
    elif arguments.verb == "measure":
        measure(arguments.out, arguments.cases, arguments.steps)
    elif arguments.verb == "one":
        one(next(case for case in CASES if case.name == arguments.case), arguments.out, arguments.steps)
    else:
        score(arguments.records, arguments.predictions, arguments.out)


if __name__ == "__main__":
    main()
