"""Checkpoints of a run (Orbax, atomic, every role, no base leaf) and artefacts to use elsewhere."""

from __future__ import annotations

import dataclasses
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
from perl_jax.config import UserError
from perl_jax.lora import Adapter, LoRAConfig
from perl_jax.models.language_model import LanguageModel
from perl_jax.quantise import QuantiseConfig
from perl_jax.state import TrainState

RECORD = "artefact.json"
FORMAT = 1


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
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step; None when there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the best metric; None when none was saved with one."""
        return self._manager.best_step()

    def save(self, state: TrainState, host: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Saves the state under its step; `metrics` only where they were measured at this step."""
        step = int(state.step)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(dict(host)))
        self._manager.save(step, args=args, metrics=None if metrics is None else dict(metrics), force=True)

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """State (on the shardings of `abstract`'s leaves) and host state of a step, default the newest.

        Raises UserError when the checkpoint's tree does not fit the job's.
        """
        step = self._manager.latest_step() if step is None else step
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), host=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
        except ValueError as error:
            raise UserError(f"The checkpoint of step {step} in {self._manager.directory} does not fit this job: {error}") from error
        return restored.state, restored.host

    def close(self) -> None:
        """Releases Orbax's threads."""
        self._manager.close()


@dataclasses.dataclass(frozen=True)
class Record:
    """What an artefact says of itself (`artefact.json`).

    role: policy, reward or value. base_name is for people, base_fingerprint decides. score_mean
    and score_std: a reward's normalisation, score = (raw - mean) / std; None on other roles.
    under: ranks of the frozen pairs beneath the adapter, by projection; None: there are none.
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
    quantise: QuantiseConfig = QuantiseConfig()
    dtype: str = "float32"
    format: int = FORMAT

    def __post_init__(self) -> None:
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


def save_artefact(folder: pathlib.Path, adapter: Adapter, record: Record) -> None:
    """Writes `tree/` (Orbax) and `artefact.json`; the folder appears complete or not at all.

    Of several processes each writes what only it has of the tree, one the rest; all return when it is there.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    if hosts.is_writer():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    hosts.barrier("artefact begun")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((temporary / "tree").absolute(), adapter)
    if hosts.is_writer():
        config_lib.write_json(temporary / RECORD, config_lib.to_dict(record))
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
    path = folder / RECORD
    config_lib.require(path.exists(), f"{folder} is not an artefact: there is no {RECORD} in it.")
    values = config_lib.read_json(path)
    config_lib.require(isinstance(values, dict), f"{path} does not hold a JSON object.")
    found = values.get("format")
    config_lib.require(found == FORMAT, f"{path} has format {found!r}; this version reads format {FORMAT}.")
    return config_lib.from_dict(Record, values)


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
    folder: pathlib.Path, lm: LanguageModel, *, base_fingerprint: str, base_name: str, role: str | None, shardings: Any = None
) -> tuple[Adapter, Record]:
    """The adapter (float32) and the record of a saved role.

    Refuses, by name: another base than the one it was trained on; another role; a reward or value
    artefact without its head; a tree that does not fit its record. role: None: whichever it holds.
    shardings: function from an abstract Adapter to its shardings; None: the default device.
    """
    record = read_record(folder)
    config_lib.require(
        record.base_fingerprint == base_fingerprint,
        f"{folder} was trained on the base {record.base_name} ({record.base_fingerprint}), "
        f"not on {base_name} ({base_fingerprint}); give --model the base it belongs to.",
    )
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
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise UserError(f"The tree in {folder} does not fit its {RECORD}: {str(error).splitlines()[0]}") from error
    return adapter, record


def folder_bytes(folder: pathlib.Path) -> int:
    """Bytes of all files below a folder."""
    return sum(os.path.getsize(path) for path in folder.rglob("*") if path.is_file())
