"""Artefacts: a role's adapter or weights in a folder of their own, to use elsewhere."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp

from perl_jax import errors
from perl_jax.adapters import lora as lora_lib
from perl_jax.adapters.lora import Adapter, LoRAConfig
from perl_jax.adapters.quantise import QuantiseConfig
from perl_jax.errors import UserError
from perl_jax.models.config import ModelConfig
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import files as files_lib
from perl_jax.runtime import hosts, trees
from perl_jax.runtime.storage import changed_leaves, first_line, say_once

RECORD = "artefact.json"


# 2: fingerprints cover what changes the function, and the content has checksums. Format 1 had
# neither.
FORMAT = 2


FORMATS = (1, 2)


@dataclasses.dataclass(frozen=True)
class Record:
    """What an artefact says of itself (`artefact.json`).

    role: policy, reward or value. base_name is for people, base_fingerprint decides. score_mean
    and score_std: a reward's normalisation, score = (raw - mean) / std; None on other roles.
    under: ranks of the frozen pairs beneath the adapter, by projection; None: there are none.
    turn_end: the ids that ended a response's turn (`Tokenizer.turn_end_ids`); None: not stated, as
    before they were kept. quantise: how the base was held in training; the fingerprint is that of
    its whole weights.
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
        errors.one_of("artefact.role", self.role, ("policy", "reward", "value"))
        errors.one_of("artefact.tuning", self.tuning, lora_lib.TUNINGS)
        rule = "alpha / rank" if self.lora is None else self.lora.scaling_rule
        errors.one_of("artefact.scaling", self.scaling, (rule,))
        errors.one_of("artefact.dtype", self.dtype, ("float32",))

    def normalise(self, scores: Any) -> Any:
        """(raw - mean) / std."""
        errors.require(
            self.score_mean is not None,
            f"The {self.role} artefact has no stored score normalisation.",
        )
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


def base_fingerprint(config: ModelConfig, weights: str) -> str:
    """16 hex digits of a base: its weights' (`trees.fingerprint`) and what its config makes of
    them.
    """
    return files_lib.digest([weights, config.function])


def save_artefact(folder: pathlib.Path, adapter: Adapter, record: Record) -> None:
    """Writes `tree/` (Orbax) and `artefact.json`; the folder appears complete or not at all.

    Of several processes each writes what only it has of the tree, one the rest; all return when it
    is there. `artefact.json` has a digest of each leaf, as it is in memory, and one of itself.
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
        files_lib.write_json(
            temporary / RECORD, files_lib.sealed({**files_lib.to_dict(values), "digests": content})
        )
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
    errors.require(path.exists(), f"{folder} is not an artefact: there is no {RECORD} in it.")
    values = files_lib.read_json(path)
    errors.require(isinstance(values, dict), f"{path} does not hold a JSON object.")
    found = values.get("format")
    errors.require(
        found in FORMATS,
        f"{path} has format {found!r}; this version reads formats "
        f"{' and '.join(map(str, FORMATS))}.",
    )
    if found > 1:
        errors.require(
            files_lib.is_whole(values),
            f"{path} is damaged: it does not have the checksum that it was written with.",
        )
        values.pop("checksum")
    content = values.pop("digests", None)
    return files_lib.from_dict(Record, values), content


def content_of(folder: pathlib.Path) -> Any:
    """A JSON value of all that an artefact holds, its record's numbers included; UserError where
    there is none.
    """
    record, content = _read_record(folder)
    files = (
        None
        if content is not None
        else {
            str(path.relative_to(folder)): files_lib.file_hash(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    )
    return [files_lib.to_dict(record), content, files]


def abstract_adapter(
    lm: LanguageModel,
    tuning: str,
    lora: LoRAConfig | None,
    has_head: bool,
    under: Mapping[str, int] | None = None,
) -> Adapter:
    """Shapes of a role's tree."""
    head = None
    if has_head:
        head = {
            "kernel": jax.ShapeDtypeStruct((lm.config.width,), np.float32),
            "bias": jax.ShapeDtypeStruct((), np.float32),
        }
    if tuning == "full":
        weights = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, np.float32), lm.abstract_base()
        )
        return Adapter(weights=weights, head=head)
    return Adapter(
        lora=lm.abstract_lora(lora),
        head=head,
        under=None if under is None else lm.abstract_under(under),
        config=lora,
    )


def load_artefact(
    folder: pathlib.Path,
    lm: LanguageModel,
    *,
    weights: str,
    base_name: str,
    role: str | None,
    shardings: Any = None,
) -> tuple[Adapter, Record]:
    """The adapter (float32) and the record of a saved role.

    Refuses, by name: another base than the one it was trained on; another role; a reward or value
    artefact without its head; a tree that does not fit its record, or is not what was saved.
    weights: the fingerprint of the base's (`trees.fingerprint`). role: None: whichever it holds.
    shardings: function from an abstract Adapter to its shardings; None: the default device.
    """
    record, content = _read_record(folder)
    base = weights if record.format == 1 else base_fingerprint(lm.config, weights)
    errors.require(
        record.base_fingerprint == base,
        f"{folder} was trained on the base {record.base_name} ({record.base_fingerprint}), "
        f"not on {base_name} ({base}); give --model the base it belongs to.",
    )
    errors.require(
        record.tuning == "full" or record.lora is not None,
        f"{folder / RECORD} says nothing of its adapter's size (lora).",
    )
    errors.require(
        role in (None, record.role),
        f"{folder} holds a {record.role} adapter; a {role} adapter is needed here.",
    )
    errors.require(
        record.has_head or record.role == "policy",
        f"{folder} is a {record.role} artefact without its scalar head; it cannot score.",
    )
    abstract = abstract_adapter(lm, record.tuning, record.lora, record.has_head, record.under)
    if shardings is not None:
        place = shardings(abstract)
    else:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        place = jax.tree.map(lambda _: device, abstract)
    abstract = jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), abstract, place
    )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            adapter = checkpointer.restore((folder / "tree").absolute(), abstract)
    # Storage has errors of many kinds for bytes that it cannot read.
    except Exception as error:
        if hosts.lost(error):
            raise
        say_once()
        raise UserError(
            f"The tree in {folder} does not fit its {RECORD}, or is damaged: {first_line(error)}"
        ) from error
    changed = [] if content is None else changed_leaves(adapter, content)
    errors.require(
        not changed, f"The tree in {folder} is damaged: {', '.join(changed)} is not what was saved."
    )
    return adapter, record
