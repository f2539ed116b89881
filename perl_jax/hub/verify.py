"""Compares an export or an import, as read back from disk, with the role that it was made from."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from perl_jax.adapters.lora import Adapter
from perl_jax.errors import UserError, require
from perl_jax.hub import classifier, config_json, peft, weights
from perl_jax.hub.artefacts import Record
from perl_jax.hub.model import Model
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import files
from perl_jax.types import Tree

# Rows and columns of the tokens that two models are compared on.
PROBE = (4, 16)
# A merged checkpoint must keep at least this share of its adapter's effect.
_KEPT = 0.5
# Effects below this share of the outputs' size are float32 rounding over the layers.
_NOISE = 1e-5


def probe_tokens(model: Model) -> tuple[jax.Array, jax.Array]:
    """Returns (tokens_BT, valid_BT), fixed random tokens on which two models are compared.

    B is 4. T is 16, or the model's number of positions if that is smaller. Two rows are padded on
    the right.
    """
    length = min(PROBE[1], model.lm.config.max_positions)
    tokens_BT = np.random.default_rng(0).integers(
        model.lm.config.vocab_size, size=(PROBE[0], length)
    )
    valid_BT = np.arange(length)[None, :] < np.array([[length], [length], [length // 2], [1]])
    return jnp.asarray(tokens_BT, jnp.int32), jnp.asarray(valid_BT)


def outputs(model: Model, base: Tree, adapter: Adapter | None) -> np.ndarray:
    """Returns a role's logits at the n valid probe tokens [n, V], or its scores [B], not
    normalised, if it has a head.

    Args:
        model: The base model.
        base: The base weights; None for a role with weights of its own.
        adapter: The role; None is the base alone.
    """
    tokens_BT, valid_BT = probe_tokens(model)
    if adapter is not None and adapter.head is not None:
        return np.asarray(jax.jit(model.lm.score)(base, adapter, tokens_BT, valid_BT))
    return np.asarray(jax.jit(model.lm.logits)(base, adapter, tokens_BT, valid_BT))[
        np.asarray(valid_BT)
    ]


def require_same(expected: np.ndarray, found: np.ndarray, allowed: float, what: str) -> float:
    """Returns the largest absolute difference of two outputs.

    Args:
        expected: The outputs of the role.
        found: The outputs of what was written, of the same shape.
        allowed: The limit, relative to the largest expected output (or to 1 if that is smaller).
        what: The name of the outputs, for the message.

    Raises:
        UserError: The difference is above the limit.
    """
    difference = float(np.abs(expected - found).max())
    scale = max(1.0, float(np.abs(expected).max()))
    if not difference <= allowed * scale:
        raise UserError(
            f"What was written does not give the same {what}: they differ by {difference:.3g}. "
            "Nothing was kept."
        )
    return difference


def allowed_difference(model: Model) -> float:
    """Returns how much rounding may change outputs, relative to the largest: 1e-4 in float32, else
    0.05.
    """
    return 1e-4 if model.lm.config.dtype == "float32" else 0.05


def _expected(model: Model, adapter: Adapter, record: Record) -> np.ndarray:
    """Returns the role's own outputs on the probe tokens: logits, or scores; those of a reward
    model are normalised.
    """
    base = model.base if adapter.weights is None else None
    found = outputs(model, base, adapter)
    return found if record.role != "reward" else np.asarray(record.normalise(found))


def _check_padded(
    folder: pathlib.Path,
    model: Model,
    adapter: Adapter,
    record: Record,
    pad_id: int,
    allowed: float,
    found: classifier.Scorer,
) -> None:
    """Compares the scores of a padded batch of texts with the role's; raises UserError if they
    differ.

    Args:
        folder: The export.
        model: The base model.
        adapter: The role, with a head.
        record: Its record.
        pad_id: The classifier's `pad_token_id`.
        allowed: The largest difference (`classifier.check_padded`).
        found: Computes the scores of the exported model.
    """
    base = model.base if adapter.weights is None else None

    def expected(*batch: jax.Array) -> np.ndarray:
        """Returns the role's own scores of a batch."""
        scores = np.asarray(jax.jit(model.lm.score)(base, adapter, *batch))
        return scores if record.role != "reward" else np.asarray(record.normalise(scores))

    classifier.check_padded(
        folder, model.tokenizer, pad_id, model.lm.config.max_positions, expected, found, allowed
    )


def compare_peft(folder: pathlib.Path, model: Model, adapter: Adapter, record: Record) -> float:
    """Reads an exported PEFT adapter back; returns the largest absolute difference of its outputs
    from the role's.

    Args:
        folder: The export.
        model: The base model.
        adapter: The role.
        record: Its record.

    Raises:
        UserError: The difference is more than rounding (`allowed_difference`).
    """
    again, offset = peft.read_peft(folder, model.lm.config)
    if record.has_head:
        stated = files.read_json(folder / peft.OFFSET_FILE)["pad_token_id"]
        _check_padded(
            folder,
            model,
            adapter,
            record,
            stated,
            allowed_difference(model),
            lambda *batch: np.asarray(jax.jit(model.lm.score)(model.base, again, *batch)) + offset,
        )
    found = outputs(model, model.base, again) + offset
    return require_same(
        _expected(model, adapter, record),
        found,
        allowed_difference(model),
        "scores" if record.has_head else "logits",
    )


def read_merged(folder: pathlib.Path, model: Model, adapter: Adapter, in_float32: bool) -> Model:
    """Returns a merged checkpoint as a model, described by its own config.json.

    Args:
        folder: The checkpoint.
        model: The base model; gives the dtype of activations, the mesh and the tokenizer.
        adapter: The role that was merged. If it has a head, the checkpoint's `score.weight` is left
            out.
        in_float32: Whether the checkpoint is in float32; its weights are then kept so in memory.
    """
    held = "float32" if in_float32 else model.lm.config.param_dtype
    found = config_json.read_config(folder, dtype=model.lm.config.dtype, param_dtype=held)
    # A classifier's checkpoint has no output projection; with tied embeddings none is read.
    found = dataclasses.replace(
        found, tied_embeddings=found.tied_embeddings or adapter.head is not None
    )
    lm = dataclasses.replace(model.lm, config=found)
    return dataclasses.replace(
        model,
        lm=lm,
        base=weights.load_base(folder, found, lm.base_shardings(), ignore=("score.weight",)),
    )


def compare_merged(
    folder: pathlib.Path, merged: Model, model: Model, adapter: Adapter, record: Record
) -> float:
    """Returns the largest absolute difference of a merged checkpoint's outputs from the role's.

    Args:
        folder: The checkpoint.
        merged: The checkpoint as a model (`read_merged`).
        model: The base model.
        adapter: The role.
        record: Its record.

    Raises:
        UserError: The difference is more than the rounding of the checkpoint's dtype.
    """
    head, offset = classifier.exported_head(adapter, record)
    low = any(tensor.dtype != "F32" for tensor in weights.stored_tensors(folder).values())
    allowed = 0.05 if low else allowed_difference(model)
    found = outputs(merged, merged.base, None if head is None else Adapter(head=head)) + offset
    if head is not None:
        stated = files.read_json(folder / "config.json")["pad_token_id"]
        scores = lambda *batch: (
            np.asarray(jax.jit(merged.lm.score)(merged.base, Adapter(head=head), *batch)) + offset
        )
        _check_padded(folder, model, adapter, record, stated, allowed, scores)
    return require_same(
        _expected(model, adapter, record), found, allowed, "scores" if record.has_head else "logits"
    )


def share_kept(
    merged: Model, model: Model, adapter: Adapter, source: pathlib.Path, in_float32: bool
) -> float | None:
    """Returns the share of an adapter's effect that a merged checkpoint keeps, 1 - lost / effect.

    `effect` is the mean absolute difference between base and role, `lost` that between checkpoint
    and role. Both are of logits, or with a head of the hidden states that it reads, computed in
    float32 on the probe tokens.

    Returns None if the share is unknown: the effect is within float32 rounding (an untrained
    adapter), or the base is kept in memory with fewer bits than its files have.

    Args:
        merged: The checkpoint (`read_merged`).
        model: The base model.
        adapter: The role.
        source: The folder of the base model.
        in_float32: Whether the checkpoint is in float32.

    Raises:
        UserError: Less than `_KEPT` is kept.
    """
    width = lambda name: jnp.dtype(name).itemsize
    dtypes = {weights.STORED[tensor.dtype] for tensor in weights.stored_tensors(source).values()}
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
    tokens_BT, valid_BT = probe_tokens(model)

    def read(lm: LanguageModel, base: Tree | None, role: Adapter | None) -> np.ndarray:
        """Returns the outputs that are compared, at the valid probe tokens, in float32."""
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
        if not in_float32
        else "the weights that were written do not hold the adapter"
    )
    require(
        kept >= _KEPT,
        f"Only {max(kept, 0.0):.0%} of the adapter's effect survived in the merged weights (it "
        f"moves outputs by {effect:.3g} on average, {lost:.3g} of that is lost); {better}. "
        "Nothing was kept.",
    )
    return kept
