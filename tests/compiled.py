"""What JAX compiles while something runs: each program's name and the sizes of its arguments."""

from __future__ import annotations

import logging
import math
import re
from types import TracebackType

_LOGGER = logging.getLogger("jax._src.interpreters.pxla")
_SAID = re.compile(
    r"Compiling jit\(([^)]*)\) with global shapes and types (.*?)\. Argument mapping", re.DOTALL
)
_SHAPE = re.compile(r"ShapedArray\(\w+(?:<\w+>)?\[([\d,]*)\]")


class Compiled(logging.Handler):
    """While entered, notes every program that is compiled: `sizes` has its name and the elements of
    its largest arguments.

    A program that this process has compiled before is not compiled again, unless `jax.clear_caches`
    came between.
    """

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.sizes: dict[str, int] = {}
        self._before = (logging.NOTSET, True)

    def emit(self, record: logging.LogRecord) -> None:
        found = _SAID.match(record.getMessage())
        if found is not None:
            elements = [
                math.prod(int(size) for size in shape.split(",") if size)
                for shape in _SHAPE.findall(found[2])
            ]
            self.sizes[found[1]] = max(self.sizes.get(found[1], 0), *elements, 0)

    def __enter__(self) -> Compiled:
        self._before = (_LOGGER.level, _LOGGER.propagate)
        _LOGGER.setLevel(logging.DEBUG)
        # Nothing of it is for the test's own output.
        _LOGGER.propagate = False
        _LOGGER.addHandler(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _LOGGER.removeHandler(self)
        _LOGGER.setLevel(self._before[0])
        _LOGGER.propagate = self._before[1]
