"""Checkpoints of a run: Orbax, atomic, every role, no base leaf."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from perl_jax.errors import UserError
from perl_jax.runtime import files, hosts, trees
from perl_jax.runtime.files import folder_bytes
from perl_jax.runtime.storage import changed_leaves, first_line, say_once
from perl_jax.types import Tree

# The item of a checkpoint that holds the checksums of the others; older versions wrote none.
_SEAL = "digests"


class Damaged(UserError):
    """What was saved is not what is there now; `step`: of the checkpoint."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Checkpoints:
    """A run's `checkpoints/` folder: the last `keep` steps and, with `best`, the best one.

    One checkpoint is one atomic Orbax directory: the TrainState (roles, optimizers, key, step) and
    a JSON object of host state (data cursor, best value so far). Saving waits until it is on disk:
    the state's buffers are donated to the next step, and a half-written step is never listed.

    best: the name of the metric that `save` gets, larger is better; None: none is kept for it.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int = 2, best: str | None = None):
        policies = [LatestN(keep)]
        if best is not None:
            policies.append(
                BestN(
                    get_metric_fn=lambda metrics: metrics[best],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._best = best
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            best_fn=None if best is None else (lambda metrics: metrics[best]),
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        self.folder = folder.absolute()
        # Before the manager reads the metrics: it chooses the best step by them.
        self._check_seals()
        hosts.barrier("checkpoints checked")
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except Exception as error:
            if hosts.lost(error):
                raise
            raise UserError(
                f"The checkpoints in {folder} cannot be read: {first_line(error)}"
            ) from error

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step; None when there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the best metric; None when none was saved with one."""
        return self._manager.best_step()

    def save(
        self, state: Tree, host: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Saves the state under its step; `metrics` only where they were measured at this step.

        Checksums of the state as it is in memory, of `host` and of `metrics` are part of the
        checkpoint.
        """
        step = int(state.step)
        metrics = None if metrics is None or self._best is None else dict(metrics)
        seal = files.sealed(
            {
                "state": trees.digests(state),
                "host": files.digest(host),
                "metrics": files.digest(metrics),
            }
        )
        items = {
            "state": ocp.args.StandardSave(state),
            "host": ocp.args.JsonSave(dict(host)),
            _SEAL: ocp.args.JsonSave(seal),
        }
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def restore(self, abstract: Tree, step: int | None = None) -> tuple[Tree, dict[str, Any]]:
        """State (on the shardings of `abstract`'s leaves) and host state of a step, default the
        newest.

        Raises UserError when the checkpoint's tree does not fit the job's, and Damaged when what is
        read is not what was saved: on all processes, even where one alone cannot read its part.
        """
        step = self._manager.latest_step() if step is None else step
        seal = self._seal(step)
        wanted = {name: trees.kind(leaf) for name, leaf in trees.named_leaves(abstract).items()}
        fits = seal is None or wanted == {
            name: text.partition(":")[0] for name, text in seal["state"].items()
        }
        restored, error = _read_alone(self.folder / str(step), abstract)
        if hosts.anyone(error is not None):
            error = error or UserError("another process cannot read its part")
            if seal is None and not isinstance(error, (ValueError, UserError)):
                raise error
            if seal is not None and fits:
                raise self._damage(step, first_line(error)) from error
            raise UserError(
                f"The checkpoint of step {step} in {self.folder} does not fit this job: {error}"
            ) from error
        if not fits:
            other = sorted(
                name
                for name in wanted.keys() | seal["state"].keys()
                if wanted.get(name) != seal["state"].get(name, "").partition(":")[0]
            )
            raise UserError(
                f"The checkpoint of step {step} in {self.folder} does not fit this job: "
                f"{', '.join(other)}."
            )
        if seal is not None:
            changed = changed_leaves(restored.state, seal["state"])
            if changed or files.digest(restored.host) != seal["host"]:
                raise self._damage(step, ", ".join(changed) or "its data cursor")
        return restored.state, restored.host

    def restore_newest(self, abstract: Tree) -> tuple[Tree, dict[str, Any]]:
        """`restore` of the newest whole checkpoint; damaged ones after it are removed, which is
        said.

        Raises UserError when all are damaged.
        """
        damaged: list[Damaged] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self.restore(abstract, step)
            except Damaged as error:
                damaged.append(error)
                continue
            for error in damaged:
                if hosts.is_writer():
                    print(
                        f"{error} It is removed, and the run goes on from step {step}.", flush=True
                    )
                self._manager.delete(error.step)
            return found
        raise UserError(
            f"{damaged[0]} There is no whole one; begin the run anew, in another --run folder."
        )

    def _check_seals(self) -> None:
        """Sets a damaged newest step aside where there are others; UserError for what cannot be
        done without.

        The best step is chosen among all by their metrics, so that where one is kept all must be
        whole.
        """
        steps = saved_steps(self.folder)
        for step in steps:
            try:
                self._seal(step)
            except Damaged as error:
                if step == steps[-1] and len(steps) > 1:
                    if hosts.is_writer():
                        aside = self.folder / f"{step}.damaged"
                        shutil.rmtree(aside, ignore_errors=True)
                        (self.folder / str(step)).rename(aside)
                        print(f"{error} It is set aside as {aside.name}.", flush=True)
                elif self._best is not None or len(steps) == 1:
                    raise

    def _seal(self, step: int) -> dict[str, Any] | None:
        """The checksums of a step, its metrics' already compared; None: an older version saved
        it.
        """
        folder = self.folder / str(step)
        if not (folder / _SEAL).exists():
            return None
        try:
            seal = files.read_json(folder / _SEAL / "metadata")
            metrics = (
                files.read_json(folder / "metrics" / "metrics")
                if (folder / "metrics").exists()
                else None
            )
        except UserError as error:
            raise self._damage(step, str(error).removesuffix(".")) from error
        if not files.is_whole(seal) or files.digest(metrics) != seal["metrics"]:
            raise self._damage(step, "its checksums or its metrics")
        return seal

    def _damage(self, step: int, what: str) -> Damaged:
        return Damaged(
            f"The checkpoint of step {step} in {self.folder} is damaged ({what}): what is read is "
            "not what was saved.",
            step,
        )

    def close(self) -> None:
        """Releases Orbax's threads."""
        self._manager.close()


def _read_alone(folder: pathlib.Path, abstract: Tree) -> tuple[Any, Exception | None]:
    """What this process reads of a checkpoint, or the error that it meets.

    Processes do not wait for each other in here, as the manager's own `restore` makes them do: one
    that cannot read its part would leave the others waiting.
    """
    alone = (
        {
            "multiprocessing_options": ocp.options.MultiprocessingOptions(
                active_processes={jax.process_index()}
            )
        }
        if hosts.several()
        else {}
    )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), host=ocp.args.JsonRestore())
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), **alone) as reader:
            return reader.restore(folder, args=args), None
    # Storage has errors of many kinds for bytes that it cannot read.
    except Exception as error:
        if hosts.lost(error):
            raise
        say_once()
        return None, error


def saved_steps(folder: pathlib.Path) -> list[int]:
    """Steps in a `checkpoints/` folder, in order; what was set aside (`5.damaged`) or is half
    written is none.
    """
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdecimal())


def newest_bytes(folder: pathlib.Path) -> int | None:
    """Bytes of the newest checkpoint in a `checkpoints/` folder; None: there is none."""
    steps = saved_steps(folder)
    return folder_bytes(folder / str(steps[-1])) if steps else None
