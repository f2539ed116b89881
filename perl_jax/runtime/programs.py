"""Compiled programs: each function compiled once for each shape of its arguments, and counted."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from perl_jax.errors import UserError
from perl_jax.runtime import trees

# Padded lengths that a run's data may have, and shapes of a program that reads batches: each length
# padded or packed in a few sizes, for a model with an adapter and without.
LENGTHS = 16
SHAPES = 8 * LENGTHS


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one compiled program on one device, by the compiler's own account.

    peak = arguments + outputs + temporaries - aliased (outputs written over donated arguments).
    """

    arguments: int
    outputs: int
    temporaries: int
    aliased: int

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs + self.temporaries - self.aliased

    @property
    def beyond_arguments(self) -> int:
        """What the program needs on top of what it is given."""
        return self.peak - self.arguments


def keep_compiled(folder: str | None) -> None:
    """Programs that took a second or more to compile are kept in a folder, for any process; None:
    as it was.

    A run that starts again then compiles nothing. UserError where the folder cannot be made.
    """
    if folder is None:
        return
    if "://" not in folder:
        try:
            pathlib.Path(folder).expanduser().mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"compile_cache is {folder}, which cannot be made a folder: {error.strerror}."
            ) from error
    # JAX looks at the setting once, at its first compilation, which may have been before.
    compilation_cache.set_cache_dir(os.path.expanduser(folder))
    compilation_cache.reset_cache()


def give_back_freed() -> None:
    """Returns memory that was freed to the system, where the C library has it in pieces (glibc's);
    nothing elsewhere.

    What compiling leaves, hundreds of MiB, is in pieces that the arrays of later steps do not fit
    into.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def named(name: str, function: Callable) -> Callable:
    """The function under a name, which JAX then has for its compiled program, in logs, traces and
    errors.
    """

    def call(*args: Any) -> Any:
        return function(*args)

    call.__name__ = call.__qualname__ = name
    return call


class Program:
    """A pure function, compiled ahead for each distinct set of argument shapes.

    limit: the most shapes it may be compiled for; one more raises RuntimeError, because shapes are
    bucketed and a growing number of compilations is a defect, not slowness to live with.
    donate: positions of arguments whose buffers the outputs may take over (never the base).
    compiler_options: XLA's, such as `platforms.decoding_options`.
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
            named(name, function),
            donate_argnums=donate,
            compiler_options=dict(compiler_options) if compiler_options else None,
            **options,
        )
        self._compiled: dict[Any, Any] = {}

    def trace(self, *args: Any) -> jax.stages.Traced:
        """The function traced for arguments or their shapes with shardings, nothing compiled yet:
        for planning.
        """
        return self._jitted.trace(*args)

    def __call__(self, *args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        # Places are part of it: what is compiled for one mesh cannot take another's arrays.
        signature = (
            structure,
            tuple((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves),
        )
        if signature not in self._compiled:
            if len(self._compiled) >= self.limit:
                raise RuntimeError(
                    f"program {self.name!r} met more than {self.limit} argument shapes; lengths "
                    "are not bucketed"
                )
            self._compiled[signature] = self._jitted.lower(*args).compile()
            give_back_freed()
        return trees.awaited(self._compiled[signature](*args))

    @property
    def signatures(self) -> tuple:
        """(structure, (shape, dtype, sharding) of every leaf) of each set of arguments it was
        compiled for.
        """
        return tuple(self._compiled)

    @property
    def compilations(self) -> int:
        """How many shapes it has been compiled for."""
        return len(self._compiled)

    def memory(self) -> Memory | None:
        """The account of the compiled shape with the largest peak; None before the first call."""
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
