"""perl_jax in the contest, by the functions that its own jobs run; see `contest.py` for the
protocol.

python experiments/benchmarks/contest/contender_perl_jax.py --work FOLDER --job JOB [--tuning full]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import contender
import jax
import numpy as np
import work

from perl_jax.adapters.full import cast_frozen_role
from perl_jax.adapters.initial_values import init_head
from perl_jax.adapters.lora import Adapter, LoRAConfig
from perl_jax.data.config import DataConfig
from perl_jax.data.dataset import of_rows
from perl_jax.data.pipeline import Batches, make_batches
from perl_jax.generation import programs as programs_lib
from perl_jax.generation.config import RolloutConfig
from perl_jax.hub.artefacts import Record
from perl_jax.hub.model import Model, load_model
from perl_jax.objectives.algorithms import AlgorithmConfig
from perl_jax.rewards import compose, scoring
from perl_jax.runtime import sharding
from perl_jax.training import cost, fit, rl
from perl_jax.training import optimizers as optimizers_lib
from perl_jax.training import reward as reward_lib
from perl_jax.training.commands import RewardCommand, RLCommand
from perl_jax.training.optimizers import OptimizerConfig
from perl_jax.training.rl_config import KLConfig
from perl_jax.training.rl_programs import Programs
from perl_jax.training.rl_step import Rollouts, advance
from perl_jax.training.roles import fresh_role

KINDS = {
    "reward-equal": "comparisons",
    "reward-ragged": "comparisons",
    "rl-model": "prompts",
    "rl-function": "prompts",
    "generate": "prompts",
}
# On a CPU as fast as the batch at once, in less memory. Ragged pairs do not deal out evenly among
# more.
MICROBATCHES = {
    "reward-equal": 4,
    "reward-ragged": 2,
    "rl-model": 8,
    "rl-function": 8,
    "generate": 1,
}
ALGORITHMS = {"rl-model": "rloo", "rl-function": "grpo"}
RECORD = Record(
    "reward", "lora", None, True, "contest", "-", "-", 0, {}, score_mean=0.0, score_std=1.0
)
ROWS = work.PROMPTS * work.SAMPLES
# Lengths of rows are at most these.
LONGEST = max(map(max, work.RAGGED))
# step(number, parts) -> tokens, and the compiler's account of the step's programs in bytes (none of
# a job without a state).
Taken = tuple[Callable[[int, contender.Parts], int], Callable[[], dict[str, int]]]


ADAPTERS = LoRAConfig(rank=work.RANK, alpha=work.ALPHA)


def config_of(job: str, folder: pathlib.Path, tuning: str) -> RewardCommand | RLCommand:
    """The job as a user would configure it."""
    shared = {
        "model": str(folder / "model"),
        "run": "-",
        "tuning": tuning,
        # Full tuning refuses the size of an adapter that it does not have.
        **({"lora": ADAPTERS} if tuning == "lora" else {}),
        "optimizer": OptimizerConfig(name="adamw"),
        "microbatches": MICROBATCHES[job] if work.SIZE.device == "cpu" else 1,
        "dtype": work.SIZE.dtype,
    }
    if KINDS[job] == "comparisons":
        data = DataConfig(
            task="jsonl", max_prompt_length=LONGEST, max_response_length=LONGEST, bucket_count=1
        )
        return RewardCommand(**shared, data=data, batch_size=work.PAIRS)
    function = json.dumps(
        [{"kind": "function", "function": f"{pathlib.Path(contender.__file__)}:even_words"}]
    )
    return RLCommand(
        **shared,
        data=DataConfig(
            task="jsonl",
            max_prompt_length=work.PROMPT_TOKENS,
            max_response_length=work.NEW_TOKENS,
            bucket_count=1,
        ),
        batch_size=ROWS,
        algorithm=AlgorithmConfig(name=ALGORITHMS.get(job, "rloo"), samples=work.SAMPLES),
        kl=KLConfig(beta=work.KL_WEIGHT),
        temperature=1.0,
        reward=("reward",) if job != "rl-function" else (),
        terms=function if job == "rl-function" else None,
    )


def endless(model: Model) -> Model:
    """A model whose responses nothing ends: every contender samples them whole."""
    model.tokenizer.stop_ids = ()
    return model


def batches_of(model: Model, rows: Sequence[dict[str, str]], job: str, config: Any) -> Batches:
    """The file's batches in its order, over and over."""
    return make_batches(
        rows,
        KINDS[job],
        model.tokenizer,
        dataclasses.replace(config.data, bucket_count=1),
        work.PAIRS if KINDS[job] == "comparisons" else work.PROMPTS,
        seed=None,
        packed=model.packs(config.data.packing),
        parts=model.row_parts,
        microbatches=config.microbatches,
    )


def reward_step(model: Model, config: RewardCommand, batches: Batches) -> Taken:
    """One update of a reward model."""
    role = fresh_role(model, config, jax.random.key(0)).replace(
        head=init_head(jax.random.key(1), model.lm.config.width)
    )
    optimizers = {
        "reward": optimizers_lib.make_optimizer(
            config.optimizer, config.steps, config.tuning, model.lm.config.width
        )
    }
    state = fit.initial_state(model, config, {"reward": role}, optimizers)
    job = reward_lib.reward_job(config)
    objective = functools.partial(job.objective, model.lm)
    program = fit.learn_program(model, config, objective, state, optimizers)
    base, held = None if config.tuning == "full" else model.base, [state]

    def step(number: int, parts: contender.Parts) -> int:
        batch = batches.batch(number % batches.steps_per_epoch)
        held[0], metrics = jax.block_until_ready(
            program(held[0], base, job.ready(model, held[0], batch))
        )
        finite(metrics)
        return int(batch.chosen.valid_BT.sum() + batch.rejected.valid_BT.sum())

    return step, lambda: cost.peak_compiled(model, held[0], {"learn": program})


def moved(role: Adapter, seed: int) -> Adapter:
    """An adapter that is no longer the base: B random too."""
    shift = lambda leaf: leaf + 0.01 * jax.random.normal(jax.random.key(seed), leaf.shape)
    return role if role.lora is None else role.replace(lora=jax.tree.map(shift, role.lora))


def rl_step(
    model: Model, config: RLCommand, batches: Batches, rows: Sequence[dict[str, str]]
) -> Taken:
    """Rollouts, rewards, reference and an update; its tokens are those that were sampled."""
    dtype, adapters = (
        model.lm.config.dtype,
        dataclasses.replace(config, tuning="lora", lora=ADAPTERS),
    )
    policy = fresh_role(model, config, jax.random.key(0))
    reward = moved(fresh_role(model, adapters, jax.random.key(2)), 3).replace(
        head=init_head(jax.random.key(1), model.lm.config.width)
    )
    frozen = {"reference": cast_frozen_role(policy, dtype)} | (
        {"reward": reward} if config.reward else {}
    )
    roles, records = {"policy": policy}, (RECORD,) if config.reward else ()
    optimizers = rl.make_optimizers(config, roles, model.lm.config.width)
    state = fit.initial_state(model, config, roles, optimizers, frozen, {"beta": config.kl.beta})
    scores = None
    if records:
        scores = scoring.reward_program(model, records, config.combine, config.microbatches)
    programs = Programs(model, config, scores, state, optimizers)
    scorer = scoring.Scorer(
        model, programs.reward, compose.read_terms(config.terms), config.reward_weight, rows
    ).__enter__()
    base = None if config.tuning == "full" else model.base
    dataset = of_rows("prompts", rows)
    job = Rollouts(model, base, programs, scorer, dataset, rows, config)
    held = [state]

    def step(number: int, parts: contender.Parts) -> int:
        held[0], metrics, seconds = advance(
            job, held[0], batches.batch(number % batches.steps_per_epoch)
        )
        finite(metrics)
        parts.seconds = {
            "generate": seconds["sample"],
            "score": seconds["score"],
            "learn": seconds["learn"],
        }
        return round(metrics["response/length"] * ROWS)

    return step, lambda: cost.peak_compiled(model, held[0], programs.by_name())


def generate_step(
    model: Model, config: RLCommand, batches: Batches, new_tokens: int = work.NEW_TOKENS
) -> Taken:
    """Sampling alone."""
    policy = moved(fresh_role(model, config, jax.random.key(0)), 3)
    program = programs_lib.sample_program(model, new_tokens, 1.0, RolloutConfig(), work.SAMPLES)

    def step(number: int, parts: contender.Parts) -> int:
        prompts = sharding.put_batch(batches.batch(number % batches.steps_per_epoch), model.mesh)
        rollout = program(model.base, policy, prompts, jax.random.key_data(jax.random.key(number)))
        return int(np.sum(rollout.sequences.response_BT))

    return step, dict


def finite(metrics: dict[str, Any]) -> None:
    if not bool(metrics["finite"]):
        raise ValueError("The loss or a gradient is not finite.")


def run(options: argparse.Namespace, protocol: contender.Protocol) -> None:
    rows, config = (
        contender.read_rows(options.work, options.job),
        config_of(options.job, options.work, options.tuning),
    )
    model = endless(load_model(config))
    batches = batches_of(model, rows, options.job, config)
    if KINDS[options.job] == "comparisons":
        step, compiled = reward_step(model, config, batches)
    elif options.job == "generate":
        step, compiled = generate_step(model, config, batches)
    else:
        step, compiled = rl_step(model, config, batches, rows)
    parts, numbers = contender.Parts(), itertools.count()
    for _ in range(2):
        contender.check_tokens(options.job, step(next(numbers), parts))
    parts.take()
    lm = model.lm.config
    settings = (
        f"{options.tuning}, {config.microbatches} microbatches, {lm.dtype}, attention "
        f"{lm.attention}, packed {batches.packer is not None}, defaults otherwise"
    )
    compiled_mib = {name: count / 2**20 for name, count in compiled().items()}
    protocol.ready(
        "perl_jax",
        contender.versions(["perl_jax", "jax", "jaxlib", "flax"]),
        settings,
        compiled_mib,
    )
    for number in steps(protocol, numbers):
        tokens = step(number, parts)
        protocol.report(
            contender.check_tokens(options.job, tokens),
            parts.take(),
            None if KINDS[options.job] == "comparisons" else "others",
        )


def steps(protocol: contender.Protocol, numbers: Iterator[int]) -> Iterator[int]:
    """Numbers of steps, as they are asked for."""
    while protocol.wait():
        yield next(numbers)


if __name__ == "__main__":
    # Before anything prints.
    speaking = contender.Protocol()
    jax.config.update("jax_platforms", work.SIZE.platform)
    if work.SIZE.device == "gpu":
        speaking.peak_bytes = lambda: jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    run(contender.parser(__doc__, list(KINDS)).parse_args(), speaking)
