"""Strict settings for every test: 8 host devices, offline, no silent broadcasting of ranks.

Most of the tests' time is XLA compiling tiny programs. So they are compiled without its costly
optimisations, which what is tested does not depend on (JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs them
with), and kept where all workers and processes of a session find them.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile

# Before jax is imported: it reads these once.
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Workers inherit it: they are started by the process that gets here first.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="perl_jax_programs_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As a shell starts what runs in its background; tests send it, and what they start inherits it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def dataset_cache(tmp_path_factory: pytest.TempPathFactory):
    """Prepared data sets go to a folder of the test session, not to the user's cache."""
    folder = tmp_path_factory.mktemp("datasets")
    os.environ["PERL_JAX_CACHE"] = str(folder)
    return folder
