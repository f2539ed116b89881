"""Traces of selected training steps, for `xprof` (TensorBoard's profile plugin) or Perfetto."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

from perl_jax.runs.owner import Lost
from perl_jax.runtime import files
from perl_jax.runtime.outputs import LocalCopy


class Profile:
    """Traces selected steps: devices, host and Python.

    Consecutive steps form one trace, `folder/plugins/profile/TIME/HOST.xplane.pb`. With several
    processes each traces into a folder of its own, `process-N`, because processes on one host would
    write the same file.

    Args:
        folder: Where traces are written.
        steps: The numbers of the steps to trace.
    """

    def __init__(self, folder: files.Path, steps: tuple[int, ...]) -> None:
        self.folder = (
            folder / f"process-{jax.process_index()}" if jax.process_count() > 1 else folder
        )
        self._local = LocalCopy(self.folder) if steps else None
        self._steps = frozenset(steps)
        self._open = False

    def __enter__(self) -> Profile:
        return self

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Returns a context manager around one step, which traces the step if its number was
        selected.

        The step's results must be on the host when the block ends.

        Args:
            number: The number of the step.
        """
        if number in self._steps and not self._open and self._local is not None:
            jax.profiler.start_trace(self._local.path)
            self._open = True
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        if number + 1 not in self._steps:
            self._close()

    def _close(self) -> None:
        """Stops a running trace and writes its file; without a trace does nothing."""
        if self._open:
            self._open = False
            jax.profiler.stop_trace()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # A run that fails in the middle of a trace keeps what was traced.
        self._close()
        if self._local is not None:
            self._local.close(keep=kind is None or not issubclass(kind, Lost))
