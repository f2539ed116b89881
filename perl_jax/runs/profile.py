"""Traces of chosen steps, for `xprof` (TensorBoard's profile plugin) or Perfetto."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

import jax


class Profile:
    """While entered, `step` traces the steps that were asked for: devices, host and Python.

    A run of consecutive steps is one trace, `folder/plugins/profile/TIME/HOST.xplane.pb`. Processes
    of one run trace into folders of their own, process-N, because those on one host would have one
    name.
    """

    def __init__(self, folder: pathlib.Path, steps: tuple[int, ...]) -> None:
        self.folder = (
            folder / f"process-{jax.process_index()}" if jax.process_count() > 1 else folder
        )
        self._steps = frozenset(steps)
        self._open = False

    def __enter__(self) -> Profile:
        return self

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one step, whose results are on the host when it ends."""
        if number in self._steps and not self._open:
            jax.profiler.start_trace(self.folder)
            self._open = True
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        if number + 1 not in self._steps:
            self._close()

    def _close(self) -> None:
        if self._open:
            self._open = False
            jax.profiler.stop_trace()

    def __exit__(self, *error: object) -> None:
        # A run that ends in the middle leaves what was traced.
        self._close()
