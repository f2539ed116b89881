"""Programs: functions that are compiled once per set of argument shapes, and counted."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from perl_jax.errors import UserError
from perl_jax.runtime import files, outputs, progress, trees

# Largest number of padded lengths of a run's data.
# SHAPES: largest number of argument shapes of a program that reads batches. Each length is padded
# or packed in a few sizes, for a model with an adapter or without.
LENGTHS = 16
SHAPES = 8 * LENGTHS
# The name by which it is tried whether a folder can be written.
_PROBE = "probe"
# How JAX's warnings of a cache that cannot be used begin.
_WARNED = "Error (reading|writing) persistent compilation cache"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Device memory of one compiled program, in bytes per device, as the compiler reports it.

    Attributes:
        arguments: Bytes of the arguments.
        outputs: Bytes of the outputs.
        temporaries: Bytes of intermediate results.
        aliased: Bytes of outputs that are written over donated arguments.
    """

    arguments: int
    outputs: int
    temporaries: int
    aliased: int

    @property
    def peak(self) -> int:
        """Bytes in use at the peak: arguments + outputs + temporaries - aliased."""
        return self.arguments + self.outputs + self.temporaries - self.aliased

    @property
    def beyond_arguments(self) -> int:
        """Bytes that the program needs in addition to its arguments."""
        return self.peak - self.arguments


def use_compilation_cache(folder: str | None) -> None:
    """Makes JAX keep compiled programs in `folder`, for this and later processes.

    Programs that took a second or more to compile are kept. The folder is created if it is missing.

    Args:
        folder: A folder on a disk or in a bucket. None keeps the folder that the environment
            variable JAX_COMPILATION_CACHE_DIR names, if there is one: if programs cannot be written
            there, that is printed once, and programs are still read from there.

    Raises:
        UserError: `folder` cannot be written.
    """
    if folder is None:
        _check_environments_cache()
        return
    try:
        path = outputs.check_writable(files.path_of(folder) / _PROBE).parent
        files.make_folder(path)
    except UserError as error:
        raise UserError(f"compile_cache is {folder}: {error}") from error
    # JAX reads the setting once, at its first compilation, which may already have happened.
    compilation_cache.set_cache_dir(str(path))
    compilation_cache.reset_cache()


@functools.cache
def _check_environments_cache() -> None:
    """Prints one note if programs cannot be kept in the folder that the environment names.

    JAX would warn at each program.
    """
    folder = jax.config.jax_compilation_cache_dir
    if folder is None:
        return
    try:
        outputs.check_writable(files.path_of(folder) / _PROBE)
    except UserError as error:
        print(
            f"JAX_COMPILATION_CACHE_DIR: {error} Compiled programs are not kept.", file=sys.stderr
        )
        warnings.filterwarnings("ignore", message=_WARNED)


def release_freed_memory() -> None:
    """Returns freed heap memory to the operating system, where the C library can (glibc).

    Compiling leaves hundreds of MiB of freed memory in pieces too small for the arrays of later
    steps.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def with_name(name: str, function: Callable) -> Callable:
    """Returns the function under another name, which JAX gives its program in logs and traces."""

    def call(*args: Any) -> Any:
        return function(*args)

    call.__name__ = call.__qualname__ = name
    return call


class Program:
    """A pure function that is compiled ahead of time, once per distinct set of argument shapes.

    Args:
        name: Name of the program in logs, traces and errors.
        function: The function.
        donate: Positions of arguments whose buffers the outputs may reuse (never the base).
        limit: Largest number of compilations. One more raises RuntimeError: batches have few
            different lengths, so a growing number of compilations is a bug.
        out_shardings: Shardings of the outputs, as for `jax.jit`.
        compiler_options: Options of XLA, such as `platforms.decoding_options`.
    """

    def __init__(
        self,
        name: str,
        function: Callable,
        *,
        donate: tuple[int, ...] = (),
        limit: int = 8,
        out_shardings: Any = None,
        compiler_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.limit = name, limit
        options = {} if out_shardings is None else {"out_shardings": out_shardings}
        self._jitted = jax.jit(
            with_name(name, function),
            donate_argnums=donate,
            compiler_options=dict(compiler_options) if compiler_options else None,
            **options,
        )
        self._compiled: dict[Any, Any] = {}

    def trace(self, *args: Any) -> jax.stages.Traced:
        """Returns the traced function, not compiled, for arguments or their shapes.

        Shapes may have shardings (`jax.ShapeDtypeStruct`).
        """
        return self._jitted.trace(*args)

    def __call__(self, *args: Any) -> Any:
        """Runs the program and returns its outputs; compiles it first for a new signature.

        The signature is the arguments' tree structure, shapes, dtypes and shardings. Donated
        arguments cannot be used afterwards. Raises RuntimeError at more signatures than the limit.
        """
        leaves, structure = jax.tree.flatten(args)
        # Shardings belong to the signature: a program compiled for one mesh cannot take arrays of
        # another mesh.
        signature = (
            structure,
            tuple((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves),
        )
        if signature not in self._compiled:
            if len(self._compiled) >= self.limit:
                raise RuntimeError(
                    f"program {self.name!r} met more than {self.limit} argument shapes; its "
                    "batches have too many different lengths"
                )
            with progress.activity(f"compiling {self.name}"):
                self._compiled[signature] = self._jitted.lower(*args).compile()
            release_freed_memory()
        return trees.block_on_cpu(self._compiled[signature](*args))

    @property
    def signatures(self) -> tuple:
        """One entry per compilation: tree structure; shape, dtype and sharding of each leaf."""
        return tuple(self._compiled)

    @property
    def compilations(self) -> int:
        """Number of compilations so far."""
        return len(self._compiled)

    def memory(self) -> Memory | None:
        """Returns the memory of the compilation with the largest peak; None before the first."""
        accounts = []
        for compiled in self._compiled.values():
            a = compiled.memory_analysis()
            accounts.append(
                Memory(
                    a.argument_size_in_bytes,
                    a.output_size_in_bytes,
                    a.temp_size_in_bytes,
                    a.alias_size_in_bytes,
                )
            )
        return max(accounts, key=lambda account: account.peak, default=None)
