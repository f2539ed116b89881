"""Scores rollouts: reward models of the base run on the devices, reward terms on the host."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perl_jax.adapters.lora import Adapter
from perl_jax.generation.sampling import Rollout
from perl_jax.hub.artefacts import Record
from perl_jax.hub.model import Model
from perl_jax.hub.tokenizer import Tokenizer
from perl_jax.models import passes
from perl_jax.models.language_model import LanguageModel
from perl_jax.models.microbatches import each_microbatch
from perl_jax.rewards.compose import Composite, Term
from perl_jax.runtime import hosts, sharding, stopping
from perl_jax.runtime.hosts import Share, to_host
from perl_jax.runtime.programs import SHAPES, Program
from perl_jax.types import Array, Tokens, Tree

COMBINE = {"mean": jnp.mean, "min": jnp.min}


def combined(scores_MB: Array, combine: str | tuple[float, ...]) -> jax.Array:
    """Returns one score per row from the scores of M reward models: [B].

    Args:
        scores_MB: The normalised score of each model, [M, B].
        combine: `mean` or `min` over the models, or M weights for a weighted sum.
    """
    if isinstance(combine, str):
        return COMBINE[combine](scores_MB, axis=0)
    return jnp.tensordot(jnp.asarray(combine, scores_MB.dtype), scores_MB, axes=1)


def role_name(index: int) -> str:
    """Returns the key of a reward model among the frozen roles of the train state: `reward`,
    `reward_1`, `reward_2`, ...

    Args:
        index: The model's number, from 0.
    """
    return "reward" if index == 0 else f"reward_{index}"


def reward_program(
    model: Model,
    records: tuple[Record, ...],
    combine: str | tuple[float, ...],
    microbatches: int = 1,
) -> Program:
    """Returns the compiled program (base, reward adapters, sequences) -> (score_B, scores_MB).

    score_B [B] is the combined score. scores_MB [M, B] holds the normalised score of each of the M
    reward models.

    Args:
        model: The base model, its tokenizer and its mesh.
        records: The records of the M reward artefacts, with the moments that normalise their
            scores.
        combine: `mean`, `min`, or one weight per model (`combined`).
        microbatches: How many parts the batch is divided into; the parts are scored one after
            another.
    """
    rows = sharding.batch_sharding(model.mesh)
    members = sharding.replicated(model.mesh)
    return Program(
        "reward",
        functools.partial(
            _scores, model.lm, records, combine, ends_of(model.tokenizer), microbatches
        ),
        out_shardings=(rows, members),
        limit=SHAPES,
    )


@dataclasses.dataclass(frozen=True)
class TurnEnd:
    """The token ids that end responses: as sampled, and in rows of data (see `Tokenizer`).

    Attributes:
        stop_part: Ids that end a response in a row of data.
        tail_ids: Ids that the chat template writes after them.
        stop_ids: Ids at which sampling stops: the last id of `stop_part`, eos and others.
    """

    stop_part: tuple[int, ...]
    tail_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]


def ends_of(tokenizer: Tokenizer) -> TurnEnd | None:
    """Returns the tokenizer's ids that end a turn, or None if a sampled response already ends as a
    response in a row of data does.
    """
    ends = TurnEnd(tuple(tokenizer.stop_part), tuple(tokenizer.tail_ids), tuple(tokenizer.stop_ids))
    return None if ends.stop_part == ends.stop_ids and not ends.tail_ids else ends


def with_turn_end(tokens: Tokens, ends: TurnEnd) -> Tokens:
    """Returns sampled sequences in which complete responses end as in rows of data, with stop_part
    + tail_ids.

    A complete response ends with one of `stop_ids`. This token, and before it the other tokens of
    the stop part as far as they are there, are replaced. So the score of a text does not depend on
    which stop token was sampled. An incomplete response is not changed.

    The columns grow by len(stop_part) + len(tail_ids) - 1. The response mask still covers the
    sampled tokens only, so the added tokens are in no loss. A packed batch gets a larger capacity.

    Args:
        tokens: The sampled sequences, padded on the right.
        ends: The ids that end a turn.
    """
    end_ids, extra = (*ends.stop_part, *ends.tail_ids), len(ends.stop_part) + len(ends.tail_ids) - 1
    right = lambda x_BT: jnp.pad(jnp.asarray(x_BT), ((0, 0), (0, extra)))
    tokens_BT, valid_BT, response_BT = (
        right(tokens.tokens_BT),
        right(tokens.valid_BT),
        right(tokens.response_BT),
    )
    column_T = jnp.arange(tokens_BT.shape[1])
    last_B1 = jnp.max(jnp.where(response_BT, column_T[None, :], 0), axis=1, keepdims=True)
    back = lambda x_BT, places: jnp.take_along_axis(x_BT, jnp.maximum(last_B1 - places, 0), axis=1)
    ended_B1 = jnp.isin(back(tokens_BT, 0), jnp.asarray(ends.stop_ids, jnp.int32)) & jnp.any(
        response_BT, axis=1, keepdims=True
    )
    # How many tokens at the response's end equal the end of the stop part.
    matching_B1, goes_on_B1 = jnp.zeros_like(last_B1), ended_B1
    for places, token in enumerate(reversed(ends.stop_part)):
        goes_on_B1 = (
            goes_on_B1
            & (back(tokens_BT, places) == token)
            & back(response_BT, places)
            & (last_B1 >= places)
        )
        matching_B1 = matching_B1 + goes_on_B1
    first_B1 = last_B1 + 1 - jnp.maximum(matching_B1, 1)
    for place, token in enumerate(end_ids):
        here_BT = ended_B1 & (column_T[None, :] == first_B1 + place)
        tokens_BT, valid_BT = jnp.where(here_BT, token, tokens_BT), valid_BT | here_BT
    layout = tokens.layout
    if layout is not None:
        rows = tokens_BT.shape[0] // (layout.parts * layout.microbatches)
        layout = dataclasses.replace(layout, capacity=layout.capacity + extra * rows)
    return Tokens(tokens_BT, valid_BT, response_BT, layout)


def _scores(
    lm: LanguageModel,
    records: tuple[Record, ...],
    combine: str | tuple[float, ...],
    ends: TurnEnd | None,
    microbatches: int,
    base: Tree,
    rewards: Sequence[Adapter],
    tokens: Tokens,
) -> tuple:
    """Returns (score_B, scores_MB) of a batch: ends the turns, scores with each reward model,
    normalises and combines.

    Args:
        lm: The base model's functions.
        records: The records of the M reward models, in the order of `rewards`.
        combine: `mean`, `min`, or one weight per model.
        ends: The ids that end a turn; None if the responses already end as in rows of data.
        microbatches: How many parts the batch is divided into.
        base: The base weights; not read for models with weights of their own.
        rewards: The M reward models.
        tokens: The sampled sequences [B, T].
    """
    tokens = tokens if ends is None else with_turn_end(tokens, ends)

    def score(adapter: Adapter, record: Record) -> jax.Array:
        """Returns one reward model's normalised score_B."""
        own = None if adapter.weights is not None else base
        return record.normalise(
            each_microbatch(
                lambda part: passes.scores(lm, own, adapter, part), tokens, microbatches
            )
        )

    scores_MB = jnp.stack(
        [score(adapter, record) for adapter, record in zip(rewards, records, strict=True)]
    )
    return combined(scores_MB, combine), scores_MB


class Scorer:
    """Rewards of rollouts: weight * (reward models' score) + (weighted sum of the terms).

    As a context manager it starts and stops what the terms need (`Composite`).

    Attributes:
        model: The base model, its tokenizer and mesh.
        program: The program of `reward_program`; None without reward models, and then there are
            terms.
        weight: The factor of the reward models' score.
        rows: The data rows of the prompts, indexed by `row_B`.
        terms: The terms as one `Composite`; None without terms.
    """

    def __init__(
        self, model: Model, program: Program | None, terms: Sequence[Term], weight: float, rows: Any
    ) -> None:
        self.model, self.program, self.weight, self.rows = model, program, weight, rows
        self.terms = Composite(terms) if terms else None
        if self.terms is not None:
            self.terms.check_rows(rows)

    def over(self, rows: Any) -> Scorer:
        """Returns a scorer for rollouts of other rows, which shares the running terms with this
        one.

        Only this scorer stops the terms when its context ends. Raises UserError if a row lacks a
        column that a term compares with.

        Args:
            rows: The data rows of the other prompts.
        """
        other = copy.copy(self)
        other.rows = rows
        if self.terms is not None:
            self.terms.check_rows(rows)
        return other

    def __enter__(self) -> Scorer:
        if self.terms is not None:
            self.terms.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.terms is not None:
            self.terms.__exit__(kind, error, trace)

    def __call__(
        self, frozen: Mapping[str, Adapter], rollout: Rollout, row_B: np.ndarray
    ) -> tuple[Array, dict[str, float]]:
        """Returns (score_B, metrics): the total reward of every row of the batch, on every process.

        The metrics are `reward/term/NAME`, the mean of each term over the batch. With several
        reward models they also hold `reward/model_I`, the mean of each model's normalised score,
        and `reward/disagreement`, the mean over rows of the standard deviation over models.

        Args:
            frozen: The frozen roles of the train state by name, among them the reward models
                (`role_name`).
            rollout: The sampled responses.
            row_B: Indices into `rows` of this process's part of the batch; -1 for a filler row.
        """
        score_B, scores_MB, columns = self.parts(frozen, rollout, row_B)
        logs: dict[str, float] = {}
        if scores_MB is not None and len(scores_MB) > 1:
            spread_B = np.std(to_host(scores_MB), axis=0)
            logs |= {
                f"reward/model_{i}": float(np.mean(scores_B))
                for i, scores_B in enumerate(to_host(scores_MB))
            }
            logs["reward/disagreement"] = float(np.mean(spread_B))
        logs |= {f"reward/term/{name}": float(np.mean(column)) for name, column in columns.items()}
        return score_B, logs

    def parts(
        self, frozen: Mapping[str, Adapter], rollout: Rollout, row_B: np.ndarray
    ) -> tuple[Array, Array | None, dict[str, np.ndarray]]:
        """Returns (score_B, scores_MB, columns): the total reward of every row, and what it is made
        of.

        scores_MB has the normalised score of each reward model; it is None without reward models.
        `columns` has the unweighted rewards of each term, float64 [B], by the term's name.

        Args:
            frozen: The frozen roles, as in a call.
            rollout: The sampled responses.
            row_B: Indices into `rows` of this process's part of the batch; -1 for a filler row.
        """
        parts: list[Array] = []
        scores_MB, columns = None, {}
        if self.program is not None:
            # Ordered by number: the state is sorted by name, with reward_10 before reward_2.
            names = (role_name(index) for index in itertools.count())
            rewards = [frozen[name] for name in itertools.takewhile(frozen.__contains__, names)]
            base = self.model.base if any(role.weights is None for role in rewards) else None
            score_B, scores_MB = self.program(base, rewards, rollout.sequences)
            parts.append(score_B if self.weight == 1.0 else self.weight * score_B)
        if self.terms is not None:
            columns = self._columns(self.terms, rollout, row_B)
            total_B = hosts.replicated(
                np.asarray(self.terms.total(columns), np.float32), self.model.mesh
            )
            parts.append(jnp.asarray(total_B))
        return sum(parts[1:], start=parts[0]), scores_MB, columns

    def _columns(
        self, terms: Composite, rollout: Rollout, row_B: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Returns the unweighted rewards of all rows of the batch: {term name: float64 [B]}.

        Each row is scored by one process only; the results are then gathered on all processes. The
        terms do not see filler rows, which get 0: a judge would be paid for them.

        Args:
            terms: The terms.
            rollout: The sampled responses of the whole batch.
            row_B: Indices into `rows` of this process's part of the batch; -1 for a filler row.

        Raises:
            stopping.Abandoned: A process was told to stop while a term waited.
        """
        share = sharding.row_share(self.model.mesh)
        real = np.flatnonzero(row_B >= 0)
        rows = [self.rows[int(row_B[index])] for index in real]
        texts_B = response_texts(self.model.tokenizer, rollout, share)
        texts, special = [texts_B[index] for index in real], None
        if terms.special_tokens:
            marked_B = response_texts(self.model.tokenizer, rollout, share, special_tokens=True)
            special = [marked_B[index] for index in real]
        columns = {term.name: np.zeros(len(row_B), np.float64) for term in terms.terms}
        told = False
        try:
            if share.leads and rows:
                found = terms([row["prompt"] for row in rows], texts, rows, special)
                for name, values in found.items():
                    columns[name][real] = values
        except stopping.Abandoned:
            told = True
        if hosts.any_process(told):  # all processes stop together
            raise stopping.Abandoned
        return {name: share.gather(column) for name, column in columns.items()}


def response_texts(
    tokenizer: Tokenizer,
    rollout: Rollout,
    share: Share | None = None,
    special_tokens: bool = False,
) -> list[str]:
    """Returns the text of each response, without the tokens that end it (`Tokenizer.without_end`).

    Args:
        tokenizer: Decodes the ids.
        rollout: The sampled responses.
        share: The rows of the batch to decode, those of this process; None decodes all rows.
        special_tokens: Whether the texts have the special tokens within the responses.
    """
    part = (lambda rows: rows) if share is None else share.part
    tokens_BT, mask_BT = (
        part(to_host(rollout.sequences.tokens_BT)),
        part(to_host(rollout.sequences.response_BT)),
    )
    return [
        tokenizer.text(tokenizer.without_end(ids[mask]), special_tokens)
        for ids, mask in zip(tokens_BT, mask_BT, strict=True)
    ]
