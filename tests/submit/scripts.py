"""The submission scripts, run as a user runs them, and schedulers' tools that only write down what they were given."""

from __future__ import annotations

import importlib.util
import pathlib
import shlex
import sys

ROOT = pathlib.Path(__file__).parents[2]
DATA = ("--set", "data.path=/runs/data/web")
TPU = ("--topology", "v5p:4x4x8")
GPU = ("--topology", "h100:4x8")
GKE = ("--image", "registry/maxlm:1", "--claim", "runs:/runs")


def run(name: str, words: list[str], monkeypatch) -> int:
    """Exit code of `python3 scripts/NAME.py WORDS`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    monkeypatch.chdir(ROOT)
    return module.script(module.__doc__, module.add_options, module.submit)


def train(*words: str, config: str = "configs/llama3_70b.py") -> list[str]:
    return [config, "--run-dir", "/runs/70b", *DATA, *words]


def fake_tool(folder: pathlib.Path, name: str, says: str = "", code: int = 0) -> pathlib.Path:
    """A tool NAME in `folder` that keeps its words and its standard input in the file that is returned."""
    heard = folder / f"{name}.heard"
    tool = folder / name
    tool.write_text(f"""#!/bin/bash
echo "$@" > {heard}
for word in "$@"; do file=${{word##*=}}; [ -f "$file" ] && cat "$file" >> {heard}; done
cat >> {heard}
printf %s {shlex.quote(says)}
exit {code}
""")
    tool.chmod(0o755)
    return heard
