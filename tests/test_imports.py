"""Imports run one way. Read from the source, so that a cycle hidden inside a function counts too."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "maxlm"
MAX_LINES, MAX_FUNCTION_LINES = 400, 60

# What each part of maxlm may import from the rest of it. A part may always import itself.
CONFIG = {"schema", "config"}
ARITHMETIC = CONFIG | {"hardware", "flops", "topology"}
KERNELS = ARITHMETIC | {"parallel", "numerics", "kernels"}
MODEL = KERNELS | {"model"}
TRAINING = MODEL | {"data", "checkpoint", "resilience", "training"}
MAY_IMPORT = {
    "__init__": set(),
    "schema": set(),
    "config": {"schema"},
    "overrides": CONFIG,
    "hardware": set(),
    "topology": {"schema"},
    "flops": CONFIG,
    "parallel": ARITHMETIC,
    "numerics": ARITHMETIC | {"parallel"},
    "kernels": KERNELS,
    "model": MODEL,
    # Leaves, which training/loop.py uses: they see arrays and configs, never the model or the step.
    "data": ARITHMETIC | {"parallel"},
    "checkpoint": ARITHMETIC | {"parallel", "data"},
    "resilience": ARITHMETIC | {"parallel", "checkpoint"},
    "training": TRAINING,
    "submit": ARITHMETIC | {"overrides", "parallel"},
    "scaling": ARITHMETIC | {"overrides", "submit"},
    "planning": MODEL | {"training", "overrides"},
    "interop": MODEL | {"checkpoint", "data"},
    "cli": TRAINING | {"overrides", "planning", "scaling", "interop"},
    "__main__": {"cli"},
}
NOT_IN_PLANNING = "maxlm.training.loop"
NO_JAX = ("schema", "config", "overrides", "hardware", "topology", "flops")


def imported(source, module):
    """Every module that the source of `module` (a dotted name) imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".")[: -node.level]
                base = ".".join([*parent, base] if base else parent)
            names.add(base)
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def read_graph(package):
    """{'maxlm.model.block': {'jax', 'maxlm.config', ...}, ...}"""
    graph = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        graph[".".join(parts)] = imported(path.read_text(encoding="utf-8"), ".".join(parts))
    return graph


def part_of(module):
    """'maxlm.model.block' -> 'model'; None for what is not ours; 'maxlm' itself is '__init__'."""
    names = module.split(".")
    if names[0] != "maxlm":
        return None
    return names[1] if len(names) > 1 and names[1] in MAY_IMPORT else "__init__"


def violations(graph):
    """One line for each import that breaks a rule."""
    found = []
    for module, targets in graph.items():
        own = module.split(".")[1]
        if own not in MAY_IMPORT:
            found.append(f"{module}: {own} has no place in the order: give it one in MAY_IMPORT")
            continue
        for target in sorted(targets):
            part = part_of(target)
            if part not in (None, "__init__", own) and part not in MAY_IMPORT[own]:
                found.append(f"{module} imports {target}")
            if own == "planning" and target.startswith(NOT_IN_PLANNING):
                found.append(f"{module} imports {target}")
            if target == "jax._src" or target.startswith("jax._src."):
                found.append(f"{module} imports {target}: private to JAX")
            if own in NO_JAX and target.split(".")[0] not in sys.stdlib_module_names | {"maxlm"}:
                found.append(f"{module} imports {target}: it is standard library only")
    return found


def test_imports_run_one_way():
    graph = read_graph(PACKAGE)
    assert "maxlm.model.transformer" in graph and "maxlm.parallel.sharding" in graph["maxlm.model.transformer"]
    assert violations(graph) == []


def test_the_order_itself_has_no_cycle():
    waiting = {part: below - {part} for part, below in MAY_IMPORT.items()}
    while waiting:
        free = {part for part, below in waiting.items() if not below & waiting.keys()}
        assert free, f"these may import each other: {sorted(waiting)}"
        waiting = {part: below for part, below in waiting.items() if part not in free}


@pytest.mark.parametrize(
    "module, source, message",
    [
        ("maxlm.model.block", "from maxlm.training.step import train_step", "imports maxlm.training.step"),
        ("maxlm.model.block", "def f():\n    import maxlm.cli", "imports maxlm.cli"),
        ("maxlm.model.block", "from ..training import loop", "imports maxlm.training"),
        ("maxlm.model.block", "from maxlm import training", "imports maxlm.training"),
        ("maxlm.scaling.fit", "from maxlm.training.metrics import read", "imports maxlm.training.metrics"),
        ("maxlm.planning.fit", "from maxlm.training import loop", "imports maxlm.training.loop"),
        ("maxlm.data.loader", "from maxlm.model import Transformer", "imports maxlm.model"),
        ("maxlm.config", "import jax", "standard library only"),
        ("maxlm.flops", "import numpy as np", "standard library only"),
        ("maxlm.model.block", "from jax._src import core", "private to JAX"),
        ("maxlm.helpers", "import math", "has no place in the order"),
    ],
)
def test_a_wrong_import_is_found(module, source, message):
    graph = {**read_graph(PACKAGE), module: imported(source, module)}
    assert any(message in line for line in violations(graph))


def test_files_and_functions_are_short():
    too_long = []
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if len(source.splitlines()) >= MAX_LINES:
            too_long.append(str(path))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES:
                too_long.append(f"{path}:{node.lineno} {node.name}")
    assert too_long == []
    assert not list(PACKAGE.rglob("utils.py")), "a module is named after what it does"


def test_the_command_line_answers_without_starting_jax():
    """`maxlm --help` and a misspelt key must be instant: none of the heavy libraries is loaded for them."""
    heavy = ("jax", "flax", "grain", "orbax", "numpy", "pyarrow", "matplotlib", "rich", "tokenizers")
    code = f"import sys, maxlm.cli, maxlm.overrides; print(*[m for m in {heavy} if m in sys.modules])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=60)
    assert (child.returncode, child.stdout.strip()) == (0, ""), child.stderr + child.stdout
