"""The verbs `compile` and `plan`: their options, and what they call. Nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from maxlm.schema import ConfigError, require

Verb = Callable[..., argparse.ArgumentParser]


def add_verbs(verb: Verb, add_overrides: Callable[[argparse.ArgumentParser], None]) -> None:
    """`verb(name, function, help)` makes one; `add_overrides` gives it --set."""
    parser = verb("compile", compile_step, "compile a config's step for a TPU slice or the devices here, and judge it")
    _common(parser, add_overrides)
    parser.add_argument("--codegen", action="store_true", help="also generate machine code, which takes ten times as "
                        "long: its bytes are counted, and a kernel that the chip cannot hold is found")
    parser.add_argument("--fresh", action="store_true", help="compile again what the cache holds")

    parser = verb("plan", plan_step, "search mesh, batch a chip and remat for a TPU slice, and compile the best")
    _common(parser, add_overrides)
    parser.add_argument("--confirm", type=int, default=4, metavar="N", help="layouts that fit to compile (default: 4)")
    parser.add_argument("--jobs", type=int, help="compiles at a time (default: one a core, 4 at most)")


def _common(parser: argparse.ArgumentParser, add_overrides: Callable[[argparse.ArgumentParser], None]) -> None:
    parser.add_argument("config", help="a Python file with config() -> RunConfig")
    parser.add_argument("--topology", required=True, metavar="T",
                        help="chip and shape of a slice: v4:2x2x2, v5e:4x4, v5p:4x4x8, v6e:16x16, 7x:2x2x2; "
                             "or local (gpu): the devices of this machine")
    parser.add_argument("--slices", type=int, default=1, help="slices of that topology, mesh.data over the network")
    parser.add_argument("--json", type=Path, help="file to write the record to")
    add_overrides(parser)


def compile_step(arguments: argparse.Namespace) -> None:
    """Prints the report and writes it as JSON. Raises ConfigError for a user's mistake and a step that is refused."""
    from maxlm.overrides import apply_overrides, load_config
    from maxlm.planning.report import compile_report, write_atomically
    from maxlm.planning.table import print_report
    from maxlm.planning.topology import find_target

    target = find_target(arguments.topology, arguments.slices)
    config = apply_overrides(load_config(arguments.config), arguments.overrides)
    if arguments.json:
        check_writable(arguments.json)
    record = compile_report(config, target, codegen=arguments.codegen, fresh=arguments.fresh)
    print_report({"recipe": Path(arguments.config).stem} | record)
    if arguments.json:
        write_atomically(arguments.json, {"recipe": Path(arguments.config).stem} | record)


def plan_step(arguments: argparse.Namespace) -> None:
    """Prints the ranked table and writes it as JSON. Raises ConfigError where nothing can fit, saying what would."""
    from maxlm.overrides import apply_overrides, load_config
    from maxlm.planning.plan import plan, ranked
    from maxlm.planning.report import write_atomically
    from maxlm.planning.table import print_plan
    from maxlm.planning.topology import find_target

    require(arguments.confirm >= 1, f"--confirm={arguments.confirm} must be 1 or more")
    require(arguments.jobs is None or arguments.jobs >= 1, f"--jobs={arguments.jobs} must be 1 or more")
    target = find_target(arguments.topology, arguments.slices)
    config = apply_overrides(load_config(arguments.config), arguments.overrides)
    if arguments.json:
        check_writable(arguments.json)
    tell = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    rows = ranked(plan(config, target, confirm=arguments.confirm, jobs=arguments.jobs, tell=tell), config)
    print_plan(rows)
    if arguments.json:
        write_atomically(arguments.json, {"recipe": Path(arguments.config).stem, "topology": target.name,
                                          "slices": target.slices, "layouts": rows})


def check_writable(path: Path) -> None:
    """Before minutes of work, that its result can be written to `path`. Raises ConfigError."""
    require(path.parent.is_dir(), f"--json {path}: there is no folder {path.parent}; make it first")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--json {path} cannot be written: choose another file")
