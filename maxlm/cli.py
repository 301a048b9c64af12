"""`maxlm VERB ...`: reads the command line, calls the code that does it, turns mistakes into one line.

Exit codes: 0 done (or stopped on request and saved), 2 a user's mistake, 3 a run stopped for its own safety,
75 another process of the run is gone (start all again), 130 interrupted before there was anything to save.
Each verb imports what it needs when it runs, so that `--help` and a misspelt key answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from maxlm import __version__
from maxlm.parallel.distributed import (
    CRASHED,
    PEER_LOST,
    USER_MISTAKE,
    PeerError,
    leave,
    lost_peer,
    processes,
    together,
)
from maxlm.planning.verbs import add_verbs as add_planning_verbs
from maxlm.planning.verbs import check_writable
from maxlm.scaling.verbs import add_verbs as add_scaling_verbs
from maxlm.schema import ConfigError

UNSAFE, INTERRUPTED = 3, 130


class _Parser(argparse.ArgumentParser):
    """argparse, with its complaint on one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(USER_MISTAKE)


def run() -> NoReturn:
    """The `maxlm` command: `main` in a process that keeps large memory in huge pages."""
    use_huge_pages()
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = CRASHED
    if code:
        leave(code)
    sys.exit(code)


def use_huge_pages() -> None:
    """Starts this process's program again (same process id) with malloc in huge pages, once, on Linux.

    XLA's CPU backend takes and returns all of a step's memory each step. In 4 kB pages the kernel spent a fifth of the
    quickstart's time on that (76,000 page faults a step). glibc reads the setting only when a program starts.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        with contextlib.suppress(OSError):  # then it is only slower
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return arguments.verb(arguments) or 0
    except ConfigError as mistake:
        return _complain(mistake, USER_MISTAKE)
    except OSError as error:  # a path that the user named and the system refused
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", USER_MISTAKE)
    except PeerError as error:
        return _complain(error, error.exit_code)
    except (RuntimeError, ValueError) as error:  # told apart by name, so that no verb imports what it does not use
        kind = type(error).__name__
        if lost := lost_peer(error):
            return _complain(f"another process of this run is gone ({lost}): see what it says; the same command on "
                             "all of them goes on from the last checkpoint", PEER_LOST)
        if kind == "CheckpointError":
            return _complain(error, USER_MISTAKE)
        if kind in ("IntegrityError", "RunStopped"):
            return _complain(error, UNSAFE)
        if kind == "WorkerError":  # of a traceback the last line says what happened
            return _complain(str(error).strip().splitlines()[-1], USER_MISTAKE)
        if "Corrupted" in str(error):  # ArrayRecord's word for a record whose checksum is wrong
            return _complain(
                "data.path: a token shard is damaged (a record fails its checksum): prepare the folder again", UNSAFE
            )
        if "RESOURCE_EXHAUSTED" in str(error):
            return _complain(
                "out of device memory (RESOURCE_EXHAUSTED): lower train.global_batch_size or raise "
                "train.grad_accumulation, set remat.policy='full', or use more devices along mesh.fsdp", USER_MISTAKE,
            )
        raise
    except KeyboardInterrupt:
        return _complain("interrupted; nothing is lost, the same command starts again", INTERRUPTED)


def _complain(message: object, code: int) -> int:
    print(f"maxlm: {message}", file=sys.stderr, flush=True)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="maxlm", description="Pretraining of decoder language models on JAX.")
    parser.add_argument("--version", action="version", version=f"maxlm {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=_Parser)

    train = _verb(verbs, "train", _train, "train a config, or go on training it")
    train.add_argument("config", help="a Python file with config() -> RunConfig, such as configs/quickstart.py")
    train.add_argument("--run-dir", required=True, type=Path, help="where everything of this run is written")
    train.add_argument("--strict", action="store_true",
                       help="refuse (exit 3) where the newest checkpoint is damaged, instead of setting it aside")
    _add_overrides(train)
    _add_processes(train)

    packed = _verb(verbs, "packed", _packed, "train configs that differ in seed and learning rate in one program")
    packed.add_argument("configs", nargs="+", metavar="CONFIG", type=Path)
    packed.add_argument("--out", required=True, type=Path, help="folder for a run directory each, named as its config")

    evaluate = _verb(verbs, "eval", _eval, "held-out loss, perplexity and bits per byte, as JSON")
    _add_checkpoint(evaluate)
    evaluate.add_argument("--data", help="a prepared folder (default: the run's own)")
    evaluate.add_argument("--batches", type=int, default=0, help="global batches to evaluate (default: all)")

    generate = _verb(verbs, "generate", _generate, "sample text from a run")
    _add_checkpoint(generate)
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--tokens", type=int, default=128, help="tokens to sample (default: 128)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    generate.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest tokens (0: all)")
    generate.add_argument("--top-p", type=float, default=0.95, help="sample in this share of probability")
    generate.add_argument("--seed", type=int, default=0, help="0 or more")

    bench = _verb(verbs, "bench", _bench, "time the training step of a config")
    bench.add_argument("config")
    bench.add_argument("--json", type=Path, help="also write the record to this file")
    bench.add_argument("--steps", type=int, default=20)
    bench.add_argument("--warmup", type=int, default=3)
    bench.add_argument("--documents", type=int, default=1, help="documents packed into each row (default: 1)")
    _add_overrides(bench)

    replay = _verb(verbs, "replay", _replay, "make a step again and compare it with the ledger")
    replay.add_argument("--run-dir", required=True, type=Path)
    replay.add_argument("--step", required=True, type=int, help="a step that the run has finished")
    replay.add_argument("--no-shard-hashes", action="store_true",
                        help="do not read the shards of the step's batch whole to compare them with their manifest")

    status = _verb(verbs, "status", _status, "how a run stands, and where its time went")
    status.add_argument("--run-dir", required=True, type=Path)
    status.add_argument("--json", action="store_true", help="as one JSON object")

    _add_data(verbs)
    group = lambda name, text: functools.partial(_verb, verbs.add_parser(name, help=text, description=text)  # noqa: E731
                                                 .add_subparsers(required=True, metavar="VERB", parser_class=_Parser))
    add_scaling_verbs(functools.partial(_verb, verbs), group, _on_cpu)
    add_planning_verbs(functools.partial(_verb, verbs), _add_overrides)
    _add_checkpoint_verbs(verbs)
    return parser


def _verb(verbs, name, function, text) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text, description=text)
    parser.set_defaults(verb=function)
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="change a field of the config, such as model.num_layers=4; repeatable")


def _add_processes(parser: argparse.ArgumentParser) -> None:
    several = parser.add_argument_group("several processes", "All three, or none: then Slurm, Open MPI and TPU slices "
                                        "are detected, and anything else is one process.")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens, on a free port")
    several.add_argument("--num-processes", type=int, metavar="N")
    several.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0 to N - 1")


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", required=True, type=Path)
    parser.add_argument("--step", type=int, help="a checkpoint's step (default: the newest)")


def _add_data(verbs) -> None:
    data = verbs.add_parser("data", help="prepare text for training", description="prepare text for training")
    prepare = _verb(data.add_subparsers(required=True, metavar="VERB", parser_class=_Parser), "prepare", _prepare,
                    "turn text, JSONL or Parquet into packed token shards")
    prepare.add_argument("inputs", nargs="*", metavar="INPUT", help="files, folders or archives of text")
    prepare.add_argument("--source", choices=("python-stdlib", "installed-packages"), help="a corpus already here")
    prepare.add_argument("--out", required=True)
    prepare.add_argument("--tokenizer", required=True, help="'bytes', 'bpe:SIZE' (trained here), or a tokenizer.json")
    prepare.add_argument("--seq-len", required=True, type=int, help="tokens a row, as train.seq_len will say")
    prepare.add_argument("--heldout-fraction", type=float, default=0.02)
    prepare.add_argument("--text-field", default="text", help="the field or column of JSONL and Parquet")
    prepare.add_argument("--workers", type=int, help="processes (default: one a core)")


def _add_checkpoint_verbs(verbs) -> None:
    checkpoint = verbs.add_parser("checkpoint", help="look at checkpoints", description="look at checkpoints")
    inner = checkpoint.add_subparsers(required=True, metavar="VERB", parser_class=_Parser)
    for name, function, text in (
        ("list", _checkpoint_list, "what is there, and whether it is complete"),
        ("verify", _checkpoint_verify, "reads all of each and says which are intact; exit 3 where one is not"),
        ("digest", _checkpoint_digest, "SHA-256 of the newest complete checkpoint's parameters"),
    ):
        parser = _verb(inner, name, function, text)
        parser.add_argument("dir", help="a run directory, its checkpoints folder, or their URL")


def _start_jax() -> None:
    """Compiled programs are kept between runs, in JAX's own cache folder or in the user's."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "maxlm" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _train(arguments: argparse.Namespace) -> int:
    from maxlm.overrides import apply_overrides, load_config
    from maxlm.resilience import Goodput, process_started

    goodput = Goodput(arguments.run_dir, started=process_started())
    with processes(arguments.coordinator, arguments.num_processes, arguments.process_id) as several:
        if several:
            _start_jax()  # before they first agree, which compiles
        with together("reading the config"):
            config = apply_overrides(load_config(arguments.config), arguments.overrides)
        _start_jax()
        from maxlm.training.loop import train
        from maxlm.training.report import finish

        outcome = train(config, arguments.run_dir, strict=arguments.strict, goodput=goodput)
        if outcome.evaluation is not None:
            finish(config, arguments.run_dir, outcome)
        goodput.end()
    return 0


def _packed(arguments: argparse.Namespace) -> int:
    from maxlm.overrides import load_config

    configs = [load_config(path) for path in arguments.configs]
    _start_jax()
    from maxlm.training.packed_loop import train_packed

    train_packed(configs, [arguments.out / path.stem for path in arguments.configs])
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    _start_jax()
    from maxlm.training.saved_run import evaluate

    print(json.dumps(evaluate(arguments.run_dir, arguments.step, arguments.data, arguments.batches)))
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    _start_jax()
    from maxlm.training.saved_run import generate

    print(generate(
        arguments.run_dir, arguments.step, arguments.prompt, num_tokens=arguments.tokens, seed=arguments.seed,
        temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p,
    ))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from maxlm.overrides import apply_overrides, load_config

    config = apply_overrides(load_config(arguments.config), arguments.overrides)
    if arguments.steps < 1 or arguments.warmup < 1:
        raise ConfigError("--steps and --warmup must be 1 or more")
    if not 1 <= arguments.documents <= config.train.seq_len:
        raise ConfigError(f"--documents={arguments.documents} must be from 1 to train.seq_len={config.train.seq_len}")
    if arguments.json:
        check_writable(arguments.json)
    _start_jax()
    from maxlm.training.benchmark import measure, summary

    record = {"recipe": Path(arguments.config).stem} | measure(
        config, steps=arguments.steps, warmup=arguments.warmup, documents=arguments.documents
    )
    print(summary(record), file=sys.stderr)
    print(json.dumps(record))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    _start_jax()
    from maxlm.training.replay import replay

    result = replay(arguments.run_dir, arguments.step, hash_shards=not arguments.no_shard_hashes)
    print(json.dumps(result))
    if result["agrees"]:
        return 0
    return _complain(f"{result['cause']} differs at step {result['at_step']}: {result['detail']}", UNSAFE)


def _status(arguments: argparse.Namespace) -> int:
    from maxlm.resilience.status import status, table

    found = status(arguments.run_dir)
    print(json.dumps(found) if arguments.json else table(found))
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from maxlm.data.prepare import prepare

    manifest = prepare(
        arguments.inputs, source=arguments.source, out=arguments.out, tokenizer=arguments.tokenizer,
        seq_len=arguments.seq_len, heldout_fraction=arguments.heldout_fraction, workers=arguments.workers,
        text_field=arguments.text_field,
    )
    print(manifest.summary())
    return 0


def _on_cpu(function):
    """A verb of float64 on small arrays: an accelerator would only be in the way."""
    def verb(arguments: argparse.Namespace) -> int | None:
        import jax

        jax.config.update("jax_platforms", "cpu")
        _start_jax()
        return function(arguments)

    return verb


def _checkpoint_list(arguments: argparse.Namespace) -> int:
    from datetime import datetime

    from maxlm.checkpoint import list_checkpoints

    rows = list_checkpoints(_checkpoints_folder(arguments.dir))
    print(f"{'step':>10}  {'megabytes':>10}  {'complete':8}  written")
    for row in rows:
        when = datetime.fromtimestamp(row.time).isoformat(" ", "seconds")
        print(f"{row.step:>10}  {row.bytes / 1e6:>10.1f}  {'yes' if row.complete else 'no':8}  {when}")
    return 0


def _checkpoint_verify(arguments: argparse.Namespace) -> int:
    from maxlm.checkpoint import verify

    found = verify(_checkpoints_folder(arguments.dir))
    for step, damage in found:
        print(f"{step:>10}  {'ok' if damage is None else 'damaged: ' + damage}")
    damaged = [str(step) for step, damage in found if damage is not None]
    if damaged:
        return _complain(f"{len(damaged)} of {len(found)} checkpoints are damaged: {', '.join(damaged)}", UNSAFE)
    if not found:
        raise ConfigError(f"{arguments.dir}: no checkpoint to verify; give a run directory or its checkpoints folder")
    return 0


def _checkpoint_digest(arguments: argparse.Namespace) -> int:
    from maxlm.checkpoint import tree_digest

    print(tree_digest(_checkpoints_folder(arguments.dir)))
    return 0


def _checkpoints_folder(directory: str) -> str | Path:
    folder = Path(directory)
    if "://" in directory or folder.is_file():  # such a file holds the URL
        return directory
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give a run directory or its checkpoints folder")
    return folder / "checkpoints" if (folder / "checkpoints").exists() else folder
