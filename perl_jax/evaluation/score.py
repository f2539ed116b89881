"""`perl-jax score`: log-probabilities and reward scores of given responses."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax import errors
from perl_jax.adapters.lora import Adapter
from perl_jax.data.bucketing import fitting_batch
from perl_jax.data.config import DataConfig
from perl_jax.data.jsonl import numbered_rows
from perl_jax.data.pipeline import make_batches, with_progress
from perl_jax.data.row_checks import checked
from perl_jax.data.tokenise import RowError
from perl_jax.errors import TrainingError, UserError
from perl_jax.hub.model import TemplateOptions, load_model
from perl_jax.hub.tokenizer import Tokenizer
from perl_jax.models import passes
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import files, outputs, progress, sharding
from perl_jax.runtime.hosts import to_host
from perl_jax.runtime.programs import Program
from perl_jax.types import Tokens, Tree

FIELDS = ("prompt", "response")  # what a row must have
COMPUTED = ("token_logprobs", "logprob", "score")  # what it gets; the last with a scalar head


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig(TemplateOptions):
    """Compute log-probabilities and scores of the rows of a JSON Lines file.

    Each row needs `prompt` and `response`. It is written with all its columns and with
    `token_logprobs` (one per response token, end-of-sequence included, in nats), `logprob` (their
    sum) and, if the adapter has a scalar head, `score` (normalised if the adapter is a reward).
    These replace columns of the same names.

    Attributes:
        input: The file of rows.
        adapter: An artefact of any role; None uses the base model.
        output: The file to write; None writes to standard output.
        batch_size: How many rows are computed at a time, over all devices.
        max_prompt_length: The longest prompt in tokens; a longer one is an error.
        max_response_length: The longest response in tokens; a longer one is an error.
        temperature: Divides the logits before log-probabilities are computed.
    """

    input: str
    adapter: str | None = None
    output: str | None = None
    batch_size: int = 16
    max_prompt_length: int = 1024
    max_response_length: int = 1024
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_forward("score")
        for field in ("batch_size", "max_prompt_length", "max_response_length", "temperature"):
            errors.positive(field, getattr(self, field))


def measure_program(lm: LanguageModel, temperature: float) -> Program:
    """Returns the compiled program (base, adapter, tokens) -> (logp_BT, score_B) of `_measure`.

    Args:
        lm: The language model.
        temperature: Divides the logits before log-probabilities are computed.
    """
    return Program("measure", functools.partial(_measure, lm, temperature))


def _measure(
    lm: LanguageModel, temperature: float, base: Tree, adapter: Adapter | None, tokens: Tokens
) -> tuple:
    """Returns (logp_BT, score_B): log-probabilities of the response tokens in nats, and scores.

    score_B is None without an adapter or if the adapter has no scalar head.

    Args:
        lm: The language model.
        temperature: Divides the logits.
        base: The base weights.
        adapter: The adapter; None is the base model.
        tokens: The batch of sequences.
    """
    logp_BT = passes.sequence_logprobs(lm, base, adapter, tokens, temperature)
    if adapter is None or adapter.head is None:
        return logp_BT, None
    return logp_BT, passes.scores(lm, base, adapter, tokens)


@progress.reported("score")
def score(config: ScoreConfig) -> list[dict[str, Any]]:
    """Returns the rows of the input file, in order, with `token_logprobs`, `logprob` and `score`.

    All other columns are kept. `score` is computed only if the adapter has a scalar head.

    Raises:
        UserError: A row cannot be encoded, is too long, or has a column that JSON cannot hold.
        TrainingError: A number of a row is NaN or infinite.
    """
    numbers, whole = zip(
        *numbered_rows(files.path_of(config.input), FIELDS, others=True, compared=()), strict=True
    )
    rows = []
    for number, row in zip(numbers, whole, strict=True):
        where = f"{config.input}, line {number}"
        _check_columns(row, where)
        rows.append({field: checked(row, field, where) for field in (*FIELDS, "finished")})
    model = load_model(config)
    adapter, record = (None, None) if config.adapter is None else model.load_role(config.adapter)
    data = DataConfig(
        max_prompt_length=config.max_prompt_length, max_response_length=config.max_response_length
    )
    try:
        size = fitting_batch(config.batch_size, len(rows), model.row_parts)
        batches = make_batches(
            rows, "demonstrations", model.tokenizer, data, size, seed=None, epochs=1
        )
    except RowError as error:
        raise UserError(f"{config.input}, line {numbers[error.index]}: {error.reason}") from error
    if any(batches.truncated.values()):
        raise UserError(_first_too_long(config, model.tokenizer, rows))
    longest, positions = int(batches.rows.lengths.max()), model.lm.config.max_positions
    errors.require(
        longest <= positions,
        f"{config.input} has a row of {longest} tokens; {model.name} has {positions} positions.",
    )
    program = measure_program(model.lm, config.temperature)
    normalise = float if record is None or record.role != "reward" else record.normalise
    out: list[dict[str, Any]] = [dict(row) for row in whole]
    computed = COMPUTED if adapter is not None and adapter.head is not None else COMPUTED[:2]
    if replaced := [name for name in computed if any(name in row for row in whole)]:
        progress.say(f"score: computed numbers replace columns of the input: {', '.join(replaced)}")
    for index, batch in enumerate(with_progress(batches, "scoring")):
        logp_BT, score_B = to_host(
            program(model.base, adapter, sharding.put_batch(batch, model.mesh))
        )
        for i, row in enumerate(batches.rows_of(index)):
            if row < 0:
                continue
            token_logprobs = logp_BT[i][batch.response_BT[i]]
            found = {
                "token_logprobs": [float(x) for x in token_logprobs],
                "logprob": float(np.sum(token_logprobs, dtype=np.float64)),
            }
            if score_B is not None:
                found["score"] = float(normalise(float(score_B[i])))
            _check_finite(found, f"{config.input}, line {numbers[row]}")
            out[row] |= found
    return out


def _check_columns(row: Mapping[str, Any], where: str) -> None:
    """Raises UserError if a column of a row cannot be written as JSON.

    Python reads NaN and numbers that are too large as JSON, which has no such numbers.

    Args:
        row: The row.
        where: The file and the line, the beginning of the message.
    """
    for name, value in row.items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError as error:
            raise UserError(
                f"{where}: the field {name} holds NaN or infinity, which are not JSON."
            ) from error
        except RecursionError as error:
            raise UserError(f"{where}: the field {name} is nested too deeply.") from error


def _check_finite(found: Mapping[str, Any], where: str) -> None:
    """Raises TrainingError if a computed number of a row is NaN or infinite.

    Args:
        found: The computed columns of the row.
        where: The file and the line, the beginning of the message.
    """
    for name, value in found.items():
        if not np.all(np.isfinite(value)):
            raise TrainingError(
                f"{where}: {name} is NaN or infinite, so nothing was written; the model or its "
                "adapter gives no finite number for this row."
            )


def _first_too_long(config: ScoreConfig, tokenizer: Tokenizer, rows: Sequence[dict]) -> str:
    """Returns the error message that names the first row that is longer than a limit.

    Raises ValueError if no row is too long.
    """
    for number, row in enumerate(rows, 1):
        counts = {
            "prompt": len(tokenizer.prompt_ids(row["prompt"])),
            "response": len(tokenizer.response_ids(row["response"])),
        }
        limits = {"prompt": config.max_prompt_length, "response": config.max_response_length}
        for field, limit in limits.items():
            if counts[field] > limit:
                return (
                    f"{config.input}: the {field} of row {number} has {counts[field]} tokens; "
                    f"max_{field}_length is {limit}."
                )
    raise ValueError("no row is too long")


def run_score(config: ScoreConfig) -> None:
    """Runs `score` and writes the rows as JSON Lines to `config.output`, or prints them if it is
    None.
    """
    if config.output is not None:
        outputs.check_writable(config.output)
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in score(config))
    if config.output is None:
        print(lines, end="")
    else:
        files.write_atomically(files.path_of(config.output), lines)
        progress.say(f"score: {lines.count(chr(10)):,} scored rows written to {config.output}.")
