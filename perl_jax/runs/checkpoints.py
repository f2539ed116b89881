"""Checkpoints of a run: atomic Orbax directories that hold every role's adapter but no base
weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from perl_jax.errors import TrainingError, UserError
from perl_jax.runs.whole import SEAL, examine, saved_steps
from perl_jax.runtime import buckets, files, hosts, json_values, trees
from perl_jax.runtime.faults import explained, reason
from perl_jax.runtime.storage import (
    changed_leaves,
    hide_unretrieved_errors,
    plain_path,
    saving,
    short_message,
)
from perl_jax.types import Tree

# Where Orbax puts a checkpoint before it is deleted, so that a half-deleted one is never listed.
_DELETED = ".deleted"


class Damaged(UserError):
    """A checkpoint on disk differs from what was saved.

    Attributes:
        step: The checkpoint's step.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Checkpoints:
    """The `checkpoints/` folder of a run: keeps the last `keep` steps and the best one.

    A checkpoint is one Orbax folder with three items: the TrainState (roles, optimizer states, key,
    step), the host state (a JSON object with the data cursor), and checksums of both and of the
    metrics. It appears complete or not at all: on a disk it is renamed, in a bucket a marker is
    written last. `save` returns only when the checkpoint is stored and its checksums have been read
    back, because the state's buffers are donated to the next step.

    Opening examines all checkpoints but their arrays, deletes what killed processes left, and sets
    damaged checkpoints aside if another one is whole: on a disk as `checkpoints/STEP.damaged`, in a
    bucket below `checkpoints.damaged/`. Each is said in one printed sentence.

    Args:
        folder: The `checkpoints/` folder; created if it does not exist.
        keep: How many of the newest checkpoints to keep.
        best: The metric, among those given to `save`, whose largest value marks the best step; None
            keeps the newest steps only.

    Raises:
        UserError: The checkpoints cannot be read, or none is whole.
    """

    def __init__(self, folder: files.PathLike, *, keep: int = 2, best: str | None = None):
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
            todelete_subdir=_DELETED,
        )
        self.folder = files.absolute(folder)
        with contextlib.ExitStack() as stack:
            if not files.is_remote(self.folder):
                # Before a link to it.
                files.make_folder(self.folder)
            self._path = stack.enter_context(plain_path(self.folder))
            # Before the manager reads the metrics, from which it picks the best step.
            hosts.by_writer(self._clean)
            try:
                self._manager = ocp.CheckpointManager(self._path, options=options)
            except Exception as error:
                if hosts.is_peer_failure(error):
                    raise
                raise UserError(
                    f"The checkpoints in {folder} cannot be read: {self._said(error)}"
                ) from error
            self._opened = stack.pop_all()

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint; None: there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Returns the step with the best metric; None: no checkpoint was saved with metrics."""
        return self._manager.best_step()

    def save(
        self, state: Tree, host: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Saves a checkpoint with its checksums, and deletes those that are no longer kept.

        Args:
            state: The TrainState; its `step` names the checkpoint.
            host: The host state, a JSON object.
            metrics: The validation metrics, if they were measured at this step; else None. Not
                saved if `best` is None.

        Raises:
            TrainingError: The checkpoint cannot be written, or what was saved cannot be read back.
        """
        step = int(state.step)
        metrics = None if metrics is None or self._best is None else dict(metrics)
        seal = json_values.with_checksum(
            {
                "state": trees.digests(state),
                "host": json_values.digest(host),
                "metrics": json_values.digest(metrics),
            }
        )
        items = {
            "state": ocp.args.StandardSave(state),
            "host": ocp.args.JsonSave(dict(host)),
            SEAL: ocp.args.JsonSave(seal),
        }
        try:
            with saving():
                self._manager.save(
                    step, args=ocp.args.Composite(**items), metrics=metrics, force=True
                )
        except Exception as error:
            said = None if hosts.is_peer_failure(error) else reason(error)
            if said is None:
                raise
            before = max(saved_steps(self.folder), default=None)
            kept = (
                "there is no checkpoint before it"
                if before is None
                else f"the same command goes on from the checkpoint of step {before}"
            )
            raise TrainingError(
                f"The checkpoint of step {step} in {self.folder} cannot be written: {said}. The "
                f"run stopped; {kept}."
            ) from error
        wrong = hosts.by_writer(lambda: self._read_back(step, seal))
        if wrong is not None:
            raise TrainingError(
                f"The checkpoint of step {step} in {self.folder} was saved, but cannot be read "
                f"back ({wrong}); the run stopped."
            )

    def _read_back(self, step: int, seal: Mapping[str, Any]) -> str | None:
        """Returns what is wrong with a checkpoint that was just saved; None: nothing.

        Deletes what Orbax has put aside to be deleted.

        Args:
            step: The checkpoint's step.
            seal: The checksums that were saved with it.
        """
        files.remove(self.folder / _DELETED)
        listed = step in saved_steps(self.folder)
        found = examine(self.folder / str(step))
        return found.wrong or (None if listed and found.seal == seal else "it is not listed")

    def restore(self, abstract: Tree, step: int | None = None) -> tuple[Tree, dict[str, Any]]:
        """Returns (state, host state) of a checkpoint. The host state holds the data cursor.

        If one process cannot read its part, all processes raise.

        Args:
            abstract: The shapes, dtypes and shardings of the state's leaves.
            step: The checkpoint's step. None: the newest; there must be one.

        Raises:
            UserError: The checkpoint's tree does not fit `abstract`.
            Damaged: What is read differs from what was saved.
        """
        step = self._manager.latest_step() if step is None else step
        seal = self._seal(step)
        wanted = {
            name: trees.dtype_and_shape(leaf) for name, leaf in trees.named_leaves(abstract).items()
        }
        fits = seal is None or wanted == {
            name: text.partition(":")[0] for name, text in seal["state"].items()
        }
        restored, error = _read_alone(self._path / str(step), abstract)
        if hosts.any_process(error is not None and self._is_out_of_reach(error)):
            why = "another process cannot read its part" if error is None else self._said(error)
            raise UserError(
                f"The checkpoint of step {step} in {self.folder} cannot be read: {why}."
            ) from error
        if hosts.any_process(error is not None):
            error = error or UserError("another process cannot read its part")
            if fits and not (seal is None and isinstance(error, ValueError)):
                raise self._damage(step, self._said(error)) from error
            why = str(error).replace(str(self._path), str(self.folder))
            raise UserError(
                f"The checkpoint of step {step} in {self.folder} does not fit this job: {why}"
            ) from error
        if seal is not None and not fits:
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
            if changed:
                raise self._damage(step, ", ".join(changed))
        return restored.state, restored.host

    def restore_newest(self, abstract: Tree) -> tuple[Tree, dict[str, Any]]:
        """Returns (state, host state) of the newest undamaged checkpoint.

        There must be a checkpoint. Damaged checkpoints that are newer than the returned one are set
        aside, with a printed sentence. All processes must call this method.

        Args:
            abstract: The shapes, dtypes and shardings of the state's leaves.

        Raises:
            UserError: All checkpoints are damaged, or one does not fit `abstract`.
        """
        return self._restore_first(sorted(self._manager.all_steps(), reverse=True), abstract)

    def restore_best(self, abstract: Tree) -> tuple[Tree, dict[str, Any]]:
        """Returns (state, host state) of the undamaged checkpoint with the best metric.

        There must be a checkpoint with metrics. Damaged ones that are better are set aside, with a
        printed sentence. All processes must call this method.

        Args:
            abstract: The shapes, dtypes and shardings of the state's leaves.

        Raises:
            UserError: All checkpoints with metrics are damaged, or one does not fit `abstract`.
        """
        measured = {
            step: metrics[self._best]
            for step in self._manager.all_steps()
            if (metrics := self._manager.metrics(step))
        }
        order = sorted(measured, key=lambda step: (measured[step], step), reverse=True)
        best = self.best_step()
        # Of equal steps Orbax keeps one; the others are only for when it is damaged.
        order.sort(key=lambda step: step != best)
        return self._restore_first(order, abstract)

    def _restore_first(self, steps: list[int], abstract: Tree) -> tuple[Tree, dict[str, Any]]:
        """Returns (state, host state) of the first of some steps that is undamaged, and sets those
        before it aside.

        Raises UserError if all are damaged, or one does not fit `abstract`.
        """
        damaged: list[Damaged] = []
        for step in steps:
            try:
                found = self.restore(abstract, step)
            except Damaged as error:
                damaged.append(error)
                continue
            for error in damaged:
                if hosts.is_writer():
                    aside = self._set_aside(error.step)
                    said = f"It is set aside as {aside}, and the run goes on from step {step}."
                    print(f"{error} {said}", flush=True)
            if damaged:
                hosts.barrier("checkpoints set aside")
                self._manager.reload()
            return found
        raise UserError(
            f"{damaged[0]} No checkpoint is undamaged; start a new run in another --run folder."
        )

    def _clean(self) -> None:
        """Examines all checkpoints, deletes what killed processes left, sets damaged ones aside.

        Raises Damaged if there are checkpoints and none is whole, and UserError if they cannot be
        read.
        """
        files.remove(self.folder / _DELETED)
        steps = saved_steps(self.folder)
        found = {step: examine(self.folder / str(step)) for step in steps}
        whole = [step for step in steps if found[step].wrong is None]
        for step in steps:
            wrong = found[step].wrong
            if wrong is None:
                continue
            error = self._damage(step, wrong)
            if not whole:
                if step == steps[-1]:
                    raise error
            elif found[step].absent and step < whole[-1]:
                # As a deletion that was stopped leaves it.
                files.remove(self.folder / str(step))
                print(f"{error} It is deleted.", flush=True)
            else:
                print(f"{error} It is set aside as {self._set_aside(step)}.", flush=True)

    def _set_aside(self, step: int) -> str:
        """Moves a damaged checkpoint to where it is not taken for one; returns its new name.

        In a bucket it is copied and then deleted, because nothing there can be renamed.
        """
        damaged = self.folder / str(step)
        if not files.is_remote(damaged):
            aside = damaged.with_name(f"{step}.damaged")
            files.remove(aside)
            files.move(damaged, aside)
            return aside.name
        above = self.folder.with_name(f"{self.folder.name}.damaged")
        for name in files.tree(damaged):
            with explained(damaged / name, "copied"):
                buckets.copy_object(damaged / name, above / str(step) / name)
        files.remove(damaged)
        return f"{above.name}/{step}"

    def _seal(self, step: int) -> dict[str, Any] | None:
        """Returns a checkpoint's recorded checksums (`whole.Found`), as process 0 finds them.

        All processes must call this method. Raises Damaged if the checkpoint is not whole, and
        UserError if it cannot be read.
        """

        def look() -> list[Any]:
            """Returns [checksums, what is wrong]; called by process 0."""
            found = examine(self.folder / str(step))
            return [found.seal, found.wrong]

        seal, wrong = hosts.by_writer(look)
        if wrong is not None:
            raise self._damage(step, wrong)
        return seal

    def _is_out_of_reach(self, error: BaseException) -> bool:
        """Returns whether a checkpoint could not be read for a reason that is not damage: a bucket
        that does not answer, or a missing right.
        """
        said, text = reason(error), str(error)
        if files.is_remote(self.folder):
            return said is not None and "NOT_FOUND" not in text
        return isinstance(error, PermissionError) or "Permission denied" in text

    def _said(self, error: BaseException) -> str:
        """Returns the reason or a short message of an error, with the folder's own path."""
        said = reason(error) or short_message(error)
        return said.replace(str(self._path), str(self.folder))

    def _damage(self, step: int, what: str) -> Damaged:
        """Returns the error for a damaged checkpoint.

        Args:
            step: The checkpoint's step.
            what: The damaged part, for the message.
        """
        return Damaged(
            f"The checkpoint of step {step} in {self.folder} is damaged ({what}): what is read is "
            "not what was saved.",
            step,
        )

    def close(self) -> None:
        """Stops Orbax's threads."""
        self._manager.close()
        self._opened.close()


def _read_alone(folder: files.Path, abstract: Tree) -> tuple[Any, Exception | None]:
    """Reads a checkpoint without waiting for other processes; returns (items, error).

    The items have the fields `state` and `host`; they are None after an error. The error is None
    after success, and otherwise any error of Orbax or of its storage. The manager's own `restore`
    synchronises processes: one that cannot read its part would leave the others waiting.

    Args:
        folder: The folder of one checkpoint.
        abstract: The shapes, dtypes and shardings of the state's leaves.
    """
    alone = (
        {
            "multiprocessing_options": ocp.options.MultiprocessingOptions(
                active_processes={jax.process_index()}
            )
        }
        if hosts.is_distributed()
        else {}
    )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), host=ocp.args.JsonRestore())
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), **alone) as reader:
            return reader.restore(folder, args=args), None
    # Orbax and its storage raise errors of many types for unreadable bytes.
    except Exception as error:
        if hosts.is_peer_failure(error):
            raise
        hide_unretrieved_errors()
        return None, error


def newest_bytes(folder: files.Path) -> int | None:
    """Returns the size in bytes of the newest checkpoint in a `checkpoints/` folder.

    Returns None if there is no checkpoint.
    """
    steps = saved_steps(folder)
    return files.folder_bytes(folder / str(steps[-1])) if steps else None
