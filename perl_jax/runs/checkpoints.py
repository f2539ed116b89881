"""Checkpoints of a run: atomic Orbax directories that hold every role's adapter but no base
weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from perl_jax.errors import UserError
from perl_jax.runtime import files, hosts, trees
from perl_jax.runtime.storage import changed_leaves, hide_unretrieved_errors, short_message
from perl_jax.types import Tree

# The item of a checkpoint that holds checksums of the other items; earlier versions wrote none.
_SEAL = "digests"


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

    A checkpoint is one atomic Orbax directory with three items: the TrainState (roles, optimizer
    states, key, step), the host state (a JSON object with the data cursor), and checksums of both
    and of the metrics. `save` returns only when the checkpoint is on disk, because the state's
    buffers are donated to the next step. A half-written checkpoint is never listed.

    Opening verifies the checksums of all checkpoints' metrics. A damaged newest checkpoint is
    renamed to `STEP.damaged` if there are others.

    Args:
        folder: The `checkpoints/` folder; created if it does not exist.
        keep: How many of the newest checkpoints to keep.
        best: The metric, among those given to `save`, whose largest value marks the best step; None
            keeps the newest steps only.

    Raises:
        UserError: The checkpoints cannot be read, or a damaged one is needed.
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
        )
        self.folder = files.absolute(folder)
        # Before the manager reads the metrics, from which it picks the best step.
        self._check_seals()
        hosts.barrier("checkpoints checked")
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except Exception as error:
            if hosts.is_peer_failure(error):
                raise
            raise UserError(
                f"The checkpoints in {folder} cannot be read: {short_message(error)}"
            ) from error

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
        """
        step = int(state.step)
        metrics = None if metrics is None or self._best is None else dict(metrics)
        seal = files.with_checksum(
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
        restored, error = _read_alone(self.folder / str(step), abstract)
        if hosts.any_process(error is not None):
            error = error or UserError("another process cannot read its part")
            if seal is None and not isinstance(error, (ValueError, UserError)):
                raise error
            if seal is not None and fits:
                raise self._damage(step, short_message(error)) from error
            raise UserError(
                f"The checkpoint of step {step} in {self.folder} does not fit this job: {error}"
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
            if changed or files.digest(restored.host) != seal["host"]:
                raise self._damage(step, ", ".join(changed) or "its data cursor")
        return restored.state, restored.host

    def restore_newest(self, abstract: Tree) -> tuple[Tree, dict[str, Any]]:
        """Returns (state, host state) of the newest undamaged checkpoint.

        There must be a checkpoint. Damaged checkpoints that are newer than the returned one are
        deleted, with a printed message. All processes must call this method.

        Args:
            abstract: The shapes, dtypes and shardings of the state's leaves.

        Raises:
            UserError: All checkpoints are damaged, or one does not fit `abstract`.
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
            f"{damaged[0]} No checkpoint is undamaged; start a new run in another --run folder."
        )

    def _check_seals(self) -> None:
        """Verifies the seals (recorded checksums) of all checkpoints and, by them, the metrics,
        which decide which step is the best.

        A damaged newest checkpoint is renamed to `STEP.damaged` if there are others. Raises Damaged
        if a best step is kept and another checkpoint is damaged, or if the only checkpoint is
        damaged.
        """
        steps = saved_steps(self.folder)
        for step in steps:
            try:
                self._seal(step)
            except Damaged as error:
                if step == steps[-1] and len(steps) > 1:
                    if hosts.is_writer():
                        aside = self.folder / f"{step}.damaged"
                        files.remove(aside)
                        files.move(self.folder / str(step), aside)
                        print(f"{error} It is set aside as {aside.name}.", flush=True)
                elif self._best is not None or len(steps) == 1:
                    raise

    def _seal(self, step: int) -> dict[str, Any] | None:
        """Returns a checkpoint's recorded checksums; None: an earlier version saved it without any.

        The keys are `state` (a text with dtype, shape and checksum per leaf), `host` and `metrics`.

        Raises Damaged if the checksums themselves or the metrics are damaged.
        """
        folder = self.folder / str(step)
        if not files.exists(folder / _SEAL):
            return None
        try:
            seal = files.read_json(folder / _SEAL / "metadata")
            metrics = (
                files.read_json(folder / "metrics" / "metrics")
                if files.exists(folder / "metrics")
                else None
            )
        except UserError as error:
            raise self._damage(step, str(error).removesuffix(".")) from error
        if not files.has_valid_checksum(seal) or files.digest(metrics) != seal["metrics"]:
            raise self._damage(step, "its checksums or its metrics")
        return seal

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


def saved_steps(folder: files.PathLike) -> list[int]:
    """Returns the steps of complete checkpoints in a `checkpoints/` folder, in ascending order."""
    return sorted(int(path.name) for path in files.listing(folder) if path.name.isdecimal())


def newest_bytes(folder: files.Path) -> int | None:
    """Returns the size in bytes of the newest checkpoint in a `checkpoints/` folder.

    Returns None if there is no checkpoint.
    """
    steps = saved_steps(folder)
    return files.folder_bytes(folder / str(steps[-1])) if steps else None
