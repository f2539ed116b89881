"""Checkpoints of a run (Orbax, atomic, every role, no base leaf) and artefacts to use elsewhere."""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import shutil
from typing import Any, Literal, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from perl_jax import config as config_lib
from perl_jax import hosts
from perl_jax import lora as lora_lib
from perl_jax import trees
from perl_jax.config import UserError
from perl_jax.lora import Adapter, LoRAConfig
from perl_jax.models.config import ModelConfig
from perl_jax.models.language_model import LanguageModel
from perl_jax.quantise import QuantiseConfig
from perl_jax.types import Tree

RECORD = "artefact.json"
# 2: fingerprints cover what changes the function, and the content has checksums. Format 1 had neither.
FORMAT = 2
FORMATS = (1, 2)
# The item of a checkpoint that holds the checksums of the others; older versions wrote none.
_SEAL = "digests"


# Characters of an error of the storage in a message.
_SAID = 300


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
            policies.append(BestN(get_metric_fn=lambda metrics: metrics[best], n=1, keep_checkpoints_without_metrics=False))
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
            raise UserError(f"The checkpoints in {folder} cannot be read: {_first_line(error)}") from error

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step; None when there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the best metric; None when none was saved with one."""
        return self._manager.best_step()

    def save(self, state: Tree, host: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Saves the state under its step; `metrics` only where they were measured at this step.

        Checksums of the state as it is in memory, of `host` and of `metrics` are part of the checkpoint.
        """
        step = int(state.step)
        metrics = None if metrics is None or self._best is None else dict(metrics)
        seal = config_lib.sealed({"state": trees.digests(state), "host": config_lib.digest(host), "metrics": config_lib.digest(metrics)})
        items = {"state": ocp.args.StandardSave(state), "host": ocp.args.JsonSave(dict(host)), _SEAL: ocp.args.JsonSave(seal)}
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def restore(self, abstract: Tree, step: int | None = None) -> tuple[Tree, dict[str, Any]]:
        """State (on the shardings of `abstract`'s leaves) and host state of a step, default the newest.

        Raises UserError when the checkpoint's tree does not fit the job's, and Damaged when what is
        read is not what was saved: on all processes, even where one alone cannot read its part.
        """
        step = self._manager.latest_step() if step is None else step
        seal = self._seal(step)
        wanted = {name: trees.kind(leaf) for name, leaf in trees.named_leaves(abstract).items()}
        fits = seal is None or wanted == {name: text.partition(":")[0] for name, text in seal["state"].items()}
        restored, error = _read_alone(self.folder / str(step), abstract)
        if hosts.anyone(error is not None):
            error = error or UserError("another process cannot read its part")
            if seal is None and not isinstance(error, (ValueError, UserError)):
                raise error
            if seal is not None and fits:
                raise self._damage(step, _first_line(error)) from error
            raise UserError(f"The checkpoint of step {step} in {self.folder} does not fit this job: {error}") from error
        if not fits:
            other = sorted(name for name in wanted.keys() | seal["state"].keys() if wanted.get(name) != seal["state"].get(name, "").partition(":")[0])
            raise UserError(f"The checkpoint of step {step} in {self.folder} does not fit this job: {', '.join(other)}.")
        if seal is not None:
            changed = changed_leaves(restored.state, seal["state"])
            if changed or config_lib.digest(restored.host) != seal["host"]:
                raise self._damage(step, ", ".join(changed) or "its data cursor")
        return restored.state, restored.host

    def restore_newest(self, abstract: Tree) -> tuple[Tree, dict[str, Any]]:
        """`restore` of the newest whole checkpoint; damaged ones after it are removed, which is said.

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
                    print(f"{error} It is removed, and the run goes on from step {step}.", flush=True)
                self._manager.delete(error.step)
            return found
        raise UserError(f"{damaged[0]} There is no whole one; begin the run anew, in another --run folder.")

    def _check_seals(self) -> None:
        """Sets a damaged newest step aside where there are others; UserError for what cannot be done without.

        The best step is chosen among all by their metrics, so that where one is kept all must be whole.
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
        """The checksums of a step, its metrics' already compared; None: an older version saved it."""
        folder = self.folder / str(step)
        if not (folder / _SEAL).exists():
            return None
        try:
            seal = config_lib.read_json(folder / _SEAL / "metadata")
            metrics = config_lib.read_json(folder / "metrics" / "metrics") if (folder / "metrics").exists() else None
        except UserError as error:
            raise self._damage(step, str(error).removesuffix(".")) from error
        if not config_lib.is_whole(seal) or config_lib.digest(metrics) != seal["metrics"]:
            raise self._damage(step, "its checksums or its metrics")
        return seal

    def _damage(self, step: int, what: str) -> Damaged:
        return Damaged(f"The checkpoint of step {step} in {self.folder} is damaged ({what}): what is read is not what was saved.", step)

    def close(self) -> None:
        """Releases Orbax's threads."""
        self._manager.close()


def _read_alone(folder: pathlib.Path, abstract: Tree) -> tuple[Any, Exception | None]:
    """What this process reads of a checkpoint, or the error that it meets.

    Processes do not wait for each other in here, as the manager's own `restore` makes them do: one that
    cannot read its part would leave the others waiting.
    """
    alone = {"multiprocessing_options": ocp.options.MultiprocessingOptions(active_processes={jax.process_index()})} if hosts.several() else {}
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), host=ocp.args.JsonRestore())
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), **alone) as reader:
            return reader.restore(folder, args=args), None
    # Storage has errors of many kinds for bytes that it cannot read.
    except Exception as error:
        if hosts.lost(error):
            raise
        _say_once()
        return None, error


@dataclasses.dataclass(frozen=True)
class Record:
    """What an artefact says of itself (`artefact.json`).

    role: policy, reward or value. base_name is for people, base_fingerprint decides. score_mean
    and score_std: a reward's normalisation, score = (raw - mean) / std; None on other roles.
    under: ranks of the frozen pairs beneath the adapter, by projection; None: there are none.
    turn_end: the ids that ended a response's turn (`Tokenizer.turn_end_ids`); None: not stated, as before they were kept.
    quantise: how the base was held in training; the fingerprint is that of its whole weights.
    """

    role: Literal["policy", "reward", "value"]
    tuning: Literal["lora", "full"]
    lora: LoRAConfig | None
    has_head: bool
    base_name: str
    base_fingerprint: str
    tokenizer_fingerprint: str
    step: int
    metrics: dict
    score_mean: float | None = None
    score_std: float | None = None
    scaling: str = "alpha / rank"
    under: dict[str, int] | None = None
    turn_end: tuple[int, ...] | None = None
    quantise: QuantiseConfig = QuantiseConfig()
    dtype: str = "float32"
    format: int = FORMAT

    def __post_init__(self) -> None:
        config_lib.one_of("artefact.role", self.role, ("policy", "reward", "value"))
        config_lib.one_of("artefact.tuning", self.tuning, config_lib.TUNINGS)
        rule = "alpha / rank" if self.lora is None else self.lora.scaling_rule
        config_lib.one_of("artefact.scaling", self.scaling, (rule,))
        config_lib.one_of("artefact.dtype", self.dtype, ("float32",))

    def normalise(self, scores: Any) -> Any:
        """(raw - mean) / std."""
        config_lib.require(self.score_mean is not None, f"The {self.role} artefact has no stored score normalisation.")
        return (scores - self.score_mean) / self.score_std


def record_of(adapter: Adapter, **values: Any) -> Record:
    """The record of a role: what its tree says of itself, and `values`."""
    return Record(
        tuning="full" if adapter.weights is not None else "lora",
        lora=adapter.config,
        has_head=adapter.head is not None,
        scaling="alpha / rank" if adapter.config is None else adapter.config.scaling_rule,
        under=lora_lib.under_ranks(adapter.under),
        **values,
    )


def _first_line(error: BaseException) -> str:
    """What storage says, without its settings, which are a page."""
    line = str(error).strip().partition("\n")[0].partition(" [tensorstore_spec")[0]
    return (line if len(line) <= _SAID else f"{line[:_SAID]} ...") or type(error).__name__


def _say_once() -> None:
    """Keeps asyncio from showing, much later, what the other reads of a checkpoint failed of too."""
    logging.getLogger("asyncio").addFilter(_retrieved)


def _retrieved(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def changed_leaves(tree: Tree, saved: Mapping[str, str]) -> list[str]:
    """Names of leaves whose content is not that of the saved digests (`trees.digests`)."""
    return sorted(name for name, text in trees.digests(tree).items() if saved.get(name) != text)


def base_fingerprint(config: ModelConfig, weights: str) -> str:
    """16 hex digits of a base: its weights' (`trees.fingerprint`) and what its config makes of them."""
    return config_lib.digest([weights, config.function])


def save_artefact(folder: pathlib.Path, adapter: Adapter, record: Record) -> None:
    """Writes `tree/` (Orbax) and `artefact.json`; the folder appears complete or not at all.

    Of several processes each writes what only it has of the tree, one the rest; all return when it is there.
    `artefact.json` has a digest of each leaf, as it is in memory, and one of itself.
    """
    content = trees.digests(adapter)
    temporary = folder.with_name(folder.name + ".tmp")
    if hosts.is_writer():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    hosts.barrier("artefact begun")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((temporary / "tree").absolute(), adapter)
    if hosts.is_writer():
        values = dataclasses.replace(record, format=FORMAT)
        config_lib.write_json(temporary / RECORD, config_lib.sealed({**config_lib.to_dict(values), "digests": content}))
        _put_in_place(temporary, folder)
    hosts.barrier("artefact written")


def _put_in_place(temporary: pathlib.Path, folder: pathlib.Path) -> None:
    """Renames a complete artefact to its name; one that was there gives way."""
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old)
    else:
        temporary.rename(folder)


def read_record(folder: pathlib.Path) -> Record:
    """The record of an artefact; a folder without one is a UserError."""
    return _read_record(folder)[0]


def _read_record(folder: pathlib.Path) -> tuple[Record, dict[str, str] | None]:
    """The record, and the digests of the tree's leaves; None: an older version wrote none."""
    path = folder / RECORD
    config_lib.require(path.exists(), f"{folder} is not an artefact: there is no {RECORD} in it.")
    values = config_lib.read_json(path)
    config_lib.require(isinstance(values, dict), f"{path} does not hold a JSON object.")
    found = values.get("format")
    config_lib.require(found in FORMATS, f"{path} has format {found!r}; this version reads formats {' and '.join(map(str, FORMATS))}.")
    if found > 1:
        config_lib.require(config_lib.is_whole(values), f"{path} is damaged: it does not have the checksum that it was written with.")
        values.pop("checksum")
    content = values.pop("digests", None)
    return config_lib.from_dict(Record, values), content


def content_of(folder: pathlib.Path) -> Any:
    """A JSON value of all that an artefact holds, its record's numbers included; UserError where there is none."""
    record, content = _read_record(folder)
    files = None if content is not None else {str(path.relative_to(folder)): config_lib.file_hash(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    return [config_lib.to_dict(record), content, files]


def abstract_adapter(
    lm: LanguageModel, tuning: str, lora: LoRAConfig | None, has_head: bool, under: Mapping[str, int] | None = None
) -> Adapter:
    """Shapes of a role's tree."""
    head = None
    if has_head:
        head = {"kernel": jax.ShapeDtypeStruct((lm.config.width,), np.float32), "bias": jax.ShapeDtypeStruct((), np.float32)}
    if tuning == "full":
        weights = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, np.float32), lm.abstract_base())
        return Adapter(weights=weights, head=head)
    return Adapter(lora=lm.abstract_lora(lora), head=head, under=None if under is None else lm.abstract_under(under), config=lora)


def load_artefact(
    folder: pathlib.Path, lm: LanguageModel, *, weights: str, base_name: str, role: str | None, shardings: Any = None
) -> tuple[Adapter, Record]:
    """The adapter (float32) and the record of a saved role.

    Refuses, by name: another base than the one it was trained on; another role; a reward or value
    artefact without its head; a tree that does not fit its record, or is not what was saved.
    weights: the fingerprint of the base's (`trees.fingerprint`). role: None: whichever it holds.
    shardings: function from an abstract Adapter to its shardings; None: the default device.
    """
    record, content = _read_record(folder)
    base = weights if record.format == 1 else base_fingerprint(lm.config, weights)
    config_lib.require(
        record.base_fingerprint == base,
        f"{folder} was trained on the base {record.base_name} ({record.base_fingerprint}), "
        f"not on {base_name} ({base}); give --model the base it belongs to.",
    )
    config_lib.require(record.tuning == "full" or record.lora is not None, f"{folder / RECORD} says nothing of its adapter's size (lora).")
    config_lib.require(role in (None, record.role), f"{folder} holds a {record.role} adapter; a {role} adapter is needed here.")
    config_lib.require(record.has_head or record.role == "policy", f"{folder} is a {record.role} artefact without its scalar head; it cannot score.")
    abstract = abstract_adapter(lm, record.tuning, record.lora, record.has_head, record.under)
    if shardings is not None:
        place = shardings(abstract)
    else:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        place = jax.tree.map(lambda _: device, abstract)
    abstract = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), abstract, place)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            adapter = checkpointer.restore((folder / "tree").absolute(), abstract)
    # Storage has errors of many kinds for bytes that it cannot read.
    except Exception as error:
        if hosts.lost(error):
            raise
        _say_once()
        raise UserError(f"The tree in {folder} does not fit its {RECORD}, or is damaged: {_first_line(error)}") from error
    changed = [] if content is None else changed_leaves(adapter, content)
    config_lib.require(not changed, f"The tree in {folder} is damaged: {', '.join(changed)} is not what was saved.")
    return adapter, record


def saved_steps(folder: pathlib.Path) -> list[int]:
    """Steps in a `checkpoints/` folder, in order; what was set aside (`5.damaged`) or is half written is none."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdecimal())


def newest_bytes(folder: pathlib.Path) -> int | None:
    """Bytes of the newest checkpoint in a `checkpoints/` folder; None: there is none."""
    steps = saved_steps(folder)
    return folder_bytes(folder / str(steps[-1])) if steps else None


def folder_bytes(folder: pathlib.Path) -> int:
    """Bytes of all files below a folder."""
    return sum(os.path.getsize(path) for path in folder.rglob("*") if path.is_file())
