"""Exports of scalar heads for transformers' sequence classifiers: the padding and the token that is
scored.

Such a classifier returns the logit at the rightmost token whose id is not `pad_token_id`. So the
padding id must be one that no turn ends with, and tokenizer and config must agree on it.
"""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from perl_jax.adapters.lora import Adapter
from perl_jax.errors import require
from perl_jax.hub.artefacts import Record
from perl_jax.hub.tokenizer import Tokenizer
from perl_jax.runtime import files
from perl_jax.types import Tree

# Prompts and responses of different lengths, so that a batch of them is padded.
_TURNS = (
    ("Good tea, please", "yes"),
    ("Is the coffee fine?", "No, thanks. It was bad, and the tea was not good."),
    ("Hello", "Hi"),
)
_LEGACY = "special_tokens_map.json"
# Maps (tokens_BT, valid_BT) to the score at each row's last valid token.
Scorer = Callable[[jax.Array, jax.Array], np.ndarray]


def exported_head(adapter: Adapter, record: Record) -> tuple[Tree | None, float]:
    """Returns (head, offset): the head as a classifier without bias stores it, and the constant
    that its logits lack.

    A reward model's normalisation is part of both: kernel / std, and offset = (bias - mean) / std.
    So normalised score = logit + offset. For a value model mean is 0 and std is 1. A role without a
    head gives (None, 0).

    Args:
        adapter: The role.
        record: Its record, with the moments of a reward model's scores.
    """
    if adapter.head is None:
        return None, 0.0
    mean, std = (record.score_mean, record.score_std) if record.role == "reward" else (0.0, 1.0)
    head = {"kernel": adapter.head["kernel"] / std, "bias": jnp.zeros((), jnp.float32)}
    return head, float((adapter.head["bias"] - mean) / std)


def pad_id_of(tokenizer: Tokenizer) -> int:
    """Returns an id for padding that ends no turn: the tokenizer's pad, unk or bos, or another
    special token.

    Raises UserError if every special token ends a turn.
    """
    inner = tokenizer.inner
    ends = {*tokenizer.stop_ids, *tokenizer.turn_end_ids}
    # Read once: transformers rebuilds the dictionary at each access, and Gemma 3's has thousands of
    # tokens.
    added = inner.added_tokens_decoder
    special = [index for index, token in sorted(added.items()) if token.special]
    # Prefer a token made for padding, even if it is not the tokenizer's pad token.
    special.sort(key=lambda index: "pad" not in added[index].content.lower())
    candidates = (inner.pad_token_id, inner.unk_token_id, inner.bos_token_id, *special)
    usable = [i for i in candidates if i is not None and i not in ends and i < tokenizer.vocab_size]
    require(
        bool(usable),
        f"Every special token of {inner.name_or_path} ends a turn; a classifier could not tell "
        "padding from an end.",
    )
    return usable[0]


def save_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer, pad_id: int) -> None:
    """Writes the tokenizer's files, set to pad on the right with `pad_id`; `tokenizer` itself is
    not changed.

    Args:
        folder: An existing folder. The pad token in a `special_tokens_map.json` that is there is
            replaced.
        tokenizer: The tokenizer.
        pad_id: The id for padding.
    """
    inner = copy.deepcopy(tokenizer.inner)
    inner.pad_token = inner.convert_ids_to_tokens(pad_id)
    inner.padding_side = "right"
    inner.save_pretrained(folder)
    legacy = folder / _LEGACY
    if files.exists(legacy):
        # A file of the base. Some versions of transformers prefer its pad token.
        files.write_json(legacy, files.read_json(legacy) | {"pad_token": inner.pad_token})


def loader_note(tokenizer: Tokenizer, pad_id: int, offset: float, form: str) -> str:
    """Returns one line for people who load the export: the settings that give the right scores.

    Args:
        tokenizer: The model's tokenizer, whose chat template decides how texts must end.
        pad_id: The classifier's `pad_token_id`.
        offset: The constant to add to the logit.
        form: peft or merged.
    """
    where = "load the base with num_labels=1 and" if form == "peft" else "config.json has"
    ends = "".join(tokenizer.inner.convert_ids_to_tokens(list(tokenizer.stop_part)))
    whole = (
        "render the whole turn with the chat template"
        if tokenizer.chat is not None
        else f"end each text with {ends}"
    )
    added = f", add {offset:.6g} to the logit" if offset else ""
    return f"{where} pad_token_id={pad_id}, pad with the folder's tokenizer, {whole}{added}"


def check_padded(
    folder: pathlib.Path,
    tokenizer: Tokenizer,
    pad_id: int,
    positions: int,
    expected: Scorer,
    found: Scorer,
    allowed: float,
) -> None:
    """Scores a padded batch of texts as a classifier does and compares the scores with the role's.

    The tokenizer in the folder encodes and pads. `found` is read at the rightmost token whose id is
    not `pad_id`, `expected` at the true last token.

    Args:
        folder: The export.
        tokenizer: The model's tokenizer.
        pad_id: The classifier's `pad_token_id`.
        positions: The number of positions that the model has.
        expected: Computes the scores of the role.
        found: Computes the scores of the exported model.
        allowed: The largest difference, relative to the largest score (or to 1 if that is smaller).

    Raises:
        UserError: Tokens, positions or scores differ.
    """
    inner = read_back(folder, tokenizer).inner
    rows = [_whole_turn(tokenizer, *turn) for turn in _TURNS]
    require(
        inner.pad_token_id is not None,
        "The tokenizer that was written has no pad token. Nothing was kept.",
    )
    # A model with few positions reads the ends of the texts, which this check is about.
    rows = [row[-positions:] for row in rows]
    ids_BT = np.asarray(inner.pad({"input_ids": rows}, padding_side="right")["input_ids"])
    true_B = np.array([len(row) for row in rows]) - 1
    # As in transformers: 0 where every token is padding.
    read_B = ((ids_BT != pad_id) * np.arange(ids_BT.shape[1])).argmax(axis=1)
    upto = lambda last_B: jnp.asarray(np.arange(ids_BT.shape[1]) <= last_B[:, None])
    tokens_BT = jnp.asarray(ids_BT, jnp.int32)
    there_B, true_score_B = found(tokens_BT, upto(read_B)), expected(tokens_BT, upto(true_B))
    close_B = np.abs(there_B - true_score_B) <= allowed * max(
        1.0, float(np.abs(true_score_B).max())
    )
    for row in np.flatnonzero((read_B != true_B) | ~close_B):
        name = lambda column: repr(inner.convert_ids_to_tokens(int(ids_BT[row, column])))
        require(
            False,
            f"A classifier would read the score {there_B[row]:.4g} at token {read_B[row]} "
            f"({name(read_B[row])}) of a padded text, for {true_score_B[row]:.4g} at its last "
            f"token {true_B[row]} ({name(true_B[row])}): "
            f"the tokenizer pads with id {inner.pad_token_id}, the classifier's pad_token_id is "
            f"{pad_id}. Nothing was kept.",
        )


def read_back(folder: pathlib.Path, tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer that was written into a folder.

    Args:
        folder: The export.
        tokenizer: The model's tokenizer, with which it is compared.

    Raises:
        UserError: The tokenizer in the folder encodes whole turns differently from `tokenizer`.
    """
    date = {} if tokenizer.chat is None else {"date": tokenizer.chat.date.isoformat()}
    again = Tokenizer(
        Tokenizer.load(folder, tokenizer.vocab_size, **date).inner,
        tokenizer.stop_ids,
        tokenizer.vocab_size,
        **date,
    )
    same = all(_whole_turn(again, *turn) == _whole_turn(tokenizer, *turn) for turn in _TURNS)
    require(
        same, "The tokenizer that was written does not encode as the model's own. Nothing was kept."
    )
    return again


def _whole_turn(tokenizer: Tokenizer, prompt: str, response: str) -> list[int]:
    """Returns the ids of a prompt and its response with the stop part and the tail of the turn."""
    return [*tokenizer.prompt_ids(prompt), *tokenizer.response_ids(response), *tokenizer.tail_ids]
