"""Tokens a second of the training reader, on synthetic prepared data: no accelerator, no model.

    python benchmarks/data_loading.py --json benchmarks/results/data_loading_cpu.json

Prepares about 16 MB of random words as bytes, then times `TrainingData.iterate` after a warm-up: `--repeats` windows of
`--batches` batches, their median and range. The aim is 2,000,000 tokens/s on 2 cores at sequence length 2048.
Takes half a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from maxlm.config import DatasetConfig  # noqa: E402
from maxlm.data.loader import TrainingData  # noqa: E402
from maxlm.data.prepare import prepare  # noqa: E402
from maxlm.data.workers import usable_cores  # noqa: E402


def write_corpus(folder: Path, megabytes: float, seed: int = 0) -> None:
    """Documents of 100 to 20,000 random words, one a file."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(2000)]
    written = number = 0
    while written < megabytes * 1e6:
        text = " ".join(draw.choices(words, k=int(100 * 200 ** draw.random())))
        (folder / f"{number:06d}.txt").write_text(text)
        written += len(text)
        number += 1


def measure(data: TrainingData, args: argparse.Namespace) -> list[float]:
    """Tokens a second of each window."""
    rates = []
    options = {"read_threads": args.read_threads, "worker_processes": args.worker_processes}
    with data.iterate(0, **options, prefetch_batches=args.prefetch_batches) as stream:
        for _ in range(2 * args.prefetch_batches):  # what was read ahead must not count as speed
            next(stream)
        for _ in range(args.repeats):
            began = time.perf_counter()
            for _ in range(args.batches):
                next(stream)
            rates.append(args.batches * args.batch_size * args.seq_len / (time.perf_counter() - began))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=16)
    parser.add_argument("--read-threads", type=int, default=4)
    parser.add_argument("--worker-processes", type=int, default=0)
    parser.add_argument("--prefetch-batches", type=int, default=8)
    parser.add_argument("--json", help="file to write the record to")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        corpus, out = Path(temporary, "corpus"), os.path.join(temporary, "prepared")
        corpus.mkdir()
        write_corpus(corpus, args.megabytes)
        began = time.perf_counter()
        manifest = prepare([str(corpus)], out=out, tokenizer="bytes", seq_len=args.seq_len, show_progress=False)
        prepare_seconds = time.perf_counter() - began
        data = TrainingData([DatasetConfig(out)], seq_len=args.seq_len, global_batch_size=args.batch_size, seed=0)
        rates = measure(data, args)

    record = {
        "benchmark": "data_loading",
        "tokens_per_second": {"median": statistics.median(rates), "min": min(rates), "max": max(rates)},
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
        "corpus": {"rows": manifest.train.rows, "padding_fraction": manifest.train.padding_fraction,
                   "prepare_megabytes_per_second": args.megabytes / prepare_seconds},
        "machine": {"cores": usable_cores(), "processor": platform.machine(), "system": platform.system()},
        "versions": {"python": platform.python_version(),
                     **{name: version(name) for name in ("grain", "array-record", "numpy")}},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    print(f"{record['tokens_per_second']['median']:,.0f} tokens/s "
          f"({min(rates):,.0f} to {max(rates):,.0f}, {args.repeats} windows of {args.batches} batches)")
    if args.json:
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
