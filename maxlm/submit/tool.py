"""Calling a scheduler's own tool, and the frame of every script that submits."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from maxlm.schema import ConfigError, require

USER_MISTAKE = 2


def call(words: Sequence[str], text: str = "") -> str:
    """Gives `text` to a tool's standard input; what it says on standard output. Raises ConfigError where there is no
    such tool, or with its own complaint where it fails."""
    tool = words[0]
    require(shutil.which(tool) is not None, f"{tool} is not on this machine: submit where it is, or see with --dry-run "
                                            "what would be submitted")
    ended = subprocess.run(words, input=text, capture_output=True, text=True)
    lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
    said = lines[-1] if lines else f"exit code {ended.returncode}"
    require(ended.returncode == 0, f"{shlex.join(words[:3])} failed: {said}")
    return ended.stdout


class _Parser(argparse.ArgumentParser):
    """argparse, with its complaint on one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(USER_MISTAKE)


def script(description: str | None, add_options: Callable[[argparse.ArgumentParser], None],
           submit: Callable[[argparse.Namespace], None]) -> int:
    """Runs a submission script: its options, then `submit`. Returns the exit code; a mistake is one line and 2."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    arguments = parser.parse_args()
    try:
        submit(arguments)
    except ConfigError as mistake:
        print(f"{parser.prog}: {mistake}", file=sys.stderr)
        return USER_MISTAKE
    except OSError as error:
        print(f"{parser.prog}: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return USER_MISTAKE
    return 0
