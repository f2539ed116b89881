"""`export`, `import`, `show` and `average`: adapters to and from the rest of the world."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from safetensors.numpy import save_file

from perl_jax.adapters import lora
from perl_jax.adapters.lora import Adapter
from perl_jax.errors import UserError, require
from perl_jax.hub import artefacts, classifier, families, peft
from perl_jax.hub import weights as hf_checkpoint
from perl_jax.hub.artefacts import Record
from perl_jax.hub.model import Model, TemplateOptions, load_model
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import files, trees
from perl_jax.types import Tree

# Rows and columns of the tokens that two models are compared on.
PROBE = (4, 16)
_SHARD_BYTES = 4 * 2**30
_OFFSET_FILE = "perl_jax_reward.json"
# A merged checkpoint keeps at least this share of its adapter's effect.
_KEPT = 0.5
# Effects below this share of the outputs' size are float32's rounding over the layers, not an
# adapter's.
_NOISE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(TemplateOptions):
    """Write an adapter for PEFT, or a whole checkpoint with it merged in; then reload and compare.

    Attributes:
        adapter: The artefact to export.
        format: peft (adapter_config.json and adapter_model.safetensors) or merged (a checkpoint).
        to: The folder to write; it must not exist yet.
        weights: Of a merged checkpoint: stored, the dtype of the base's files (bfloat16 rounds
            small
            updates away); or float32, twice the size, which keeps all of the adapter's effect.
    """

    adapter: tyro.conf.Positional[str]
    format: Literal["peft", "merged"]
    to: str
    weights: Literal["stored", "float32"] = "stored"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_forward("export")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig(TemplateOptions):
    """Read an adapter written by PEFT into an artefact.

    Attributes:
        peft: The folder with adapter_config.json and adapter_model.safetensors.
        to: The artefact's folder to write; it must not exist yet.
    """

    peft: tyro.conf.Positional[str]
    to: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_forward("import")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AverageConfig(TemplateOptions):
    """The weighted sum of adapters of one base and one role, as an artefact.

    Attributes:
        adapters: The artefacts.
        weights: One weight each; None: equal ones that add to 1.
        to: The artefact's folder to write; it must not exist yet.
    """

    adapters: tyro.conf.Positional[tuple[str, ...]]
    weights: tuple[float, ...] | None = None
    to: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_forward("average")


@dataclasses.dataclass(frozen=True)
class ShowConfig:
    """List what an artefact is: role, adapter, size, base, training step, metrics.

    Attributes:
        adapter: The artefact's folder.
    """

    adapter: tyro.conf.Positional[str]


@contextlib.contextmanager
def new_folder(to: str) -> Iterator[pathlib.Path]:
    """Where to write what appears as the folder `to` when all of it is there; an existing one is
    refused.

    What the block is given does not exist yet; after an error nothing is left of it.
    """
    folder = pathlib.Path(to).expanduser()
    require(not folder.exists(), f"{folder} exists already; give --to a folder that does not.")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Exported:
    """An export that was read back.

    Attributes:
        folder: Where it lies.
        difference: The largest between its outputs and the role's.
        note: What somebody who loads it has to know; empty: nothing.
        kept: Share of the adapter's effect that a merged checkpoint has (`_share_kept`); None: not
            measured.
    """

    folder: pathlib.Path
    difference: float
    note: str
    kept: float | None = None


def export(config: ExportConfig) -> Exported:
    """Writes the export, reads it back, and compares."""
    whole = config.format != "merged" or config.quantise.kind == "none"
    require(whole, "A merged export is made of the base's own weights; leave --quantise.kind out.")
    require(
        config.format == "merged" or config.weights == "stored",
        "--weights is for merged exports; an adapter's own weights are float32.",
    )
    with new_folder(config.to) as folder:
        model = load_model(config)
        adapter, record = model.load_role(config.adapter)
        folder.mkdir()
        write = {"peft": _write_peft, "merged": _write_merged}[config.format]
        write(folder, config, model, adapter, record)
        classifier.read_back(folder, model.tokenizer)
        kept = None
        if config.format == "merged":
            merged = _read_merged(folder, config, model, adapter)
            difference = _compare_merged(folder, merged, model, adapter, record)
            kept = _share_kept(merged, config, model, adapter)
        else:
            difference = _compare_peft(folder, model, adapter, record)
    notes = [] if kept is None else [f"{kept:.1%} of the adapter's effect survived"]
    if model.tokenizer.chat is not None and model.tokenizer.chat.uses_date:
        notes.append(
            "its chat template asks for the date, which was "
            f"{model.tokenizer.chat.date.isoformat()} here"
        )
    if record.has_head:
        notes.append(
            classifier.loader_note(
                model.tokenizer,
                classifier.pad_id_of(model.tokenizer),
                _head(adapter, record)[1],
                config.format,
            )
        )
    return Exported(pathlib.Path(config.to), difference, "; ".join(notes), kept)


def _head(adapter: Adapter, record: Record) -> tuple[Tree | None, float]:
    """(the head with a reward's normalisation in its kernel, the constant a head without bias
    lacks).
    """
    if adapter.head is None:
        return None, 0.0
    mean, std = (record.score_mean, record.score_std) if record.role == "reward" else (0.0, 1.0)
    head = {"kernel": adapter.head["kernel"] / std, "bias": jnp.zeros((), jnp.float32)}
    return head, float((adapter.head["bias"] - mean) / std)


def _write_peft(
    folder: pathlib.Path, config: ExportConfig, model: Model, adapter: Adapter, record: Record
) -> None:
    head, offset = _head(adapter, record)
    values, tensors = peft.to_peft(adapter.replace(head=head), model.lm.config, model.name)
    files.write_json(folder / "adapter_config.json", values)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    # With the chat template that the role was trained with, which may not be the base's.
    model.tokenizer.save(folder)
    _write_loading(folder, model, record, offset)


def _write_loading(folder: pathlib.Path, model: Model, record: Record, offset: float) -> None:
    """What a classifier's loader needs beside the weights: the tokenizer with its padding, and the
    offset.
    """
    if record.has_head:
        pad_id = classifier.pad_id_of(model.tokenizer)
        classifier.save_tokenizer(folder, model.tokenizer, pad_id)
        meaning = (
            "normalised score = logit + offset; the classifier's head has no bias to put it "
            "in. Differences of scores need none."
        )
        files.write_json(
            folder / _OFFSET_FILE,
            {"offset": offset, "role": record.role, "pad_token_id": pad_id, "meaning": meaning},
        )


def _write_merged(
    folder: pathlib.Path, config: ExportConfig, model: Model, adapter: Adapter, record: Record
) -> None:
    """Writes every tensor of the base with the adapter added. The sum is computed in float32;
    --weights says in which dtype it is written.
    """
    source = hf_checkpoint.find_model(config.model)
    stored = hf_checkpoint.stored_tensors(source)
    head, offset = _head(adapter, record)
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}

    def flush() -> None:
        save_file(
            pending, folder / f"model-{len(shards) + 1:05}.safetensors", metadata={"format": "pt"}
        )
        shards.append(list(pending))
        pending.clear()

    for name in trees.named_leaves(model.lm.abstract_base()):
        if name == "outer/lm_head" and head is not None:
            continue
        for layer, tensor in enumerate(families.tensor_names(name, model.lm.config)):
            array = hf_checkpoint.read_tensor(stored[tensor])
            array = array.astype(np.float32) if config.weights == "float32" else array
            pending[tensor] = np.ascontiguousarray(_moved(adapter, name, layer, array))
            if sum(part.nbytes for part in pending.values()) > _SHARD_BYTES:
                flush()
    if head is not None:
        pending["score.weight"] = np.asarray(head["kernel"])[None, :].astype(
            np.float32 if config.weights == "float32" else _common_dtype(stored)
        )
    flush()
    if len(shards) == 1:
        (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
    else:
        index = {
            tensor: f"model-{number:05}.safetensors"
            for number, shard in enumerate(shards, 1)
            for tensor in shard
        }
        files.write_json(
            folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index}
        )
    for path in source.iterdir():
        if path.suffix in (".json", ".model", ".jinja", ".txt") and not path.name.endswith(
            ".index.json"
        ):
            shutil.copyfile(path, folder / path.name)
    if config.template != "auto":
        # The role's template takes the place of the base's; there may be none.
        for path in folder.glob("chat_template*"):
            path.unlink()
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


def _common_dtype(stored: Mapping[str, hf_checkpoint.Stored]) -> np.dtype:
    """The dtype that most of a checkpoint's tensors have."""
    dtypes = [tensor.dtype for tensor in stored.values()]
    return jnp.dtype(hf_checkpoint.STORED[max(set(dtypes), key=dtypes.count)])


def _moved(adapter: Adapter, name: str, layer: int, array: np.ndarray) -> np.ndarray:
    """A stored tensor with the role in it, in its own dtype and layout."""
    turn = np.transpose if families.transposed(name) else np.asarray
    if adapter.weights is not None:
        leaf = trees.named_leaves(adapter.weights)[name]
        return turn(np.asarray(leaf[layer] if name.startswith("layers/") else leaf)).astype(
            array.dtype
        )
    module = name.removesuffix("/kernel")
    if module not in lora.moved_modules(adapter):
        return array
    return turn(
        np.asarray(
            lora.merged_kernel(adapter, module, layer, jnp.asarray(turn(array), jnp.float32))
        )
    ).astype(array.dtype)


def _probe(model: Model) -> tuple[jax.Array, jax.Array]:
    """Random tokens to compare two models on, some rows padded."""
    length = min(PROBE[1], model.lm.config.max_positions)
    tokens_BT = np.random.default_rng(0).integers(
        model.lm.config.vocab_size, size=(PROBE[0], length)
    )
    valid_BT = np.arange(length)[None, :] < np.array([[length], [length], [length // 2], [1]])
    return jnp.asarray(tokens_BT, jnp.int32), jnp.asarray(valid_BT)


def _outputs(model: Model, base: Tree, adapter: Adapter | None) -> np.ndarray:
    """Logits at real tokens, or scores where the role has a head."""
    tokens_BT, valid_BT = _probe(model)
    if adapter is not None and adapter.head is not None:
        return np.asarray(jax.jit(model.lm.score)(base, adapter, tokens_BT, valid_BT))
    return np.asarray(jax.jit(model.lm.logits)(base, adapter, tokens_BT, valid_BT))[
        np.asarray(valid_BT)
    ]


def _judge(expected: np.ndarray, found: np.ndarray, allowed: float, what: str) -> float:
    difference = float(np.abs(expected - found).max())
    scale = max(1.0, float(np.abs(expected).max()))
    if not difference <= allowed * scale:
        raise UserError(
            f"What was written does not give the same {what}: they differ by {difference:.3g}. "
            "Nothing was kept."
        )
    return difference


def _share_kept(
    merged: Model, config: ExportConfig, model: Model, adapter: Adapter
) -> float | None:
    """1 - lost / effect of a written checkpoint (`_read_merged`); UserError below `_KEPT`.

    effect: the mean absolute difference between base and role; lost: between checkpoint and role.
    Of logits, or with a head of the hidden states that it reads, computed in float32 on the probe.
    None where it cannot be told: the effect is within float32's rounding (an untrained adapter), or
    the base is held in fewer bits than its files have, so that reading rounds as well.
    """
    width = lambda name: jnp.dtype(name).itemsize
    dtypes = {
        hf_checkpoint.STORED[tensor.dtype]
        for tensor in hf_checkpoint.stored_tensors(hf_checkpoint.find_model(config.model)).values()
    }
    if max(map(width, dtypes)) > width(model.lm.config.param_dtype):
        return None
    settings = (
        model.lm.config
        if model.lm.config.dtype == "float32"
        else dataclasses.replace(model.lm.config, dtype="float32", attention="plain")
    )
    lm = dataclasses.replace(model.lm, config=settings)
    own = merged.lm.config
    written_lm = dataclasses.replace(
        model.lm,
        config=dataclasses.replace(
            settings, tied_embeddings=own.tied_embeddings, param_dtype=own.param_dtype
        ),
    )
    tokens_BT, valid_BT = _probe(model)

    def read(lm: LanguageModel, base: Tree | None, role: Adapter | None) -> np.ndarray:
        function = lm.logits if adapter.head is None else lm.hidden
        return np.asarray(jax.jit(function)(base, role, tokens_BT, valid_BT), np.float32)[
            np.asarray(valid_BT)
        ]

    base, tuned = (
        read(lm, model.base, None),
        read(lm, model.base if adapter.weights is None else None, adapter),
    )
    effect, lost = (
        float(np.abs(tuned - base).mean()),
        float(np.abs(read(written_lm, merged.base, None) - tuned).mean()),
    )
    if effect <= _NOISE * float(np.abs(base).mean()):
        return None
    kept = 1 - lost / effect
    better = (
        "give --weights float32"
        if config.weights == "stored"
        else "the weights that were written do not hold the adapter"
    )
    require(
        kept >= _KEPT,
        f"Only {max(kept, 0.0):.0%} of the adapter's effect survived in the merged weights (it "
        f"moves outputs by {effect:.3g} on average, {lost:.3g} of that is lost); {better}. "
        "Nothing was kept.",
    )
    return kept


def _expected(model: Model, adapter: Adapter, record: Record) -> np.ndarray:
    base = model.base if adapter.weights is None else None
    outputs = _outputs(model, base, adapter)
    return outputs if record.role != "reward" else np.asarray(record.normalise(outputs))


def _compare_peft(folder: pathlib.Path, model: Model, adapter: Adapter, record: Record) -> float:
    again, offset = read_peft(folder, model)
    if record.has_head:
        stated = files.read_json(folder / _OFFSET_FILE)["pad_token_id"]
        _check_padded(
            folder,
            model,
            adapter,
            record,
            stated,
            _allowed(model),
            lambda *batch: np.asarray(jax.jit(model.lm.score)(model.base, again, *batch)) + offset,
        )
    found = _outputs(model, model.base, again) + offset
    return _judge(
        _expected(model, adapter, record),
        found,
        _allowed(model),
        "scores" if record.has_head else "logits",
    )


def _read_merged(
    folder: pathlib.Path, config: ExportConfig, model: Model, adapter: Adapter
) -> Model:
    """The written checkpoint, by its own config.json. Weights that were written in float32 stay
    so.
    """
    held = "float32" if config.weights == "float32" else model.lm.config.param_dtype
    found = families.read_config(folder, dtype=model.lm.config.dtype, param_dtype=held)
    # A classifier has no output projection; as a tied one the base is read without.
    found = dataclasses.replace(
        found, tied_embeddings=found.tied_embeddings or adapter.head is not None
    )
    lm = dataclasses.replace(model.lm, config=found)
    return dataclasses.replace(
        model,
        lm=lm,
        base=hf_checkpoint.load_base(folder, found, lm.base_shardings(), ignore=("score.weight",)),
    )


def _compare_merged(
    folder: pathlib.Path, merged: Model, model: Model, adapter: Adapter, record: Record
) -> float:
    head, offset = _head(adapter, record)
    low = any(tensor.dtype != "F32" for tensor in hf_checkpoint.stored_tensors(folder).values())
    allowed = 0.05 if low else _allowed(model)
    found = _outputs(merged, merged.base, None if head is None else Adapter(head=head)) + offset
    if head is not None:
        stated = files.read_json(folder / "config.json")["pad_token_id"]
        scores = lambda *batch: (
            np.asarray(jax.jit(merged.lm.score)(merged.base, Adapter(head=head), *batch)) + offset
        )
        _check_padded(folder, model, adapter, record, stated, allowed, scores)
    return _judge(
        _expected(model, adapter, record), found, allowed, "scores" if record.has_head else "logits"
    )


def _check_padded(
    folder: pathlib.Path,
    model: Model,
    adapter: Adapter,
    record: Record,
    pad_id: int,
    allowed: float,
    found: classifier.Scorer,
) -> None:
    base = model.base if adapter.weights is None else None

    def expected(*batch: jax.Array) -> np.ndarray:
        scores = np.asarray(jax.jit(model.lm.score)(base, adapter, *batch))
        return scores if record.role != "reward" else np.asarray(record.normalise(scores))

    classifier.check_padded(
        folder, model.tokenizer, pad_id, model.lm.config.max_positions, expected, found, allowed
    )


def _allowed(model: Model) -> float:
    """Share of the largest output that rounding may change."""
    return 1e-4 if model.lm.config.dtype == "float32" else 0.05


def read_peft(folder: pathlib.Path, model: Model) -> tuple[Adapter, float]:
    """The role in a PEFT folder, and the constant its scores lack."""
    values = files.read_json(folder / "adapter_config.json")
    stored = hf_checkpoint.read_header(folder / "adapter_model.safetensors")
    tensors = {name: hf_checkpoint.read_tensor(tensor) for name, tensor in stored.items()}
    return peft.from_peft(values, tensors, model.lm.config), _stated(folder)["offset"]


def _stated(folder: pathlib.Path) -> dict[str, Any]:
    """What an export of this package says of a head; a reward without an offset where it says
    nothing.
    """
    path = folder / _OFFSET_FILE
    found = files.read_json(path) if path.exists() else {"offset": 0.0, "role": "reward"}
    good = (
        isinstance(found, dict)
        and isinstance(found.get("offset"), float)
        and found.get("role") in ("reward", "value")
    )
    require(good, f"{path} must hold an offset (a number) and a role (reward or value).")
    return found


def run_import(config: ImportConfig) -> pathlib.Path:
    """Writes a PEFT adapter as an artefact, reads it back and compares."""
    folder = pathlib.Path(config.peft).expanduser()
    require(folder.is_dir(), f"There is no folder {folder}.")
    with new_folder(config.to) as written:
        model = load_model(config)
        adapter, offset = read_peft(folder, model)
        values = {}
        if adapter.head is not None:
            adapter = adapter.replace(head=adapter.head | {"bias": jnp.float32(offset)})
        role = "policy" if adapter.head is None else _stated(folder)["role"]
        if role == "reward":
            # Its scores are used as they are.
            values = {"score_mean": 0.0, "score_std": 1.0}
        adapter = model.place(adapter)
        artefacts.save_artefact(
            written,
            adapter,
            model.record(role, adapter, metrics={"imported_from": str(folder)}, **values),
        )
        again, _ = model.load_role(written, role)
        _judge(
            _outputs(model, model.base, adapter),
            _outputs(model, model.base, again),
            1e-6,
            "outputs",
        )
    return pathlib.Path(config.to)


def run_average(config: AverageConfig) -> pathlib.Path:
    """Writes the weighted sum of adapters; a reward's normalisations are averaged before the
    sum.
    """
    number = len(config.adapters)
    require(number > 0, "Give at least one adapter to average.")
    weights = config.weights or (1 / number,) * number
    require(
        bool(np.isfinite(weights).all()), f"The weights are {weights}; they must be finite numbers."
    )
    require(
        len(weights) == number,
        f"There are {number} adapters and {len(weights)} weights; give one weight for each.",
    )
    with new_folder(config.to) as written:
        model = load_model(config)
        adapters, records = zip(*map(model.load_role, config.adapters), strict=True)
        roles = sorted({record.role for record in records})
        require(
            len(roles) == 1, f"Adapters of different roles ({', '.join(roles)}) cannot be averaged."
        )
        values = {}
        if roles == ["reward"]:
            # The head is averaged, so a normalised score is the raw one's: keep the weighted
            # moments.
            mean, std = (
                float(np.dot(weights, part))
                for part in zip(*((r.score_mean, r.score_std) for r in records), strict=True)
            )
            require(
                std > 0,
                f"The weights {weights} give the averaged score a standard deviation that is not "
                "above 0.",
            )
            values = {"score_mean": mean, "score_std": std}
        adapter = model.place(lora.average(adapters, weights, model.lm.config.layers))
        metrics = {"averaged": list(config.adapters), "weights": list(weights)}
        artefacts.save_artefact(
            written, adapter, model.record(roles[0], adapter, metrics=metrics, **values)
        )
    return pathlib.Path(config.to)


def show(config: ShowConfig) -> str:
    """The artefact's record in lines a person can read."""
    folder = pathlib.Path(config.adapter)
    record = artefacts.read_record(folder)
    settings = {} if record.lora is None else dataclasses.asdict(record.lora)
    kind = (
        ", ".join(
            f"{name} {value}" for name, value in settings.items() if value not in (None, "", False)
        )
        or "every weight"
    )
    lines = {
        "role": record.role + (" (with its scalar head)" if record.has_head else ""),
        "tuning": f"{record.tuning}: {kind}",
        "scaling": record.scaling if record.lora else None,
        "size": f"{files.folder_bytes(folder) / 2**20:,.2f} MiB on disk",
        "base": f"{record.base_name}, fingerprint {record.base_fingerprint}",
        "tokenizer": f"fingerprint {record.tokenizer_fingerprint}",
        "base held in": None
        if record.quantise.kind == "none"
        else f"{record.quantise.kind}, block {record.quantise.block or 'none'}",
        "frozen beneath": None
        if record.under is None
        else ", ".join(f"{name} rank {rank}" for name, rank in record.under.items()),
        "step": f"{record.step:,}",
        "normalisation": None
        if record.score_mean is None
        else f"(raw - {record.score_mean:.4g}) / {record.score_std:.4g}",
        "metrics": json.dumps(record.metrics) if record.metrics else None,
    }
    return "\n".join(f"{name:<15}{value}" for name, value in lines.items() if value is not None)
