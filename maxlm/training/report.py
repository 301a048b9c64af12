"""What a finished run leaves for its reader: how well it did, and a sample of what it learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from maxlm.config import RunConfig
from maxlm.data.folders import datasets_of
from maxlm.data.manifest import load_manifest
from maxlm.parallel.distributed import together
from maxlm.training.loop import DONE_FILE, Outcome
from maxlm.training.saved_run import DATA, continue_text, on_host

SAMPLE_FILE = "sample.txt"
SAMPLE = {"num_tokens": 160, "temperature": 0.6}


def finish(config: RunConfig, run_dir: Path, outcome: Outcome) -> None:
    """Prints the held-out result beside what general compressors reach on the same text; with
    `logging.sample_prompt`, prints a sample and writes it to RUN_DIR/sample.txt. Last, marks the run as done.

    Every process calls it; process 0 prints and writes."""
    params = on_host(outcome.state.params) if config.logging.sample_prompt else None
    with together("reporting"):
        if jax.process_index() == 0:
            _report(config, run_dir, outcome, params)


def _report(config: RunConfig, run_dir: Path, outcome: Outcome, params: Any) -> None:
    result = outcome.evaluation
    trained = f"after {outcome.step} steps, {outcome.tokens:,} tokens"
    if result.tokens:
        print(f"\nheld-out text {trained}: loss {result.loss:.4f} nats a token")
        print(f"  {'this model':12} {result.bits_per_byte:.3f} bits a byte")
        _print_compressors(config, run_dir)
    else:
        print(f"\n{trained}: no held-out result, because the prepared data holds out no text")
    if params is not None:
        text = continue_text(params, run_dir, config.logging.sample_prompt, **SAMPLE)
        (run_dir / SAMPLE_FILE).write_text(text + "\n")
        print(f"\nsample ({run_dir.name}/{SAMPLE_FILE}):\n{text}\n")
    (run_dir / DONE_FILE).write_text(f"{outcome.step}\n")


def _print_compressors(config: RunConfig, run_dir: Path) -> None:
    folders = datasets_of(config.data, config.train.seq_len, run_dir / DATA)
    if len(folders) > 1 or config.eval.num_batches:  # then theirs are not the same bytes
        return
    heldout = load_manifest(folders[0].path).heldout
    for name, bits in (("gzip -9", heldout.gzip9_bits_per_byte), ("xz -9", heldout.xz9_bits_per_byte)):
        print(f"  {name:12} " + ("not available" if bits is None else f"{bits:.3f} bits a byte"))
