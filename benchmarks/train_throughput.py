"""Tokens/s/chip and MFU of the real training step, for the recipes that one chip holds.

    python3 benchmarks/train_throughput.py --out benchmarks/results          (all of RECIPES)
    python3 benchmarks/train_throughput.py llama3_2_1b --documents 1 4 --set train.global_batch_size=8

Each measurement is `maxlm bench` and writes the record it would: RECIPE_CHIP_PRECISION[_packedN].json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

from maxlm.overrides import apply_overrides, load_config
from maxlm.training.benchmark import measure, summary

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("quickstart", "gpt2_124m", "llama3_2_1b")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--documents", nargs="+", type=int, default=[1], help="documents packed into a row")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="folder for the records")
    arguments = parser.parse_args()
    for recipe in arguments.recipes:
        config = apply_overrides(load_config(str(ROOT / "configs" / f"{recipe}.py")), arguments.overrides)
        for documents in arguments.documents:
            record = {"recipe": recipe} | measure(config, steps=arguments.steps, documents=documents)
            print(f"{recipe}, {documents} document(s) a row: {summary(record)}", flush=True)
            if arguments.out:
                arguments.out.mkdir(parents=True, exist_ok=True)
                (arguments.out / f"{_name(record)}.json").write_text(json.dumps(record, indent=2) + "\n")


def _name(record: dict) -> str:
    chip = record["device_kind"].lower().removeprefix("nvidia ").replace(" ", "_")
    packed = f"_packed{record['documents_per_row']}" if record["documents_per_row"] > 1 else ""
    return f"{record['recipe']}_{chip}_{record['config']['precision']['recipe']}{packed}"


if __name__ == "__main__":
    main()
