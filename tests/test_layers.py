"""The package's imports go to lower rooms only, and what it must never use is absent.

The source is parsed, not imported. A module or folder of `perl_jax` that is not in `ROOMS` fails:
adding one means deciding where it belongs, here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "perl_jax"

# From the lowest to the highest: a room imports the ones before it. "__init__" is the package
# itself.
ROOMS = (
    "types",
    "errors",
    "runtime",
    "adapters",
    "models",
    "objectives",
    "hub",
    "data",
    "generation",
    "rewards",
    "runs",
    "evaluation",
    "training",
    "planning",
    "cli",
    "__main__",
    "__init__",
)

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
    "__init__.py": {"import_module"},  # the public names' modules, values of a literal dictionary
    "data/tasks.py": {"import_module"},  # the task that the user named
    "rewards/worker.py": {"getattr", "import_module"},  # the function that the user named
    "runs/metrics.py": {"import_module"},  # optional writers, the keys of a literal dictionary
}
# Of these objects the forbidden names are attributes too (`builtins.eval`); `nnx.eval` is not.
FORBIDDEN_CALL_OWNERS = {"builtins", "importlib"}

# Files are read and written through `perl_jax/runtime/files.py`, which turns the faults of disks
# and buckets into sentences: nothing else calls these functions of modules,
FILE_MODULES = {"tempfile", "glob"}
FILE_FUNCTIONS = {
    "os": {
        *("replace", "rename", "remove", "unlink", "makedirs", "mkdir", "rmdir", "listdir"),
        *("walk", "scandir", "open", "stat"),
    },
    "io": {"open"},
    "shutil": {"copy", "copy2", "copyfile", "copyfileobj", "copytree", "move", "rmtree"},
    "pathlib": {"Path"},
    "epath": {"Path"},
}
# or these methods of paths.
FILE_METHODS = {
    *("read_text", "write_text", "read_bytes", "write_bytes", "mkdir", "unlink", "rmdir"),
    *("rename", "rmtree", "iterdir", "glob", "rglob", "touch", "exists", "is_file", "is_dir"),
}
FILE_DOORS = {
    f"runtime/{name}.py" for name in ("files", "outputs", "copies", "scratch", "buckets", "faults")
}
# Files that may make such a call after all, and why.
FILE_CALLS_ALLOWED: dict[str, set[str]] = {
    "cli/main.py": {"os.open"},  # standard output becomes the null device
    "runtime/platforms.py": {"glob.glob"},  # the devices of accelerators
    "data/store.py": {"pathlib.Path"},  # the cache of prepared rows, on this host's disk
    "rewards/worker.py": {"os.open", "pathlib.Path"},  # the Python file of a reward
    "rewards/supervisor.py": {"os.listdir", "open"},  # what the system says of processes
    "runs/environment.py": {"Path"},  # the package's own folder
    "runs/provenance.py": {"pathlib.Path", "is_file"},  # the Python file of a reward
    "runs/lease.py": {"open"},  # what the system says of a process
    "runtime/storage.py": {"tempfile.TemporaryDirectory"},  # a link to a folder
    "runs/lines.py": {"open"},  # lines are appended
    # The lock of a folder on a disk.
    "runs/owner.py": {
        "pathlib.PurePath",
        "os.open",
        "os.stat",
        "pathlib.Path",
        "exists",
        "is_dir",
        "mkdir",
        "rmdir",
    }
    | {"unlink"},
}


def room_of(dotted: list[str]) -> str | None:
    """The room of a module given without `perl_jax`; [] is the package itself.

    One unknown name may be something the package itself defines; the first of several is a module
    that is in no room, which its own file is blamed for: None.
    """
    if dotted and dotted[0] in ROOMS:
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
        target = room_of(rest)
        if importer not in ROOMS or target is None or target == importer:
            continue  # what is in no room is reported once, by `problems`
        if rest == ["__version__"]:
            continue
        if ROOMS.index(target) > ROOMS.index(importer):
            yield f"{importer} imports {name} of the higher room {target}"


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


def file_problems(tree: ast.AST, allowed: set[str]) -> Iterator[str]:
    """Calls that read, write or look for files past `perl_jax.runtime.files`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function, name = node.func, ""
        if isinstance(function, ast.Name):
            name = function.id if function.id == "open" else ""
        elif isinstance(function, ast.Attribute):
            owner = function.value.id if isinstance(function.value, ast.Name) else ""
            if owner in FILE_MODULES or function.attr in FILE_FUNCTIONS.get(owner, ()):
                name = f"{owner}.{function.attr}"
            elif owner != "files" and function.attr in FILE_METHODS:
                name = function.attr
        if name and name not in allowed:
            yield f"line {node.lineno} calls {name}: use perl_jax.runtime.files"


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
    if importer not in ROOMS:
        found.append(f"{importer} is no room: add it to ROOMS")
    found += import_problems(importer, absolute_imports(tree, module, is_package))
    name = path.relative_to(root).as_posix()
    found += call_problems(tree, CALLS_ALLOWED.get(name, set()))
    if name not in FILE_DOORS:
        found += file_problems(tree, FILE_CALLS_ALLOWED.get(name, set()))
    return [f"{path.relative_to(root)}: {problem}" for problem in found]


def test_the_package_keeps_its_layers():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 5
    found = [p for f in files for p in problems(f.read_text(encoding="utf-8"), f, PACKAGE)]
    assert not found, "\n".join(found)


def test_only_the_rooms_are_at_the_packages_root():
    found = {
        path.stem if path.suffix == ".py" else path.name
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or any(path.rglob("*.py"))
    }
    assert found == set(ROOMS)


def module_cycle(imports: dict[str, set[str]]) -> list[str] | None:
    """A list of modules each of which imports the next and the last the first, or None."""
    done: set[str] = set()

    def visit(module: str, above: list[str]) -> list[str] | None:
        if module in above:
            return above[above.index(module) :]
        if module in done:
            return None
        for other in sorted(imports.get(module, ())):
            found = visit(other, [*above, module])
            if found:
                return found
        done.add(module)
        return None

    return next(filter(None, (visit(module, []) for module in imports)), None)


def test_no_modules_import_each_other_in_a_circle():
    names = {
        ".".join(("perl_jax", *module_name(path, PACKAGE)[0])): path
        for path in PACKAGE.rglob("*.py")
    }
    imports: dict[str, set[str]] = {}
    for name, path in names.items():
        module, is_package = module_name(path, PACKAGE)
        found = absolute_imports(ast.parse(path.read_text(encoding="utf-8")), module, is_package)
        imports[name] = {
            target if target in names else target.rpartition(".")[0] for target in found
        } & names.keys() - {name}
    assert module_cycle(imports) is None
    assert sum(map(len, imports.values())) > 300
    assert module_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


BAD = {
    "objectives/a.py": [
        ("from perl_jax.hub.model import Model", "higher room hub"),
        ("from perl_jax import training", "higher room training"),
        ("import perl_jax.training as training", "higher room training"),
        ("from ..hub import model", "higher room hub"),
        ("from .. import training", "higher room training"),
        ("import perl_jax", "higher room __init__"),
        ("from perl_jax import Something", "higher room __init__"),
        ("def f():\n    from perl_jax import __main__", "higher room __main__"),
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
        ("with open(path) as file:\n    file.read()", "calls open"),
        ("import os\nos.replace(a, b)", "calls os.replace"),
        ("import shutil\nshutil.rmtree(folder)", "calls shutil.rmtree"),
        ("import glob\nglob.glob('*')", "calls glob.glob"),
        ("import pathlib\npathlib.Path(name)", "calls pathlib.Path"),
        ("(folder / 'a').read_text()", "calls read_text"),
        ("folder.exists()", "calls exists"),
    ],
    "models/__init__.py": [("from ..data import tasks", "higher room data")],
    "models/vision/tower.py": [("from ...data import tasks", "higher room data")],
    "__init__.py": [("import torch", "imports torch")],
    "errors.py": [("from perl_jax.runtime import trees", "higher room runtime")],
    "newcomer.py": [("x = 1", "newcomer is no room")],
}


@pytest.mark.parametrize(
    ("path", "source", "message"), [(p, s, m) for p, cases in BAD.items() for s, m in cases]
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
from perl_jax.adapters import lora
from perl_jax.runtime import masked
from perl_jax.types import Array
from . import decoder
from .decoder import Decoder
from ..errors import UserError

shape = jax.eval_shape(f, x)
nnx.eval(x)
model.eval()
length = getattr(config, "head_dim", None)
value = getattr(self, field)
there = files.exists(folder) and task.open(kind)
name = text.replace("a", "b")
version = importlib.metadata.version("jax")
"""


def test_the_detector_lets_ordinary_code_pass():
    root = Path("perl_jax")
    assert problems(GOOD, root / "models/attention.py", root) == []
    assert (
        problems("from perl_jax.training.state import TrainState", root / "training/step.py", root)
        == []
    )
    assert problems("importlib.import_module(name)", root / "data/tasks.py", root) == []
    assert (
        problems("from perl_jax import training\nimport perl_jax.cli", root / "__main__.py", root)
        == []
    )
