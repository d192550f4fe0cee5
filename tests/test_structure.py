"""How the code is built: few rooms, short files and functions, and nothing of other libraries but their public names.

`lint-imports` keeps the order of the rooms; this keeps the rest, over the syntax tree.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "litdistill"
FILES = sorted(p for folder in ("src", "scripts", "examples") for p in (ROOT / folder).rglob("*.py"))

# What is written to foreign private names nonetheless, by file and expression, and why. Five lines at most.
ALLOWED: dict[tuple[str, str], str] = {
    (
        "src/litdistill/data/shards.py",
        "serializers._SERIALIZERS",
    ): "litdata has no public list of the serializers to refuse",
    ("src/litdistill/data/streaming.py", "batches._shutdown_workers"): (
        "after one worker's death torch raises again at any later time, unless all are ended here"
    ),
}

# Names of other libraries that they look for on objects of ours: setting one does not make it ours.
FOREIGN = {"_ddp_params_and_buffers_to_ignore", "_parameters", "_buffers", "_modules", "_skip_backward"}
# Documented, in spite of their underscore, which keeps them apart from the fields of a named tuple.
DOCUMENTED = {"_replace", "_asdict", "_fields", "_make", "_field_defaults"}
# Lightning's own counters and loops, public by name only.
LOOPS = {"fit_loop", "epoch_loop", "batch_progress", "epoch_progress", "optim_progress"}
CHANGES = {"append", "extend", "insert", "remove", "pop", "clear", "sort", "reverse"}


def is_private(name: str) -> bool:
    dunder = name.startswith("__") and name.endswith("__")
    return name.startswith("_") and not dunder and name.strip("_") != "" and name not in DOCUMENTED


def own_names(trees: list[ast.Module]) -> set[str]:
    """All that is defined or assigned in these modules: functions, classes, variables, arguments, attributes of `self`."""
    found: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            found.add(node.attr)
    return found - FOREIGN


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _chain(node: ast.expr) -> list[str]:
    """The names of `a.b[0].c` from the left, as far as they are names."""
    if isinstance(node, (ast.Subscript, ast.Starred)):
        return _chain(node.value)
    if isinstance(node, ast.Attribute):
        return [*_chain(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else []


def _of_a_trainer(node: ast.expr) -> bool:
    """Whether this is an attribute of a live Trainer: `trainer.x` or `anything.trainer.x`, but not a config's."""
    names = _chain(node)
    return "trainer" in names[:-1] and not {"cfg", "config", "recipe"} & set(names[:1])


def violations(tree: ast.Module, own: set[str]) -> Iterator[tuple[int, str]]:
    """Line and text of each use of what belongs to another library alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            foreign = is_private(node.attr) and node.attr not in own
            moved = isinstance(node.ctx, (ast.Store, ast.Del)) and _of_a_trainer(node)
            if foreign or moved or node.attr in LOOPS:
                yield node.lineno, ast.unparse(node)
        elif (
            isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)) and _of_a_trainer(node.value)
        ):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call):
            yield from _calls(node, own)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from _imports(node)


def _calls(node: ast.Call, own: set[str]) -> Iterator[tuple[int, str]]:
    named = isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr", "hasattr", "delattr")
    if named and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
        name = str(node.args[1].value)
        on_trainer = node.func.id in ("setattr", "delattr") and _chain(node.args[0])[-1:] == ["trainer"]
        if (is_private(name) and name not in own) or name in LOOPS or on_trainer:
            yield node.lineno, ast.unparse(node)
    if isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
        names = _chain(node.func)
        if names[-3:-1] == ["trainer", "callbacks"] and names[0] not in ("cfg", "config"):
            yield node.lineno, ast.unparse(node)


def _imports(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[int, str]]:
    inside = isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "litdistill")
    module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
    names = [part for alias in node.names for part in (*module.split("."), *alias.name.split("."))]
    if not inside and any(map(is_private, names)):
        yield node.lineno, ast.unparse(node)


# -- the checker itself ------------------------------------------------------------------------------------------------

OWN = own_names([ast.parse("class A:\n    def __init__(self):\n        self._mine = 1\ndef _helper(): ...")])


@pytest.mark.parametrize(
    "line",
    [
        "def skip(): trainer.callbacks = []",  # what distillation's step did
        "trainer.callbacks[:] = []",
        "self.trainer.callbacks.remove(bar)",
        "setattr(trainer, 'callbacks', [])",
        "self.trainer.should_stop = True",
        "loop._should_accumulate()",
        "self.trainer.fit_loop.epoch_loop.batch_progress.current.ready += 1",
        "for p in module._parameters.values(): pass",
        "self._ddp_params_and_buffers_to_ignore = []",
        "isinstance(m, torch.nn.modules.batchnorm._BatchNorm)",
        "torch._foreach_lerp_(a, b, 0.1)",
        "getattr(net, '_reset_parameters')()",
        "from hydra._internal.utils import run_and_report",
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "import torch._dynamo",
        "step._skip_backward = True",
        "self._current_fx_name",  # of a base class
    ],
)
def test_the_checker_finds(line):
    assert list(violations(ast.parse(line), OWN))


@pytest.mark.parametrize(
    "line",
    [
        "self._mine = other._mine",
        "module._helper()",
        "x.__class__.__name__",
        "from __future__ import annotations",
        "from litdistill.data.augment import _mix",
        "cfg.trainer.max_epochs = 3",
        "trainer.fit(module)",
        "for _ in x: pass",
        "batch._replace(inputs=x)",
        "callbacks.append(bar)",
    ],
)
def test_the_checker_lets_pass(line):
    assert not list(violations(ast.parse(line), OWN))


# -- this project ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in FILES}


def test_only_public_names_of_other_libraries_are_used(trees):
    own = own_names(list(trees.values()))
    found = {(file, text): line for file, tree in trees.items() for line, text in violations(tree, own)}
    assert len(ALLOWED) <= 5
    assert all(ALLOWED.values())
    assert not [f"{file}:{line}: {text}" for (file, text), line in found.items() if (file, text) not in ALLOWED]
    assert not ALLOWED.keys() - found.keys()  # what is allowed and not used any more


def test_the_top_level_holds_few_modules_beside_the_rooms():
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_files_and_functions_are_short(trees):
    long = [f"{file}: {n} lines" for file in trees if (n := len((ROOT / file).read_text().splitlines())) > 400]
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 60:
                    long.append(f"{file}:{node.lineno}: {node.name} has {lines} lines")
    assert not long


def test_every_room_says_what_it_is(trees):
    assert not [f for f, tree in trees.items() if ast.get_docstring(tree) is None]
