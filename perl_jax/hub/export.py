"""`perl-jax export`: writes a role as a PEFT adapter or as a merged checkpoint, and verifies it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from perl_jax.adapters import combine
from perl_jax.adapters.lora import Adapter
from perl_jax.errors import require
from perl_jax.hub import classifier, naming, peft, verify, weights
from perl_jax.hub.artefacts import Record
from perl_jax.hub.model import Model, TemplateOptions, load_model
from perl_jax.runtime import files, progress, trees
from perl_jax.runtime.buckets import is_remote
from perl_jax.runtime.outputs import new_folder

# A merged checkpoint is written in files of about so many bytes.
_SHARD_BYTES = 4 * 2**30
# In the header of every exported file, beside what transformers expects there.
METADATA = {"format": "pt", "written_by": "perl_jax export"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(TemplateOptions):
    """Write a role as a PEFT adapter or as a merged checkpoint; then read it back and compare.

    Attributes:
        adapter: The artefact to export.
        format: peft (adapter_config.json and adapter_model.safetensors) or merged (a whole
            checkpoint with the adapter added to its weights).
        to: The folder to write; it must not exist, unless --overwrite is given.
        weights: The dtype of a merged checkpoint: stored (the dtype of the base's files; bfloat16
            can round small updates away) or float32 (twice the size, keeps the adapter's whole
            effect).
    """

    adapter: tyro.conf.Positional[str]
    format: Literal["peft", "merged"]
    to: str
    weights: Literal["stored", "float32"] = "stored"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_forward("export")


# The file of a PEFT adapter's folder that is written last.
_PEFT_MARKER = "adapter_config.json"


@dataclasses.dataclass(frozen=True)
class Exported:
    """An export that was read back and verified.

    Attributes:
        folder: The folder that was written.
        difference: The largest absolute difference between the export's outputs (logits, or scores
            of a role with a head) and the role's.
        note: What people who load it must know; "" for nothing.
        kept: The share of the adapter's effect that a merged checkpoint keeps
            (`verify.share_kept`); None for a PEFT adapter, or if the share is unknown.
    """

    folder: files.Path
    difference: float
    note: str
    kept: float | None = None


def export_peft(model: Model, role: Any, to: files.PathLike) -> Exported:
    """Writes a role as a PEFT adapter, reads it back and compares its outputs with the role's.

    Args:
        model: The base model that the role was trained on.
        role: What a training function returned, or a policy's adapter.
        to: The folder to write; it must not exist yet.

    Raises:
        UserError: The role is not an adapter, the folder exists, or outputs differ. Nothing is kept
            then.
    """
    if isinstance(role, Adapter):
        require(
            role.head is None,
            "An adapter with a head is exported with its record; give what the training function "
            "returned.",
        )
        adapter, record = role, model.record("policy", role)
    else:
        adapter, record = role.adapter, role.record
    with new_folder(to, _PEFT_MARKER) as folder:
        difference = _write_checked_peft(folder, model, adapter, record)
    return _exported_peft(to, difference, model, adapter, record)


def _write_checked_peft(
    folder: pathlib.Path, model: Model, adapter: Adapter, record: Record
) -> float:
    """Writes a role as a PEFT adapter into a folder, reads it back, and returns the largest
    difference of its outputs.
    """
    _write_peft(folder, model, adapter, record)
    classifier.read_back(folder, model.tokenizer)
    with progress.activity("comparing what was written with the adapter"):
        return verify.compare_peft(folder, model, adapter, record)


def _exported_peft(
    to: files.PathLike, difference: float, model: Model, adapter: Adapter, record: Record
) -> Exported:
    """Returns the description of a PEFT adapter that was written."""
    notes = _loading_notes(model, adapter, record, "peft")
    return Exported(files.path_of(to), difference, "; ".join(notes))


@progress.reported("export")
def run_export(config: ExportConfig) -> Exported:
    """Writes an export, reads it back, compares its outputs with the role's, and returns an
    `Exported`.

    Raises UserError, and leaves nothing, if the folder exists, outputs differ, or options do not
    fit together.
    """
    require(
        config.format == "merged" or config.weights == "stored",
        "--weights is for merged exports; an adapter's own weights are float32.",
    )
    if config.format == "peft":
        with new_folder(config.to, _PEFT_MARKER) as folder:
            model = load_model(config)
            adapter, record = model.load_role(config.adapter)
            difference = _write_checked_peft(folder, model, adapter, record)
        return _exported_peft(config.to, difference, model, adapter, record)
    require(
        config.quantise.kind == "none",
        "A merged export is made from unquantised weights; leave --quantise.kind out.",
    )
    in_float32 = config.weights == "float32"
    with new_folder(config.to, "config.json") as folder:
        model = load_model(config)
        adapter, record = model.load_role(config.adapter)
        with progress.activity("writing the merged checkpoint"):
            _write_merged(folder, config, model, adapter, record)
        classifier.read_back(folder, model.tokenizer)
        with progress.activity("comparing what was written with the adapter"):
            merged = verify.read_merged(folder, model, adapter, in_float32)
            difference = verify.compare_merged(folder, merged, model, adapter, record)
            kept = verify.share_kept(
                merged, model, adapter, weights.find_model(config.model), in_float32
            )
    notes = [] if kept is None else [f"{kept:.1%} of the adapter's effect survived"]
    notes += _loading_notes(model, adapter, record, "merged")
    return Exported(files.path_of(config.to), difference, "; ".join(notes), kept)


def _loading_notes(model: Model, adapter: Adapter, record: Record, format: str) -> list[str]:
    """Returns sentences for people who load an export: its template's date, and how to get a head's
    scores; [] if there is nothing to say.

    Args:
        model: The base model.
        adapter: The role.
        record: Its record.
        format: peft or merged.
    """
    notes = []
    if model.tokenizer.chat is not None and model.tokenizer.chat.uses_date:
        notes.append(
            "its chat template asks for the date, which was "
            f"{model.tokenizer.chat.date.isoformat()} here"
        )
    if record.has_head:
        pad_id = classifier.pad_id_of(model.tokenizer)
        offset = classifier.exported_head(adapter, record)[1]
        notes.append(classifier.loader_note(model.tokenizer, pad_id, offset, format))
    return notes


def _write_peft(folder: pathlib.Path, model: Model, adapter: Adapter, record: Record) -> None:
    """Writes the files of a PEFT adapter into a folder, with the tokenizer and the chat template
    that `model` uses.

    Args:
        folder: An existing folder.
        model: The base model.
        adapter: The role; its head, if any, is written with the normalisation in its kernel.
        record: Its record.
    """
    head, offset = classifier.exported_head(adapter, record)
    with_head = dataclasses.replace(adapter, head=head)
    values, tensors = peft.to_peft(with_head, model.lm.config, model.name)
    files.write_json(folder / "adapter_config.json", values)
    save_file(tensors, folder / "adapter_model.safetensors", metadata=METADATA)
    # With the chat template that the role was trained with, which may not be the base's.
    model.tokenizer.save(folder)
    _write_loading(folder, model, record, offset)


def _write_loading(folder: pathlib.Path, model: Model, record: Record, offset: float) -> None:
    """Writes what loading a role with a head needs: a tokenizer that pads with an id that ends no
    turn, and the file `peft.OFFSET_FILE`. Does nothing for a role without a head.

    Args:
        folder: The folder of the export.
        model: The base model.
        record: The role's record.
        offset: The constant to add to the logit.
    """
    if record.has_head:
        pad_id = classifier.pad_id_of(model.tokenizer)
        classifier.save_tokenizer(folder, model.tokenizer, pad_id)
        meaning = (
            "normalised score = logit + offset; the classifier's head has no bias to put it "
            "in. Differences of scores need none."
        )
        files.write_json(
            folder / peft.OFFSET_FILE,
            {"offset": offset, "role": record.role, "pad_token_id": pad_id, "meaning": meaning},
        )


def _write_merged(
    folder: pathlib.Path, config: ExportConfig, model: Model, adapter: Adapter, record: Record
) -> None:
    """Writes a checkpoint in Hugging Face's format: every tensor of the base with the adapter
    added.

    The sum is computed in float32 and written in the dtype that `config.weights` names. A role with
    a head becomes a sequence classifier, without an output projection. The base's other files are
    copied, except a replaced chat template.

    Args:
        folder: An existing folder.
        config: The export's settings.
        model: The base model.
        adapter: The role.
        record: Its record.
    """
    source = weights.find_model(config.model)
    stored = weights.stored_tensors(source)
    head, offset = classifier.exported_head(adapter, record)
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}

    def flush() -> None:
        """Writes the pending tensors as one file."""
        save_file(pending, folder / f"model-{len(shards) + 1:05}.safetensors", metadata=METADATA)
        shards.append(list(pending))
        pending.clear()

    for name in trees.named_leaves(model.lm.abstract_base()):
        if name == "outer/lm_head" and head is not None:
            continue
        for layer, tensor in enumerate(naming.tensor_names(name, model.lm.config)):
            array = weights.read_tensor(stored[tensor])
            array = array.astype(np.float32) if config.weights == "float32" else array
            pending[tensor] = np.ascontiguousarray(_merged_tensor(adapter, name, layer, array))
            if sum(part.nbytes for part in pending.values()) > _SHARD_BYTES:
                flush()
    if head is not None:
        pending["score.weight"] = np.asarray(head["kernel"])[None, :].astype(
            np.float32 if config.weights == "float32" else _common_dtype(stored)
        )
    flush()
    if len(shards) == 1:
        files.move(folder / "model-00001.safetensors", folder / "model.safetensors")
    else:
        index = {
            tensor: f"model-{number:05}.safetensors"
            for number, shard in enumerate(shards, 1)
            for tensor in shard
        }
        files.write_json(
            folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index}
        )
    for path in files.listing(source):
        if path.suffix in (".json", ".model", ".jinja", ".txt") and not path.name.endswith(
            ".index.json"
        ):
            files.copy(path, folder / path.name)
    if config.template != "auto":
        # The role's template replaces the base's; the role may have none.
        for path in files.listing(folder, "chat_template*"):
            files.remove(path)
        model.tokenizer.save(folder)
    values = files.read_json(source / "config.json")
    if config.weights == "float32":
        # Versions of transformers differ in which of the two they read.
        values |= {
            name: "float32"
            for name in ("torch_dtype", "dtype")
            if name in values or name == "torch_dtype"
        }
    if head is not None:
        values["architectures"] = [
            name.replace("ForCausalLM", "ForSequenceClassification")
            for name in values.get("architectures") or []
        ]
        values |= {
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            "pad_token_id": classifier.pad_id_of(model.tokenizer),
        }
    files.write_json(folder / "config.json", values)
    _write_loading(folder, model, record, offset)


def is_export(folder: files.PathLike) -> bool:
    """Returns whether a folder on this host's disk was written by `export`, by the headers of its
    safetensors files; a folder that holds other folders was not.
    """
    entries = files.listing(folder)
    found = [path for path in entries if path.suffix == ".safetensors"]
    if not found or is_remote(files.path_of(folder)) or any(map(files.is_folder, entries)):
        return False
    try:
        for path in found:
            with safe_open(path, "numpy") as file:
                if file.metadata() != METADATA:
                    return False
    except (OSError, SafetensorError):
        return False
    return True


def _common_dtype(stored: Mapping[str, weights.Stored]) -> np.dtype:
    """Returns the dtype that most of a checkpoint's tensors have."""
    dtypes = [tensor.dtype for tensor in stored.values()]
    return jnp.dtype(weights.STORED[max(set(dtypes), key=dtypes.count)])


def _merged_tensor(adapter: Adapter, name: str, layer: int, array: np.ndarray) -> np.ndarray:
    """Returns a tensor of the checkpoint with the role merged in, in the dtype and layout of
    `array`.

    Args:
        adapter: The role: an adapter, or all weights, which replace the tensor.
        name: The base leaf that the tensor belongs to.
        layer: The tensor's layer; 0 for a leaf outside the layers.
        array: The base's tensor in the checkpoint's layout.
    """
    turn = np.transpose if naming.transposed(name) else np.asarray
    if adapter.weights is not None:
        leaf = trees.named_leaves(adapter.weights)[name]
        return turn(np.asarray(leaf[layer] if name.startswith("layers/") else leaf)).astype(
            array.dtype
        )
    module = name.removesuffix("/kernel")
    if module not in combine.adapted_modules(adapter):
        return array
    return turn(
        np.asarray(
            combine.merged_kernel(adapter, module, layer, jnp.asarray(turn(array), jnp.float32))
        )
    ).astype(array.dtype)
