"""Best-of-N: the best of several samples by a reward, as a baseline and as rows to distil from."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any, Literal

import jax
import numpy as np

from perl_jax import config as config_lib, hosts, sharding
from perl_jax.config import require
from perl_jax.data.tasks import get_task
from perl_jax.loops import scoring
from perl_jax.loops.jobs import DataConfig, RewardOptions, RolloutConfig
from perl_jax.loops.model import check_context, host, load_model
from perl_jax.loops.policies import sample_program
from perl_jax.loops.scoring import Scorer, response_texts
from perl_jax.loops.supervised import load_batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfConfig(RewardOptions):
    """Sample N responses to each prompt and keep the one that the reward likes best.

    The output is JSON Lines with `prompt`, `response`, `score` and `mean_score` (of the N), which
    `sft --data.task jsonl` can be trained on; a summary goes to standard error.

    Attributes:
        policy: The policy artefact to sample from; None: the base.
        n: Responses to each prompt.
        data: The prompts.
        split: The split the prompts are from.
        output: The file to write; it must not exist yet.
        batch_size: Responses at a time, over all devices.
        temperature: Of sampling.
        rollout: How responses are decoded.
        seed: Of sampling.
    """

    policy: str | None = None
    n: int = 8
    data: DataConfig = DataConfig()
    split: Literal["train", "validation", "test"] = "train"
    output: str
    batch_size: int = 128
    temperature: float = 0.7
    rollout: RolloutConfig = RolloutConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("n", "batch_size"):
            config_lib.whole(field, getattr(self, field))
        require(self.batch_size % self.n == 0, f"batch_size is {self.batch_size} responses; it must be a multiple of n, {self.n}.")
        config_lib.positive("temperature", self.temperature)


def kl_bound(n: int) -> float:
    """KL(best of n || policy) <= log n - (n - 1) / n, for any reward (Beirami et al. 2024, arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def run_best_of(config: BestOfConfig) -> dict[str, float]:
    """Writes the rows; returns means over prompts: of the best score, of all scores, gold where known."""
    output = pathlib.Path(config.output).expanduser()
    require(not hosts.agreed(output.exists()), f"{output} exists already; give --output a file that does not.")
    terms = scoring.read_terms(config.terms)
    model = load_model(config)
    check_context(model, config.data)
    policy = None if config.policy is None else model.load_role(config.policy, "policy")[0]
    rewards, records = scoring.load_rewards(model, config.reward)
    batches, rows = load_batches(model, config.data, "prompts", config.split, config.batch_size // config.n, None)
    task = get_task(config.data.task)
    shared = model.shared_prompts(config.batch_size, config.n)
    sample = sample_program(model, config.data.max_response_length, config.temperature, config.rollout, shared)
    base = model.base if policy is None or policy.weights is None else None
    program = scoring.reward_program(model, records, config.combine) if records else None
    key = jax.random.key(config.seed)
    made: dict[int, dict[str, Any]] = {}
    with Scorer(model, program, terms, config.reward_weight, rows) as scorer:
        for index, batch in enumerate(batches):
            # For the terms filler prompts have the first row's text.
            repeated = batch.repeated(config.n)
            prompts = sharding.put_batch(batch.repeated(config.n // shared), model.mesh)
            rollout = sample(base, policy, prompts, jax.random.key_data(jax.random.fold_in(key, index)))
            score_PN = np.asarray(host(scorer(rewards, rollout, np.maximum(repeated.row_B, 0))[0])).reshape(-1, config.n)
            texts = np.asarray(response_texts(model.tokenizer, rollout), object).reshape(-1, config.n)
            for row, scores_N, texts_N in zip(batches.rows_of(index), score_PN, texts):
                if row >= 0:
                    best = int(np.argmax(scores_N))
                    prompt = rows[int(row)]["prompt"]
                    made[int(row)] = {"prompt": prompt, "response": texts_N[best], "score": float(scores_N[best]), "mean_score": float(scores_N.mean())}
                    if task.gold is not None:
                        gold_N = task.gold([prompt] * config.n, list(texts_N))
                        made[int(row)] |= {"gold": float(gold_N[best]), "mean_gold": float(gold_N.mean())}
    written = [made[row] for row in sorted(made)]
    if hosts.is_writer():
        output.parent.mkdir(parents=True, exist_ok=True)
        config_lib.write_atomically(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written))
    means = {name: float(np.mean([row[name] for row in written])) for name in written[0] if name not in ("prompt", "response")}
    return means | {"kl_bound": kl_bound(config.n)}
