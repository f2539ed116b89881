"""The package's imports go to lower layers only, and what it must never use is absent.

The source is parsed, not imported. A module or folder of `perl_jax` that is in no layer fails:
adding one means deciding where it belongs, here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "perl_jax"

LAYERS: dict[int, set[str]] = {
    0: {"types", "config", "hosts", "trees", "masked", "platforms", "precision", "intervals"},
    1: {"lora", "quantise", "sharding", "rl", "rewards"},
    2: {"models"},
    3: {"hf", "data"},
    4: {"sampling", "continuous", "state", "steps", "programs", "checkpoint"},
    5: {"loops", "evaluate", "metrics", "report", "plan"},
    # "__init__" is the package itself: what `import perl_jax` runs.
    6: {"__main__", "__init__"},
}

# Imports between modules of one layer, importer -> imported. Kept small, and free of cycles.
SAME_LAYER_ALLOWED: dict[str, set[str]] = {
    "hosts": {"config"},
    "trees": {"hosts", "types"},
    "lora": {"quantise"},
    "masked": {"types"},
    "precision": {"types"},
    "intervals": {"types"},
    "continuous": {"programs", "sampling"},
    "steps": {"state"},
    "checkpoint": {"state"},
    "report": {"evaluate", "metrics"},
    "loops": {"evaluate", "metrics"},
    "plan": {"loops"},
    "__main__": {"__init__"},
}

FORBIDDEN_IMPORTS = {
    "torch",
    "peft",
    "trl",
    "pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "tensorflow",
    "sklearn",
}
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "import_module"}
# Files that may make a call named here after all, and why.
CALLS_ALLOWED: dict[str, set[str]] = {
    "data/orders.py": {"getattr"},  # fields of an order's item, named by a literal tuple
    "rewards/worker.py": {"getattr", "import_module"},  # the function that the user named
    "metrics.py": {"import_module"},  # optional writers, the keys of a literal dictionary
}
# Of these objects the forbidden names are attributes too (`builtins.eval`); `nnx.eval` is not.
FORBIDDEN_CALL_OWNERS = {"builtins", "importlib"}


def layer_of(component: str) -> int | None:
    return next((layer for layer, names in LAYERS.items() if component in names), None)


def component_of(dotted: list[str]) -> str | None:
    """The layer table's name of a module given without `perl_jax`; [] is the package itself.

    One unknown name may be something the package itself defines; the first of several is a module
    that is in no layer, which its own file is blamed for: None.
    """
    if dotted and layer_of(dotted[0]) is not None:
        return dotted[0]
    return None if len(dotted) > 1 else "__init__"


def module_name(path: Path, root: Path) -> tuple[tuple[str, ...], bool]:
    """("models", "decoder") of models/decoder.py, and whether the file is an __init__."""
    parts = path.relative_to(root).with_suffix("").parts
    return (parts[:-1], True) if parts[-1] == "__init__" else (parts, False)


def absolute_imports(tree: ast.AST, module: tuple[str, ...], is_package: bool) -> Iterator[str]:
    """Dotted names of everything imported anywhere in the file, relative imports resolved."""
    home = ("perl_jax", *module) if is_package else ("perl_jax", *module[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = home[: len(home) - node.level + 1] if node.level else ()
            source = ".".join((*start, *((node.module,) if node.module else ())))
            # `from perl_jax import lora` imports a module, so the name counts as part of the path.
            yield from (f"{source}.{alias.name}" for alias in node.names)


def import_problems(importer: str, imported: Iterator[str]) -> Iterator[str]:
    for name in imported:
        top, *rest = name.split(".")
        if top in FORBIDDEN_IMPORTS:
            yield f"imports {top}, which the package must not need"
        if top != "perl_jax":
            continue
        target = component_of(rest)
        own = layer_of(importer)
        if own is None or target is None or target == importer:
            continue  # what is in no layer is reported once, by `problems`
        other = layer_of(target)
        if other > own:
            yield f"layer {own} imports {name} of the higher layer {other}"
        elif other == own and target not in SAME_LAYER_ALLOWED.get(importer, set()):
            yield f"{importer} imports {name} of its own layer {own}, not allowed by the table"


def call_problems(tree: ast.AST, allowed: set[str]) -> Iterator[str]:
    """Calls that turn text into code or names. A dataclass may loop over its own fields."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name):
            name = function.id
        elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            owner = function.value.id
            name = function.attr if owner in FORBIDDEN_CALL_OWNERS else ""
        else:
            continue
        if name in allowed:
            continue
        if name in FORBIDDEN_CALLS:
            yield f"line {node.lineno} calls {name}"
        if name == "getattr" and not is_plain_getattr(node):
            yield f"line {node.lineno} calls getattr with a name that is not written out"


def is_plain_getattr(node: ast.Call) -> bool:
    """`getattr(x, "name")`, or `getattr(self, field)`, which cannot reach into a module."""
    on_self = bool(node.args) and isinstance(node.args[0], ast.Name) and node.args[0].id == "self"
    written_out = len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
    return on_self or written_out


def problems(source: str, path: Path, root: Path) -> list[str]:
    """All that is wrong with one file, as sentences that begin with its path."""
    module, is_package = module_name(path, root)
    importer = module[0] if module else "__init__"
    tree = ast.parse(source)
    found = []
    if layer_of(importer) is None:
        found.append(f"{importer} is in no layer: add it to LAYERS")
    found += import_problems(importer, absolute_imports(tree, module, is_package))
    found += call_problems(tree, CALLS_ALLOWED.get(path.relative_to(root).as_posix(), set()))
    return [f"{path.relative_to(root)}: {problem}" for problem in found]


def test_the_package_keeps_its_layers():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 5
    found = [p for f in files for p in problems(f.read_text(encoding="utf-8"), f, PACKAGE)]
    assert not found, "\n".join(found)


def test_a_name_is_in_one_layer_and_no_same_layer_imports_form_a_cycle():
    names = [name for layer in LAYERS.values() for name in layer]
    assert len(names) == len(set(names))
    for importer, imported in SAME_LAYER_ALLOWED.items():
        assert all(layer_of(name) == layer_of(importer) for name in imported), importer
        reached, frontier = set(), set(imported)
        while frontier:
            reached |= frontier
            frontier = {n for f in frontier for n in SAME_LAYER_ALLOWED.get(f, ())} - reached
        assert importer not in reached


BAD = {
    "rl/a.py": [
        ("from perl_jax.models.decoder import Decoder", "higher layer 2"),
        ("from perl_jax import state", "higher layer 4"),
        ("import perl_jax.loops as loops", "higher layer 5"),
        ("from ..models import decoder", "higher layer 2"),
        ("from .. import steps", "higher layer 4"),
        ("import perl_jax", "higher layer 6"),
        ("from perl_jax import Something", "higher layer 6"),
        ("def f():\n    from perl_jax import __main__", "higher layer 6"),
        ("from perl_jax import lora", "own layer 1"),
        ("import torch", "imports torch"),
        ("def f():\n    from sklearn.metrics import roc_auc_score", "imports sklearn"),
        ("import tensorflow.io", "imports tensorflow"),
        ("from pickle import loads", "imports pickle"),
        ("import os, trl", "imports trl"),
        ("try:\n    import peft\nexcept ImportError:\n    peft = None", "imports peft"),
        ("eval('1')", "calls eval"),
        ("import builtins\nbuiltins.exec('x = 1')", "calls exec"),
        ("import importlib\nimportlib.import_module('torch')", "calls import_module"),
        ("__import__('torch')", "calls __import__"),
        ("import jax\nname = 'jit'\ngetattr(jax, name)", "calls getattr"),
    ],
    "models/__init__.py": [("from ..data import tasks", "higher layer 3")],
    "models/vision/tower.py": [("from ...data import tasks", "higher layer 3")],
    "__init__.py": [("import torch", "imports torch")],
    "config.py": [("from perl_jax.types import Tokens", "own layer 0")],
    "newcomer.py": [("x = 1", "newcomer is in no layer")],
}


@pytest.mark.parametrize(
    "path,source,message", [(p, s, m) for p, cases in BAD.items() for s, m in cases]
)
def test_the_detector_sees(path, source, message):
    root = Path("perl_jax")
    found = problems(source, root / path, root)
    assert len(found) == 1, found
    assert found[0].startswith(path)
    assert message in found[0]


GOOD = """
import importlib.metadata
import jax
import tensorflow_datasets as tfds
from flax import nnx
from perl_jax import lora, masked
from perl_jax.rl import kl
from perl_jax.types import Array
from . import decoder
from .decoder import Decoder
from ..config import UserError

shape = jax.eval_shape(f, x)
nnx.eval(x)
model.eval()
length = getattr(config, "head_dim", None)
value = getattr(self, field)
version = importlib.metadata.version("jax")
"""


def test_the_detector_lets_ordinary_code_pass():
    root = Path("perl_jax")
    assert problems(GOOD, root / "models/attention.py", root) == []
    assert problems("from perl_jax.state import State", root / "steps.py", root) == []
    assert problems("getattr(item, slot)", root / "data/orders.py", root) == []
    assert problems("from perl_jax import loops\nimport perl_jax", root / "__main__.py", root) == []
