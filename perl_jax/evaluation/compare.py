"""Compares a policy with a baseline on held-out prompts: rewards, KL, lengths, win rate,
samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from perl_jax import errors
from perl_jax.adapters.lora import Adapter
from perl_jax.data.config import DataConfig
from perl_jax.data.dataset import of_split
from perl_jax.data.loading import check_rows, load_batches, noted
from perl_jax.data.pipeline import Batches, with_progress
from perl_jax.data.store import group_of
from perl_jax.data.tasks import Gold
from perl_jax.evaluation import intervals, resampling, statistics
from perl_jax.generation.config import GREEDY, RolloutConfig
from perl_jax.generation.continuous import ContinuousSampler
from perl_jax.generation.programs import require_finite, sample_program
from perl_jax.hub.attention_path import say_attention
from perl_jax.hub.model import Model, load_model
from perl_jax.models import passes
from perl_jax.objectives import kl
from perl_jax.rewards import compose, scoring
from perl_jax.rewards.config import RewardOptions
from perl_jax.rewards.models import RewardTotal
from perl_jax.rewards.scoring import Scorer, response_texts
from perl_jax.runs import provenance, shown
from perl_jax.runs.environment import environment
from perl_jax.runs.metrics import EVALUATION_SAMPLES_NAME
from perl_jax.runs.owner import owned
from perl_jax.runtime import files, hosts, json_values, outputs, progress, sharding
from perl_jax.runtime.hosts import to_host
from perl_jax.runtime.programs import SHAPES, Program
from perl_jax.runtime.seeds import random_key

# Who decides wins, by the name in evaluation.json.
DECIDES = {"gold": "the gold reward", "judge": "the judge", "proxy": "the proxy reward"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(RewardOptions):
    """Compare a policy with a baseline on held-out prompts.

    Wins are decided by the task's gold reward, or else by a judge. The reward that the policy was
    trained on (reward, combine, reward_weight and terms) is the proxy, which is reported too.

    Attributes:
        run: The folder for evaluation.json and evaluation_samples.jsonl.
        policy: The policy artefact to evaluate.
        baseline: The policy artefact to compare with; None compares with the base model.
        judge: Reward artefacts whose mean score decides wins if the task has no gold reward.
            Without any the proxy decides, which favours a policy trained on it.
        data: The prompts.
        split: The split that the prompts are taken from.
        batch_size: How many prompts are sampled at a time, over all devices; fewer if there are
            fewer.
        temperature: The sampling temperature; 0 decodes greedily.
        rollout: How responses are decoded.
        seed: The seed of sampling.
    """

    run: str
    policy: str
    baseline: str | None = None
    judge: tuple[str, ...] = ()
    data: DataConfig = DataConfig()
    split: Literal["validation", "test"] = "test"
    batch_size: int = 128
    temperature: float = 0.7
    rollout: RolloutConfig = RolloutConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.positive("batch_size", self.batch_size)
        errors.positive("temperature", self.temperature, zero=True)
        self.check_forward("evaluate")
        errors.unread(self, ("data.packing",), "evaluate", ("training",))
        if self.temperature == 0:
            errors.unread(self, ("seed", "rollout.top_k", "rollout.top_p"), *GREEDY)


@dataclasses.dataclass(frozen=True)
class Responses:
    """One policy's responses to all prompts, in the order of the prompts.

    Attributes:
        texts: The responses as text.
        tokens: The responses as token ids, without padding.
        finished: bool [n]: whether the response ended before max_response_length.
        kl: float [n]: log pi - log pi_baseline, summed over the response's tokens, in nats.
        rewards: Scores [n] by rater: `proxy` and, if there is one, `judge`.
        gold: True rewards [n]; None if the task has none.
        groups: The group of each prompt's row (`data.store.group_of`); None if all are independent.
    """

    texts: list[str]
    tokens: list[list[int]]
    finished: np.ndarray
    kl: np.ndarray
    rewards: dict[str, np.ndarray]
    gold: np.ndarray | None
    groups: list[str] | None = None


def logprob_program(model: Model, temperature: float, max_response: int) -> Program:
    """Returns the compiled program (base, policy, sequences) -> log-probabilities [B, T], in nats.

    Args:
        model: The model whose mesh and language model are used.
        temperature: The sampling temperature, which divides the logits; 0 (greedy) counts as 1.
        max_response: Only the last `max_response` columns, which hold responses, are computed; the
            others are 0.
    """
    logprobs = functools.partial(
        passes.sequence_logprobs,
        model.lm,
        temperature=temperature or 1.0,
        max_response_length=max_response,
    )
    return Program(
        "logprobs", logprobs, limit=SHAPES, out_shardings=sharding.batch_sharding(model.mesh)
    )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What both policies of a comparison are sampled and measured with.

    Attributes:
        model: The base model with its tokenizer and mesh.
        sample: The sampler: (base, policy, prompts, key data) -> rollout.
        logprobs: The program of `logprob_program`.
        raters: {name: (scorer, its reward models by role name)}; the names are `proxy` and `judge`.
        batches: The batches of prompts.
        rows: The prompts' rows.
        gold: The true reward, (prompts, responses) -> numbers; None if the task has none.
        seed: The seed of sampling; both policies are sampled with the same keys, one per batch.
    """

    model: Model
    sample: Program | ContinuousSampler
    logprobs: Program
    raters: Mapping[str, tuple[Scorer, Mapping[str, Adapter]]]
    batches: Batches
    rows: Any
    gold: Gold | None
    seed: int


def respond(
    job: Evaluation, policy: Adapter | None, anchor: Adapter | None
) -> tuple[Responses, list[str]]:
    """Samples a policy's response to every prompt and measures it; returns (responses, prompts as
    text), both in the order of the split.

    The KL of a response is log pi - log pi_anchor, both before top-k and top-p. After filtering it
    would be infinite wherever the anchor's filter removes a token that the policy samples.

    Args:
        job: The sampler, programs and prompts.
        policy: The policy to sample from; None is the base model.
        anchor: The policy from which the KL is measured (the baseline); None is the base model.
    """
    model = job.model
    texts: list[str] = []
    tokens: list[list[int]] = []
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("row", "finished", "kl", *job.raters)
    }
    key = random_key(job.seed)
    who = "the baseline" if policy is anchor else "the policy"
    for index, batch in enumerate(with_progress(job.batches, f"{who} responds to", "prompts")):
        rollout = job.sample(
            model.base,
            policy,
            sharding.put_batch(batch, model.mesh),
            jax.random.key_data(jax.random.fold_in(key, index)),
        )
        require_finite(model, rollout)
        sequences = rollout.sequences
        own_BT = job.logprobs(model.base, policy, sequences)
        anchor_BT = own_BT if anchor is policy else job.logprobs(model.base, anchor, sequences)
        columns["kl"].append(
            to_host(kl.sequence_kl(kl.k1(own_BT, anchor_BT), sequences.response_BT))
        )
        columns["row"].append(job.batches.rows_of(index))
        columns["finished"].append(to_host(rollout.finished_B))
        for name, (scorer, models) in job.raters.items():
            columns[name].append(to_host(scorer(models, rollout, batch.row_B)[0]))
        texts += response_texts(model.tokenizer, rollout)
        ids_BT, mask_BT = to_host(sequences.tokens_BT), to_host(sequences.response_BT)
        tokens += [ids[mask].tolist() for ids, mask in zip(ids_BT, mask_BT, strict=True)]
    merged = {name: np.concatenate(parts) for name, parts in columns.items()}
    for name in ("kl", *job.raters):
        errors.require(
            bool(np.isfinite(merged[name]).all()),
            f"The measure {name} of {who} is NaN or infinite for "
            f"{int((~np.isfinite(merged[name])).sum())} of {len(texts)} responses; nothing is "
            "written.",
        )
    order = [i for i in np.argsort(merged["row"], kind="stable") if merged["row"][i] >= 0]
    prompts = [job.rows[int(merged["row"][i])]["prompt"] for i in order]
    ordered = [texts[i] for i in order]
    gold = None if job.gold is None else np.asarray(job.gold(prompts, ordered), np.float64)
    responses = Responses(
        texts=ordered,
        tokens=[tokens[i] for i in order],
        finished=merged["finished"][order],
        kl=merged["kl"][order],
        rewards={name: merged[name][order].astype(np.float64) for name in job.raters},
        gold=gold,
        groups=[group_of(job.rows[int(merged["row"][i])]) for i in order],
    )
    return responses, prompts


def describe(responses: Responses) -> dict[str, Any]:
    """Returns one policy's measures for evaluation.json.

    `proxy_reward`, `kl` (nats), `length` (tokens) and, where known, `gold_reward` and
    `judge_reward` are means as dictionaries of the fields of `Estimate`; their intervals are over
    groups of prompts. `eos_rate`, `distinct_1` and `distinct_2` are numbers.
    """
    estimate = lambda values: dataclasses.asdict(intervals.mean_ci(values, responses.groups))
    lengths = [len(ids) for ids in responses.tokens]
    out = {
        "proxy_reward": estimate(responses.rewards["proxy"]),
        "kl": estimate(responses.kl),
        "length": estimate(np.asarray(lengths, np.float64)),
        "eos_rate": float(responses.finished.mean()),
        "distinct_1": statistics.distinct_n(responses.tokens, 1),
        "distinct_2": statistics.distinct_n(responses.tokens, 2),
    }
    if responses.gold is not None:
        out["gold_reward"] = estimate(responses.gold)
    if "judge" in responses.rewards:
        out["judge_reward"] = estimate(responses.rewards["judge"])
    return out


def compare(policy: Responses, baseline: Responses, judge: str) -> dict[str, Any]:
    """Returns {"win_rate": the policy's win rate over the baseline, "gold_gain": the mean gain in
    true reward, paired by prompt}.

    `win_rate` has the fields of `WinRate` and `judge`. `gold_gain` has the fields of `Estimate`; it
    is left out if there is no true reward.

    The win rate treats the scores as a judge that is shown both responses in both orders: it
    prefers the first only if its score is strictly higher. So equal scores give one vote to each
    policy, which is a tie.

    Args:
        policy: The responses of the evaluated policy.
        baseline: The responses of the baseline to the same prompts.
        judge: Whose scores decide: `gold`, `judge` or `proxy`.
    """
    values = lambda side: side.gold if judge == "gold" else side.rewards[judge]
    a, b = values(policy), values(baseline)
    # Shown (A, B), the judge prefers the first if a > b; shown (B, A), the first is B.
    wins = statistics.both_orders(a > b, b > a, policy.groups)
    out = {"win_rate": {**dataclasses.asdict(wins), "judge": judge}}
    if policy.gold is not None:
        out["gold_gain"] = dataclasses.asdict(
            resampling.paired_bootstrap(policy.gold, baseline.gold, policy.groups)
        )
    return out


def sample_rows(
    prompts: Sequence[str], policy: Responses, baseline: Responses
) -> list[dict[str, Any]]:
    """Returns the rows of evaluation_samples.jsonl, one per prompt: {"prompt", "sft": the response
    of the baseline, "rl": that of the policy}.

    A response is {"text", "gold": its true reward or None, "proxy": its proxy reward, "finished":
    whether it ended before max_response_length}.

    Args:
        prompts: The prompts as text.
        policy: The policy's responses to them.
        baseline: The baseline's responses to them.
    """

    def cell(side: Responses, i: int) -> dict[str, Any]:
        """Returns one policy's response to the i-th prompt with its numbers."""
        gold = None if side.gold is None else float(side.gold[i])
        return {
            "text": side.texts[i],
            "gold": gold,
            "proxy": float(side.rewards["proxy"][i]),
            "finished": bool(side.finished[i]),
        }

    return [
        {"prompt": prompt, "sft": cell(baseline, i), "rl": cell(policy, i)}
        for i, prompt in enumerate(prompts)
    ]


def _is_current(path: files.Path, config: Mapping[str, Any], now: provenance.Fingerprints) -> bool:
    """Returns whether the evaluation at `path` was made with these settings from these inputs.

    Returns False if there is no evaluation, or if an input cannot be read.

    Args:
        path: The path of evaluation.json.
        config: The settings as a dictionary.
        now: The fingerprints of the inputs as they are now; None where an input cannot be read.
    """
    if not files.exists(path) or None in now.values():
        return False
    found = files.read_json(path)
    return found.get("config") == config and found.get("stands") == now


@progress.reported("evaluate")
def run_evaluate(config: EvaluateConfig) -> files.Path:
    """Runs the comparison, writes evaluation.json and evaluation_samples.jsonl, and returns the
    run's folder.

    Does nothing if the folder holds an evaluation with the same settings and the same inputs (base,
    policies, rewards and prompts, compared by content). Raises UserError for artefacts, rows or
    settings that do not fit the model.
    """
    with owned(config.run):
        folder = files.path_of(config.run)
        path = folder / "evaluation.json"
        now = provenance.fingerprints("evaluate", config)
        if hosts.broadcast_flag(_is_current(path, json_values.to_dict(config), now)):
            progress.say(result_text(config.split, files.read_json(path)))
            return folder
        if hosts.is_writer():
            outputs.check_writable(path)
        terms = compose.read_terms(config.terms)
        dataset = of_split(config.data, "prompts", config.split)
        provenance.check_artefacts(config)
        model = load_model(
            config, functools.partial(check_rows, dataset, (config.split,), config.data)
        )
        policy, _ = model.load_role(config.policy, "policy")
        baseline = (
            model.load_role(config.baseline, "policy")[0] if config.baseline is not None else None
        )
        rows = dataset.rows(config.split)
        batches = load_batches(
            model, dataset, config.split, config.data, config.batch_size, None, fitting=True
        )
        facts = noted(dataset, config.split, config.data, batches)
        with contextlib.ExitStack() as stack:

            def rater(rewards: RewardTotal) -> tuple[Scorer, Mapping[str, Adapter]]:
                """Returns (a started scorer, its reward models by role name); `stack` closes the
                scorer.
                """
                rewards = rewards.loaded(model)
                records = rewards.records
                program = (
                    scoring.reward_program(model, records, rewards.combine) if records else None
                )
                scorer = Scorer(model, program, rewards.terms, rewards.weight, rows)
                return stack.enter_context(scorer), rewards.roles

            raters = {
                "proxy": rater(
                    RewardTotal(config.reward, config.combine, config.reward_weight, terms)
                )
            }
            if config.judge:
                raters["judge"] = rater(RewardTotal(config.judge))
            job = Evaluation(
                model=model,
                sample=sample_program(
                    model, config.data.max_response_length, config.temperature, config.rollout
                ),
                logprobs=logprob_program(
                    model, config.temperature, config.data.max_response_length
                ),
                raters=raters,
                batches=batches,
                rows=rows,
                gold=dataset.gold,
                seed=config.seed,
            )
            say_attention("evaluate", model.lm)
            ours, prompts = respond(job, policy, baseline)
            theirs, _ = respond(job, baseline, baseline)
        judge = "gold" if dataset.gold is not None else "judge" if config.judge else "proxy"
        results = {
            "policies": {"sft": describe(theirs), "rl": describe(ours)},
            **compare(ours, theirs, judge),
            "config": json_values.to_dict(config),
            "stands": now,
        }
        if hosts.is_writer():
            _write(folder, config, results | {"prompts": facts}, sample_rows(prompts, ours, theirs))
        progress.say(result_text(config.split, results))
        return folder


def result_text(split: str, results: Mapping[str, Any]) -> str:
    """Returns a sentence with the main measures of an evaluation, with their intervals.

    Args:
        split: The split of the prompts.
        results: The content of evaluation.json.
    """
    ours, theirs, wins = (*map(results["policies"].get, ("rl", "sft")), results["win_rate"])
    # The fields of an estimate, for a share that has other names.
    rate = shown.estimate_text({**wins, "value": wins["rate"]}, percent=True)
    said = [f"win rate {rate}, decided by {DECIDES[wins['judge']]}"]
    for key in ("gold_reward", "judge_reward", "proxy_reward"):
        if key in ours:
            before = shown.estimate_text(theirs[key]["value"])
            now = shown.estimate_text(ours[key])
            said.append(f"{key.replace('_', ' ')} {now} against {before}")
    said.append(f"KL {shown.estimate_text(ours['kl'])} nats")
    said.append(f"{shown.estimate_text(ours['eos_rate'], percent=True)} of the responses ended")
    return f"evaluate: {ours['kl']['n']:,} {split} prompts: {'; '.join(said)}."


def _write(
    folder: files.Path,
    config: EvaluateConfig,
    results: dict[str, Any],
    samples: Sequence[Mapping[str, Any]],
) -> None:
    """Writes config.json, evaluation_samples.jsonl and evaluation.json, in this order.

    An existing config.json (that of the run that trained the policy) is not overwritten. Keys of an
    existing evaluation.json that `results` lacks are kept.

    Args:
        folder: The folder; it is made if it does not exist.
        config: The settings of the evaluation.
        results: The content of evaluation.json.
        samples: The rows of evaluation_samples.jsonl.
    """
    files.make_folder(folder)
    if not files.exists(folder / "config.json"):
        settings = {"job": "evaluate", **json_values.to_dict(config)}
        files.write_json(folder / "config.json", {"config": settings, "environment": environment()})
    lines = [json.dumps(row) + "\n" for row in samples]
    files.write_atomically(folder / EVALUATION_SAMPLES_NAME, "".join(lines))
    path = folder / "evaluation.json"
    before = files.read_json(path) if files.exists(path) else {}
    files.write_json(path, before | results)
