"""Best-of-N sampling: keeps the response with the highest reward, as a baseline or as rows to
distil from.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from perl_jax import errors
from perl_jax.data.config import DataConfig
from perl_jax.data.dataset import Dataset, of_split
from perl_jax.data.loading import check_rows, load_batches, noted
from perl_jax.data.pipeline import with_progress
from perl_jax.data.store import named_group
from perl_jax.generation.config import RolloutConfig
from perl_jax.generation.programs import require_finite, sample_program
from perl_jax.hub.model import Model, load_model
from perl_jax.rewards import compose, scoring
from perl_jax.rewards.compose import Term
from perl_jax.rewards.config import RewardOptions
from perl_jax.rewards.models import RewardTotal
from perl_jax.rewards.scoring import Scorer, response_texts
from perl_jax.rewards.shaping import ShapingConfig, shaped
from perl_jax.runs import provenance
from perl_jax.runtime import files, hosts, outputs, progress, sharding
from perl_jax.runtime.hosts import to_host
from perl_jax.runtime.replacing import require_consent
from perl_jax.runtime.seeds import random_key


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfConfig(RewardOptions):
    """Sample N responses to each prompt and keep the one with the highest reward.

    The reward is the one that RL maximises, without its KL penalty: the shaped score.

    The output is a JSON Lines file on which `sft --data.task jsonl` can train. Its rows have the
    fields `split`, `row` (the prompt's index in its split), `prompt`, `group` (if the prompt has
    one) and `response`. The numbers are `score`, `reward` (the shaped score, by which responses are
    selected) and `finished` (whether the response ended before max_response_length); `mean_NAME`
    is the mean of a number over the N responses. `sft` reads `split`, so that it never trains on
    test prompts, and `finished`, so that it never ends a response that was cut. Prompts whose best
    response is empty are left out, because nothing can be learned from it. A summary over all
    prompts is printed to standard error; its `empty` counts the prompts left out.

    Attributes:
        policy: The policy artefact to sample from; None samples from the base model.
        n: The number of responses per prompt.
        data: The prompts.
        split: The split that the prompts are taken from.
        shaping: Clipping and penalties of scores, as in RL.
        output: The file to write; it must not exist, unless --overwrite is given.
        batch_size: How many responses are sampled at a time, over all devices.
        temperature: The sampling temperature.
        rollout: How responses are decoded.
        seed: The seed of sampling.
    """

    policy: str | None = None
    n: int = 8
    data: DataConfig = DataConfig()
    split: Literal["train", "validation", "test"] = "train"
    shaping: ShapingConfig = ShapingConfig()
    output: str
    batch_size: int = 128
    temperature: float = 0.7
    rollout: RolloutConfig = RolloutConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("n", "batch_size"):
            errors.whole(field, getattr(self, field))
        errors.require(
            self.batch_size % self.n == 0,
            f"batch_size is {self.batch_size} responses; it must be a multiple of n, {self.n}.",
        )
        errors.positive("temperature", self.temperature)
        self.check_forward("best-of")
        errors.unread(self, ("data.packing",), "best-of", ("training",))
        if self.policy is None:
            errors.unread(
                self, ("rollout.adapters",), "best-of without a policy", ("best-of with a policy",)
            )
        whitened = (
            "shaping.whiten divides by the deviation over a training batch, which does not change "
            "which response is the best; leave it out."
        )
        errors.require(not self.shaping.whiten, whitened)
        self.shaping.check_length(self.data.max_response_length)


# The columns of a row that are no numbers.
_TEXTS = ("split", "row", "prompt", "group", "response")


def kl_bound(n: int) -> float:
    """Returns log n - (n - 1) / n, an upper bound of KL(best-of-n || policy) in nats, whatever the
    reward.

    Source: Beirami et al. 2024, arXiv 2401.01879.

    Args:
        n: The number of responses from which the best is kept.
    """
    return math.log(n) - (n - 1) / n


def best_response(texts_G: np.ndarray, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the response with the highest reward, the first of equal ones, as a dictionary.

    Its keys are `response` (the text) and, for each column NAME, `NAME` (the best response's
    number) and `mean_NAME` (the mean over the G responses).

    Args:
        texts_G: The G responses to one prompt.
        columns: Arrays [G] by name, among them `reward`.
    """
    best = int(np.argmax(columns["reward"]))
    row: dict[str, Any] = {"response": texts_G[best]}
    for name, values_G in columns.items():
        row |= {name: values_G[best].item(), f"mean_{name}": float(values_G.mean())}
    return row


def is_empty(row: Mapping[str, Any]) -> bool:
    """Returns whether the row's response is empty or only white space; such a row is no
    demonstration.
    """
    return not row["response"].strip()


def summary(rows: Sequence[Mapping[str, Any]], n: int) -> dict[str, float]:
    """Returns the mean over the prompts of each number in the rows, by name, and two more numbers.

    The rows have the numbers `NAME` (of the best response) and `mean_NAME` (the mean over all n
    responses). `finished` is renamed to `eos_rate`, and `mean_finished` to `mean_eos_rate`.
    `kl_bound` is `kl_bound(n)`, an upper bound on the KL to the policy in nats. `empty` is the
    number of best responses that are empty.

    Args:
        rows: The rows of `best_responses`, at least one.
        n: The number of responses per prompt.
    """
    columns = [name for name in rows[0] if name not in _TEXTS]
    names = {"finished": "eos_rate", "mean_finished": "mean_eos_rate"}
    means = {names.get(name, name): float(np.mean([row[name] for row in rows])) for name in columns}
    return means | {"kl_bound": kl_bound(n), "empty": float(sum(map(is_empty, rows)))}


@progress.reported("best-of")
def run_best_of(config: BestOfConfig) -> dict[str, float]:
    """Runs best-of-N, writes the rows whose response is not empty as JSON Lines, and returns the
    `summary` of all rows.

    Raises Occupied if the output file exists and may not be replaced, and UserError if all best
    responses are empty.
    """
    output = files.path_of(config.output)
    if hosts.broadcast_flag(files.exists(output)):
        require_consent(f"{output} exists already; give --output a file that does not.", output)
    if hosts.is_writer():
        outputs.check_writable(output)
    terms = compose.read_terms(config.terms)
    dataset = of_split(config.data, "prompts", config.split)
    provenance.check_artefacts(config)
    ready = functools.partial(check_rows, dataset, (config.split,), config.data)
    everything = best_responses(config, load_model(config, ready), dataset, terms)
    written = [row for row in everything if not is_empty(row)]
    nothing = (
        f"The best response is empty for all of the {len(everything)} prompts; there is "
        f"nothing to write to {output}."
    )
    errors.require(bool(written), nothing)
    if hosts.is_writer():
        files.write_atomically(
            output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written)
        )
    return summary(everything, config.n)


def best_responses(
    config: BestOfConfig, model: Model, dataset: Dataset, terms: tuple[Term, ...]
) -> list[dict[str, Any]]:
    """Returns the best of `config.n` responses to each prompt, in the order of the split.

    Each row has `split`, `row` (the prompt's index in it), `prompt`, `group` (if the prompt has
    one) and the keys of `best_response` for `score`, `reward` (the shaped score), `finished` and,
    if the task has a true reward, `gold`.

    Args:
        config: The settings.
        model: The base model.
        dataset: The prompts.
        terms: The terms of the reward besides the reward models (`config.terms`, parsed).
    """
    policy = None if config.policy is None else model.load_role(config.policy, "policy")[0]
    rewards = RewardTotal(config.reward, config.combine, config.reward_weight, terms).loaded(model)
    roles, records = rewards.roles, rewards.records
    rows, number = dataset.rows(config.split), config.batch_size // config.n
    batches = load_batches(model, dataset, config.split, config.data, number, None, fitting=True)
    noted(dataset, config.split, config.data, batches)
    shared = model.shared_prompts(batches.batch_size * config.n, config.n)
    sample = sample_program(
        model, config.data.max_response_length, config.temperature, config.rollout, shared
    )
    base = model.base if policy is None or policy.weights is None else None
    program = scoring.reward_program(model, records, config.combine) if records else None
    key = random_key(config.seed)
    made: dict[int, dict[str, Any]] = {}
    with Scorer(model, program, rewards.terms, rewards.weight, rows) as scorer:
        for index, batch in enumerate(with_progress(batches, "responding to", "prompts")):
            repeated = batch.repeated(config.n)
            prompts = sharding.put_batch(batch.repeated(config.n // shared), model.mesh)
            rollout = sample(
                base, policy, prompts, jax.random.key_data(jax.random.fold_in(key, index))
            )
            require_finite(model, rollout)
            score_B = to_host(scorer(roles, rollout, repeated.row_B)[0])
            errors.require(
                bool(np.isfinite(score_B).all()),
                f"The reward is NaN or infinite for {int((~np.isfinite(score_B)).sum())} of "
                f"{len(score_B)} responses; nothing is written.",
            )
            rollout = to_host(rollout)
            columns = {
                "score": score_B,
                "reward": to_host(
                    shaped(config.shaping, config.data.max_response_length, score_B, rollout)
                ),
                "finished": rollout.finished_B,
            }
            columns = {name: column_B.reshape(-1, config.n) for name, column_B in columns.items()}
            texts_PG = np.asarray(response_texts(model.tokenizer, rollout), object).reshape(
                -1, config.n
            )
            for entry, row in enumerate(batches.rows_of(index).tolist()):
                if row >= 0:
                    source, texts_G = rows[row], texts_PG[entry]
                    # A demonstration has the group of its prompt.
                    prompt, group = source["prompt"], named_group(source)
                    measured = {name: column_PG[entry] for name, column_PG in columns.items()}
                    if dataset.gold is not None:
                        measured["gold"] = dataset.gold([prompt] * config.n, list(texts_G))
                    made[row] = {
                        "split": config.split,
                        "row": row,
                        "prompt": prompt,
                        **({"group": group} if group else {}),
                        **best_response(texts_G, measured),
                    }
    return [made[row] for row in sorted(made)]
