"""A tiny byte-level corpus, a config file for it, and runs of the real command line, for the tests of this folder."""

from __future__ import annotations

import json
import os
import pathlib
import random
import subprocess
import sys

import maxlm
from maxlm.cli import main
from maxlm.data.prepare import prepare

SEQ_LEN, STEPS = 32, 6
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards box and pack".split()
ONE_DEVICE = " ".join(f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f)
FAST = ("logging.tensorboard=false",)

CONFIG = f'''
from maxlm.config import *


def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(num_layers=1, hidden_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32,
                          vocab_size=264, layer_pattern=("local",), sliding_window=8),
        data=DataConfig(path="DATA", read_threads=1, prefetch_batches=2),
        train=TrainConfig(num_steps={STEPS}, global_batch_size=8, seq_len={SEQ_LEN}),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        schedule=ScheduleConfig(warmup_steps=2),
        precision=PrecisionConfig(recipe="float32"),
        checkpoint=CheckpointConfig(every_steps=2),
        eval=EvalConfig(every_steps=3, num_batches=0),
        logging=LoggingConfig(every_steps=1, sample_prompt="the "),
    )
'''


def write_texts(folder: pathlib.Path, count: int = 40, seed: int = 0) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for number in range(count):
        words = " ".join(draw.choices(WORDS, k=draw.randint(10, 60)))
        (folder / f"{number:03d}.txt").write_text(f"{number}: {words}\n")
    return folder


def prepared(folder: pathlib.Path, seed: int = 0, **changes) -> pathlib.Path:
    """A prepared folder of the corpus that `seed` draws."""
    texts = write_texts(folder.with_name(folder.name + "-text"), seed=seed)
    settings = dict(tokenizer="bytes", seq_len=SEQ_LEN, heldout_fraction=0.2, workers=1) | changes
    prepare([str(texts)], out=str(folder), show_progress=False, **settings)
    return folder


def write_config(path: pathlib.Path, data: pathlib.Path) -> pathlib.Path:
    path.write_text(CONFIG.replace('"DATA"', repr(str(data))))
    return path


def arguments(config: pathlib.Path, run: pathlib.Path, *overrides: str) -> list[str]:
    sets = [word for override in (*FAST, *overrides) for word in ("--set", override)]
    return ["train", str(config), "--run-dir", str(run), *sets]


def train(config: pathlib.Path, run: pathlib.Path, *overrides: str) -> int:
    return main(arguments(config, run, *overrides))


def start(words: list[str], xla_flags: str | None = None,
          program: tuple[str, ...] = ("maxlm",)) -> subprocess.Popen[str]:
    """`maxlm WORDS` as its own process, on one device where `xla_flags` is ONE_DEVICE. program: another module to run,
    and words that go before."""
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(maxlm.__file__).parents[1])}
    if xla_flags is not None:
        environment["XLA_FLAGS"] = xla_flags
    return subprocess.Popen([sys.executable, "-m", *program, *map(str, words)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=environment)


def command(words: list[str], xla_flags: str | None = None) -> tuple[int, str, str]:
    """Runs `maxlm WORDS` to its end: (exit code, stdout, stderr)."""
    process = start(words, xla_flags)
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


def rows_of(run: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


CLOCKED = {"time", "step_seconds", "tokens_per_second_per_chip", "mfu"}


def timeless(run: pathlib.Path) -> list[dict]:
    """The rows that say what was trained, without what the clock says and without the stops."""
    rows = [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows_of(run)]
    return [row for row in rows if "preempted" not in row]
