"""Strict settings for every test: 8 host devices, offline, no silent broadcasting of ranks.

Most of the tests' time is XLA compiling tiny programs. So they are compiled without its costly
optimisations, which what is tested does not depend on (JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs them
with), and kept where all workers and processes of a session find them.
"""

from __future__ import annotations

import atexit
import functools
import gc
import os
import pathlib
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from tests.xla import xla_flags

# Before jax, NumPy and torch are imported: they read these once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = xla_flags(8)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# gcsfs, which reads it once, would ask a server of Google's which kind of bucket a test's is.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Threads of torch and NumPy compute while they wait for each other: a tiny model takes up to thirty
# times as long with two of them as with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Workers inherit it: they are started by the process that gets here first.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="perl_jax_programs_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As a shell starts what runs in its background; tests send it, and what they start inherits it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest
from xdist.scheduler import loadscope

from tests.tiers import QUICK, SECONDS, TIERS, tier_of

jax.config.update("jax_numpy_rank_promotion", "raise")
_TESTS = pathlib.Path(__file__).parent


class ByFile(loadscope.LoadScopeScheduling):
    """Sends all tests of a file to one worker, and all files of a group: those that use one
    experiment's runs make and compile them once, those that compare with torch import it once. The
    longest come first.
    """

    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid.partition("::")[0])

    def _assign_work_unit(self, node: object) -> None:
        seconds = lambda scope: SECONDS.get(
            scope.removeprefix("tests/"), 0.1 * len(self.workqueue[scope])
        )
        self.workqueue.move_to_end(max(self.workqueue, key=seconds), last=False)
        super()._assign_work_unit(node)


# Group -> its folder and a pattern that its files have; a file is in the first that fits.
_GROUPS = {
    "jobs": ("tests/training/", r"^def test_\w+\([^)]*\b(?:jobs|base)\b"),
    "torch": ("tests/", r"importorskip\(\"torch\"\)|\b(?:load_torch|write_twin|trl_reference)\b"),
}


@functools.cache
def _group(file: str) -> str:
    text = (_TESTS.parent / file).read_text(encoding="utf-8")
    for name, (folder, pattern) in _GROUPS.items():
        if file.startswith(folder) and re.search(pattern, text, re.MULTILINE):
            return name
    return file


def pytest_xdist_make_scheduler(
    config: pytest.Config, log: object
) -> loadscope.LoadScopeScheduling | None:
    """`--dist loadfile` is `ByFile`; None: pytest-xdist's own for the other ways."""
    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Gives each test its tier's mark (`tests/tiers.py`), before any is deselected by it."""
    found: dict[str, set[str]] = {}
    for item in items:
        file = item.path.relative_to(_TESTS).as_posix()
        test = item.nodeid.partition("::")[2]
        found.setdefault(file, set()).update({test, test.partition("[")[0]})
        tier = tier_of(file, test)
        if tier is not None:
            item.own_markers[:] = [
                mark for mark in item.own_markers if mark.name not in ("slow", "exhaustive")
            ]
            if tier != QUICK:
                item.add_marker(tier)
    # Only where whole files were collected can a name be missing.
    if not any("::" in argument for argument in config.args):
        absent = [
            f"{file}::{test}"
            for file in TIERS
            if file in found
            for test in TIERS[file]
            if test not in found[file]
        ]
        if absent:
            raise pytest.UsageError(
                f"tests/tiers.py names tests that do not exist: {', '.join(absent)}."
            )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collects tests without Python's garbage collector, which afterwards no longer visits what
    was made by then.

    A visit to all modules of JAX and its libraries takes as long as a short test.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        # Tracing makes many objects and little garbage.
        gc.set_threshold(20_000, 10, 10)
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def dataset_cache(tmp_path_factory: pytest.TempPathFactory):
    """Prepared data sets go to a folder of the test session, not to the user's cache."""
    folder = tmp_path_factory.mktemp("datasets")
    os.environ["PERL_JAX_CACHE"] = str(folder)
    return folder


@pytest.fixture
def bucket() -> Iterator[Any]:
    """An empty bucket, gs://bucket, on a server of this process (`tests.bucket.Bucket`)."""
    pytest.importorskip("gcp_storage_emulator")
    pytest.importorskip("gcsfs")
    from tests.bucket import running_bucket

    with running_bucket() as found:
        yield found


# What was compiled while tests were collected: each worker would do it again before its first test.
_compiled_early: list[str] = []
_collected = threading.Event()


def _compiled(event: str, _seconds: float, **_details: object) -> None:
    if "backend_compile" in event and not _collected.is_set():
        _compiled_early.append(event)


jax.monitoring.register_event_duration_secs_listener(_compiled)


def pytest_collection_finish() -> None:
    """Refuses test modules that compute with JAX when they are imported."""
    _collected.set()
    if _compiled_early:
        raise pytest.UsageError(
            f"{len(_compiled_early)} programs were compiled while tests were collected; make "
            "arrays with NumPy there, or inside tests."
        )


# Linux lets a process have 65,530 pieces of memory. Each compiled program has several, and a
# process without one crashes.
_MAPS = 40_000


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Lets go of compiled programs between modules when there are many; those that are needed again
    come from the disk.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MAPS:
        jax.clear_caches()
        gc.collect()
