"""Artefacts: a trained role (adapter or full weights) in a folder of its own, to be used
elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp

from perl_jax.adapters.lora import LINEAR, TUNINGS, Adapter, LoRAConfig, under_ranks
from perl_jax.adapters.quantise import QuantiseConfig
from perl_jax.errors import (
    MOST,
    UserError,
    in_range,
    listed,
    one_of,
    positive,
    require,
    shown,
    whole,
)
from perl_jax.models.config import ModelConfig
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import files, hosts, json_values, trees
from perl_jax.runtime.faults import explained
from perl_jax.runtime.storage import (
    changed_leaves,
    hide_unretrieved_errors,
    plain_path,
    saving,
    short_message,
)

RECORD = "artefact.json"
# Names of the tree's folder. An artefact that replaces another one has the other's other name.
TREES = ("tree", "tree.2")
# What Orbax writes last into a tree; without it nothing of the tree can be read.
_MANIFEST = "manifest.ocdbt"
# Endings of the folders that earlier versions wrote beside an artefact, and left when killed.
_EARLIER = (".tmp", ".old")


# Format 2 added checksums, and fingerprints that cover every setting that affects outputs.
FORMAT = 2
FORMATS = (1, 2)


@dataclasses.dataclass(frozen=True)
class Record:
    """The description of an artefact, `artefact.json`.

    Attributes:
        role: policy, reward or value.
        tuning: lora (an adapter) or full (all weights).
        lora: The adapter's configuration; None for full tuning.
        has_head: Whether the role has a scalar head.
        base_name: The base model's name, for people only.
        base_fingerprint: Identifies the base model (`base_fingerprint`). A quantised base has the
            fingerprint of its unquantised weights.
        tokenizer_fingerprint: Identifies the tokenizer and its chat template.
        step: The training step that the role is from.
        metrics: Metrics at that step.
        score_mean: The mean of a reward model's scores, to normalise them; None for other roles.
        score_std: The standard deviation of a reward model's scores; None for other roles.
        scaling: The formula of the adapter's scale.
        under: Ranks, by projection, of frozen pairs beneath the trained adapter; None if there are
            none.
        turn_end: The ids that ended a response's turn in training (`Tokenizer.turn_end_ids`); None
            if the artefact's version did not record them.
        quantise: How the base was quantised in training.
        dtype: The dtype of the stored tree.
        format: The version of the file format.
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
        in_range(self, "artefact")
        whole("artefact.step", self.step, zero=True)
        if self.score_std is not None:
            positive("artefact.score_std", self.score_std)
        for index in self.turn_end or ():
            whole("artefact.turn_end", index, zero=True)
        for target, rank in (self.under or {}).items():
            one_of("artefact.under", target, LINEAR)
            whole(f"artefact.under of {target}", rank, most=MOST["rank"])
        require(
            (self.score_mean is None) == (self.score_std is None),
            f"artefact.score_mean is {self.score_mean} and artefact.score_std {self.score_std}; "
            "either both or none must be there.",
        )
        one_of("artefact.role", self.role, ("policy", "reward", "value"))
        one_of("artefact.tuning", self.tuning, TUNINGS)
        rule = "alpha / rank" if self.lora is None else self.lora.scaling_rule
        one_of("artefact.scaling", self.scaling, (rule,))
        one_of("artefact.dtype", self.dtype, ("float32",))

    def normalise(self, scores: Any) -> Any:
        """Returns (scores - score_mean) / score_std, with the shape of `scores`.

        Args:
            scores: Scores of the reward model, not normalised.

        Raises:
            UserError: The role has no normalisation.
        """
        require(
            self.score_mean is not None,
            f"The {self.role} artefact has no stored score normalisation.",
        )
        return (scores - self.score_mean) / self.score_std


def record_of(adapter: Adapter, **values: Any) -> Record:
    """Returns the record of a role.

    Args:
        adapter: The role; gives the fields tuning, lora, has_head, scaling and under.
        values: The other fields of `Record` that have no default, and any that differ from it.
    """
    return Record(
        tuning="full" if adapter.weights is not None else "lora",
        lora=adapter.config,
        has_head=adapter.head is not None,
        scaling="alpha / rank" if adapter.config is None else adapter.config.scaling_rule,
        under=under_ranks(adapter.under),
        **values,
    )


def base_fingerprint(config: ModelConfig, weights: str) -> str:
    """Returns 16 hex digits that identify a base: its weights and the config fields that affect its
    outputs.

    Args:
        config: The base's configuration; its `function` has these fields.
        weights: The fingerprint of the weights (`trees.fingerprint`).
    """
    return json_values.digest([weights, config.function])


def save_artefact(folder: files.Path, adapter: Adapter, record: Record) -> None:
    """Writes an artefact: first the tree (Orbax), then `artefact.json`, whose presence shows that
    the artefact is complete.

    A folder without that file is no artefact and is overwritten. An existing artefact is replaced:
    the new tree is written beside the old one, `artefact.json` is replaced in one step, and
    everything else in the folder is deleted. So a process that is killed leaves the old artefact or
    the new one, on a disk and in a bucket.

    With several processes all must call this function: each writes the parts of the tree that it
    alone holds, the first writes the rest, and all return when the artefact is complete.
    `artefact.json` contains a digest of each leaf as it is in memory, and a checksum of the file.

    Args:
        folder: The artefact's folder.
        adapter: The role.
        record: Its record; the format is set to `FORMAT`.

    Raises:
        FileError: The folder cannot be written.
    """
    content = trees.digests(adapter)
    target = files.absolute(folder)
    tree = TREES[hosts.broadcast_flag(_tree_of(target) == TREES[0])]
    if hosts.is_writer():
        files.make_folder(target)
        files.remove(target / tree)
    hosts.barrier("artefact begun")
    with (
        explained(folder, "written"),
        saving(),
        plain_path(target) as path,
        ocp.StandardCheckpointer() as checkpointer,
    ):
        checkpointer.save(path / tree, adapter)
    if hosts.is_writer():
        require(
            files.exists(target / tree / _MANIFEST),
            f"The tree in {folder} was saved, but cannot be read back: it has no {_MANIFEST}.",
        )
        values = json_values.to_dict(dataclasses.replace(record, format=FORMAT))
        # Read by earlier versions too, if the tree has its first name.
        named = {} if tree == TREES[0] else {"tree": tree}
        files.write_json(
            target / RECORD, json_values.with_checksum({**values, **named, "digests": content})
        )
        for path in files.listing(target):
            if path.name not in (RECORD, tree):
                files.remove(path)
        if not files.is_remote(target):
            for ending in _EARLIER:
                files.remove(target.with_name(target.name + ending))
    hosts.barrier("artefact written")


def _tree_of(folder: files.Path) -> str | None:
    """Returns the name of the folder of an artefact's tree; None if there is no such artefact."""
    if not files.exists(folder / RECORD):
        return None
    try:
        return _read_record(folder)[2]
    except UserError:
        return None


def read_record(folder: files.Path) -> Record:
    """Returns the record of an artefact.

    Raises UserError if the folder holds none, its format is unknown, or the record is damaged.
    """
    return _read_record(folder)[0]


def _read_record(folder: files.Path) -> tuple[Record, dict[str, str] | None, str]:
    """Returns (record, digests of the tree's leaves by name, name of the tree's folder); the
    digests are None in format 1.

    Raises UserError if the folder holds no artefact, its format is unknown, or the record is
    damaged.
    """
    path = folder / RECORD
    if not files.exists(path):
        within = [str(found) for found in _in_run(folder)]
        hint = f"; did you mean {listed(within, separator=' or ')}?" if within else "."
        raise UserError(f"{folder} is not an artefact: there is no {RECORD} in it{hint}")
    values = files.read_json(path)
    require(isinstance(values, dict), f"{path} does not hold a JSON object.")
    found = values.get("format")
    require(
        found in FORMATS,
        f"{path} has format {shown(found)}; this version reads formats "
        f"{' and '.join(map(str, FORMATS))}.",
    )
    if found > 1:
        require(
            json_values.has_valid_checksum(values),
            f"{path} is damaged: it does not have the checksum that it was written with.",
        )
        values.pop("checksum")
    content = values.pop("digests", None)
    good = content is None or (
        isinstance(content, dict) and all(isinstance(text, str) for text in content.values())
    )
    require(good, f"{path}.digests is {shown(content)}; it must be an object of texts.")
    tree = values.pop("tree", TREES[0])
    require(tree in TREES, f"{path} names the folder {tree!r} for its tree.")
    return json_values.from_dict(Record, values, str(path)), content, tree


def _in_run(folder: files.Path) -> list[files.Path]:
    """Returns the folders of a run's artefacts, `adapters/ROLE`, sorted by name; [] for a folder
    that is no run.
    """
    return [path for path in files.listing(folder / "adapters") if files.exists(path / RECORD)]


def content_of(folder: files.Path) -> Any:
    """Returns a JSON value that identifies an artefact's content: [record, digests, file hashes].

    The digests of the tree's leaves are None in an artefact of format 1, which has none; then
    hashes of all its files by name replace them. Otherwise the file hashes are None. Raises
    UserError if the folder holds no artefact.
    """
    record, content, _ = _read_record(folder)
    hashes = (
        None
        if content is not None
        else {name: files.file_hash(folder / name) for name in files.tree(folder)}
    )
    return [json_values.to_dict(record), content, hashes]


def abstract_adapter(
    lm: LanguageModel,
    tuning: str,
    lora: LoRAConfig | None,
    has_head: bool,
    under: Mapping[str, int] | None = None,
) -> Adapter:
    """Returns a role's tree with `jax.ShapeDtypeStruct` leaves, all float32.

    Args:
        lm: The base model's functions.
        tuning: lora or full.
        lora: The adapter's configuration; None for full tuning.
        has_head: Whether the role has a scalar head.
        under: Ranks of frozen pairs beneath the adapter, by projection; None if there are none.
    """
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
    if lora is None:
        raise ValueError(f"tuning {tuning} needs a LoRA config")
    return Adapter(
        lora=lm.abstract_lora(lora),
        head=head,
        under=None if under is None else lm.abstract_under(under),
        config=lora,
    )


def require_role(folder: files.Path, record: Record, role: str | None) -> None:
    """Raises UserError if an artefact has another role.

    Args:
        folder: The artefact's folder, for the message.
        record: Its record.
        role: The role that it must have; None accepts any.
    """
    require(
        role in (None, record.role),
        f"{folder} holds a {record.role} adapter; a {role} adapter is needed here.",
    )


def load_artefact(
    folder: files.Path,
    lm: LanguageModel,
    *,
    weights: str,
    base_name: str,
    role: str | None,
    shardings: Any = None,
) -> tuple[Adapter, Record]:
    """Returns (role in float32, record) of an artefact.

    Args:
        folder: The artefact's folder.
        lm: The base model's functions.
        weights: The fingerprint of the base's weights (`trees.fingerprint`).
        base_name: The base's name, for messages.
        role: The role that the artefact must have; None accepts any.
        shardings: Maps an abstract Adapter to its shardings; None puts the role on the default
            device.

    Raises:
        UserError: The artefact belongs to another base or has another role, a reward or value model
            has no head, or the tree does not fit its record or is damaged.
    """
    record, content, tree = _read_record(folder)
    base = weights if record.format == 1 else base_fingerprint(lm.config, weights)
    require(
        record.base_fingerprint == base,
        f"{folder} was trained on the base {record.base_name[:200]} "
        f"({record.base_fingerprint[:16]}), "
        f"not on {base_name} ({base}); give --model the base it belongs to.",
    )
    require(
        record.tuning == "full" or record.lora is not None,
        f"{folder / RECORD} does not describe its adapter (field lora is null).",
    )
    require_role(folder, record, role)
    require(
        record.has_head or record.role == "policy",
        f"{folder} is a {record.role} artefact without its scalar head; it cannot score.",
    )
    abstract = abstract_adapter(lm, record.tuning, record.lora, record.has_head, record.under)
    if shardings is not None:
        where = shardings(abstract)
    else:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        where = jax.tree.map(lambda _: device, abstract)
    abstract = jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), abstract, where
    )
    try:
        with (
            plain_path(files.absolute(folder)) as path,
            ocp.StandardCheckpointer() as checkpointer,
        ):
            adapter = checkpointer.restore(path / tree, abstract)
    # Orbax and its storage raise errors of many types for unreadable bytes.
    except Exception as error:
        if hosts.is_peer_failure(error):
            raise
        hide_unretrieved_errors()
        raise UserError(
            f"The tree in {folder} does not fit its {RECORD}, or is damaged: {short_message(error)}"
        ) from error
    wrong = trees.not_finite(adapter)
    require(not wrong, f"The tree in {folder} holds NaN or infinity: {listed(wrong)}.")
    changed = [] if content is None else changed_leaves(adapter, content)
    require(
        not changed, f"The tree in {folder} is damaged: {', '.join(changed)} is not what was saved."
    )
    return adapter, record
