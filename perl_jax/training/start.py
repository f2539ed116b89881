"""What a training job says before its first step: rows, cuts, weights, devices, template, a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import jax

from perl_jax.adapters.lora import trainable
from perl_jax.data.dataset import Dataset
from perl_jax.data.pipeline import Batches
from perl_jax.data.tokenise import RESPONSES, TokenRows
from perl_jax.hub.attention_path import attention_paths
from perl_jax.hub.model import Model
from perl_jax.hub.tokenizer import Tokenizer
from perl_jax.runtime import hosts, progress, trees
from perl_jax.runtime.platforms import platform_of
from perl_jax.runtime.quantities import count
from perl_jax.training.configs import TrainingConfig
from perl_jax.training.state import TrainState

# Of a longer text its first and its last so many characters are shown.
_ENDS = 160


def say_start(
    job: str,
    model: Model,
    dataset: Dataset,
    config: TrainingConfig,
    state: TrainState,
    batches: Mapping[str, Batches],
    more: Mapping[str, str] | None = None,
) -> None:
    """Prints a summary of a job to standard error, one fact a line; only the first process prints.

    Args:
        job: The command's name, with which each line begins.
        model: The base, its mesh and its tokenizer.
        dataset: The rows.
        config: Settings of the job.
        state: The state of step 0; only shapes and dtypes are read.
        batches: The tokenised rows, by split; the first split is the one to train on.
        more: Further facts, by name; None: there are none.
    """
    if not hosts.is_writer():
        return
    first = next(iter(batches.values())).rows
    facts = {
        "rows": _rows(dataset, config),
        "cut": _cut(config, {split: found.rows for split, found in batches.items()}),
        "weights": _weights(model, config, state),
        "devices": _devices(model),
        "attention": attention_paths(model.lm)["training"],
        "template": _template(model.tokenizer, config),
        **(more or {}),
    }
    lines = [f"{job}: {name}: {fact}." for name, fact in facts.items()]
    lines += [f"{job}: the first row as the model reads it:"]
    lines += [f"{job}:   {part}: {_shown(model.tokenizer, ids)}" for part, ids in _parts(first, 0)]
    progress.say("\n".join(lines))


def _rows(dataset: Dataset, config: TrainingConfig) -> str:
    """Returns the task, where its rows come from and the number of rows of each split."""
    folder = config.data.data_dir
    where = f" from {folder}" if folder is not None else ""
    numbers = ", ".join(f"{split} {len(rows)}" for split, rows in dataset.splits.items())
    return f"{dataset.name}{where}, {dataset.kind}: {numbers}"


def _cut(config: TrainingConfig, rows: Mapping[str, TokenRows]) -> str:
    """Returns how many rows of each split are longer than the largest lengths, and the longest
    row.
    """
    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    numbers = ", ".join(
        f"{found.cut} of {len(found.prompts)} {split} rows" for split, found in rows.items()
    )
    longest = max(int(found.lengths.max(initial=0)) for found in rows.values())
    # Prompts alone have no response; a corpus has texts as long as both.
    kind = next(iter(rows.values())).kind
    limits = {
        "prompts": f"a prompt of {prompt} tokens",
        "corpus": f"a text of {prompt + response} tokens",
    }.get(kind, f"a prompt of {prompt} and a response of {response} tokens")
    return f"{numbers}, to {limits}; the longest row has {longest} tokens"


def _weights(model: Model, config: TrainingConfig, state: TrainState) -> str:
    """Returns the numbers of trained and of all weights, and their dtypes."""
    total = trees.count(model.lm.abstract_base())
    trained = {name: jax.tree.leaves(trainable(role)) for name, role in sorted(state.roles.items())}
    sizes = ", ".join(
        f"{name} {count(sum(leaf.size for leaf in leaves))}" for name, leaves in trained.items()
    )
    dtypes = sorted({str(leaf.dtype) for leaves in trained.values() for leaf in leaves})
    kind = model.quantise.kind
    base = (
        model.lm.config.dtype if kind == "none" else f"{kind}, computed in {model.lm.config.dtype}"
    )
    how = f"adapters on a base of {count(total)}" if config.tuning == "lora" else "full tuning"
    return f"trains {sizes} in {', '.join(dtypes)} ({how}); base in {base}"


def _devices(model: Model) -> str:
    """Returns the devices and how the mesh divides them."""
    mesh = model.mesh
    kind = mesh.devices.flat[0].device_kind
    where = "" if kind.lower() == platform_of(mesh) else f" ({kind})"
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    processes = f", {jax.process_count()} processes" if hosts.is_distributed() else ""
    return f"{mesh.size} x {platform_of(mesh)}{where}{processes}; mesh: {shape}"


def _template(tokenizer: Tokenizer, config: TrainingConfig) -> str:
    """Returns which chat template makes prompts of texts."""
    if tokenizer.chat is None:
        start = "the text alone" if tokenizer.bos_id is None else "the text after bos"
        return f"none, a prompt is {start}"
    chosen = config.data.template
    return "the tokenizer's own" if chosen == "auto" else f"that of {chosen}"


def _parts(rows: TokenRows, index: int) -> Iterator[tuple[str, list[int]]]:
    """Yields (name, ids) of each text of a row: the prompt, which is in no loss, and responses.

    Args:
        rows: The rows as tokens.
        index: The row.
    """
    prompt = rows.prompts[index].tolist()
    if rows.kind == "corpus":
        yield "text", prompt + rows.responses[0][index].tolist()
        return
    yield "prompt", prompt
    # A labelled row may come with the response of another row.
    names = RESPONSES.get(rows.kind, ("response", "response of another row"))
    for name, responses in zip(names, rows.responses, strict=True):
        yield name, responses[index].tolist()


def _shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Returns the text of ids on one line, with special tokens; a long one lacks its middle."""
    text = tokenizer.inner.decode(ids, clean_up_tokenization_spaces=False)
    if len(text) > 2 * _ENDS + 20:
        left = len(text) - 2 * _ENDS
        shown = f"{text[:_ENDS]!r} ... {left} characters ... {text[-_ENDS:]!r}"
    else:
        shown = repr(text)
    return f"{shown} ({len(ids)} tokens)"
