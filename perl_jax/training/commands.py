"""The training commands: configs with model, task and folder, and the functions that run them.

A finished run is left as it is; the same command resumes an unfinished one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from perl_jax import errors
from perl_jax.data import targets
from perl_jax.data.dataset import Dataset, of_task
from perl_jax.data.loading import check_rows, load_batches
from perl_jax.hub.model import Model, ModelOptions, load_model
from perl_jax.rewards import compose
from perl_jax.rewards.config import RewardOptions
from perl_jax.rewards.models import RewardTotal
from perl_jax.runs import provenance
from perl_jax.runs.folder import is_finished, open_run
from perl_jax.runs.owner import owned
from perl_jax.runtime import files
from perl_jax.training.configs import DPOConfig, RewardConfig, SFTConfig, TrainingConfig
from perl_jax.training.dpo import train_dpo
from perl_jax.training.reward import reward_job, train_reward
from perl_jax.training.rl import train_rl
from perl_jax.training.rl_config import RLConfig
from perl_jax.training.sft import train_sft


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingCommand(ModelOptions, TrainingConfig):
    """What every training command has in addition to the settings of its job.

    Attributes:
        run: The run's folder; the same command again resumes it.
        stack_on: Folder of an adapter that stays frozen beneath the fresh one; None: the base
            alone.
    """

    run: str
    stack_on: str | None = None

    def __post_init__(self) -> None:
        ModelOptions.__post_init__(self)
        # The job's own checks come next in the order of the bases.
        super(ModelOptions, self).__post_init__()
        errors.require(
            self.stack_on is None or self.tuning == "lora",
            "stack_on needs tuning lora: full tuning has no adapter to put on top.",
        )
        if not self.has_adapters:
            errors.unread(self, ("mesh.adapters",), "tuning full", ("tuning lora",))

    @property
    def has_adapters(self) -> bool:
        """Returns whether the command reads or trains an adapter."""
        return self.tuning == "lora"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyCommand(TrainingCommand):
    """What commands that improve a policy have.

    Attributes:
        policy: Folder of the policy artefact to start from; None: the base.
    """

    policy: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.require(
            self.policy is None or self.stack_on is None,
            "Give policy (an adapter to train on) or stack_on (one to leave frozen under a fresh "
            "adapter), not both.",
        )

    @property
    def has_adapters(self) -> bool:
        """Returns whether the command reads or trains an adapter."""
        return super().has_adapters or self.policy is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTCommand(TrainingCommand, SFTConfig):
    """Fit a policy to demonstrations, the loss on response tokens only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardCommand(TrainingCommand, RewardConfig):
    """Fit a scalar reward; the best validation step is kept (accuracy of pairs, AUC of labels,
    correlation with ratings).
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOCommand(PolicyCommand, DPOConfig):
    """Fit a policy to preferences directly, without a reward model: by --loss dpo, ipo or orpo to
    comparisons, by --loss kto to labelled responses. The reference is the policy that training
    starts from; orpo has none.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLCommand(RewardOptions, PolicyCommand, RLConfig):
    """Policy gradients on rollouts: sample, score, compare with a reference, learn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_value_head(len(self.reward))
        if self.policy is None:
            self.check_stale(self.lora.dropout)

    @property
    def has_adapters(self) -> bool:
        """Returns whether the command reads or trains an adapter."""
        return (
            super().has_adapters
            or bool(self.reward)
            or self.kl.reference not in ("start", "base", "none")
        )


def _ready(
    config: TrainingCommand, rows: Dataset, read: Sequence[str], samples: int = 1
) -> Callable[[Model], None]:
    """Returns checks of the rows that need the tokenizer alone, for `load_model`: an error in them
    comes before the weights are read.

    Args:
        config: The command's config.
        rows: The rows.
        read: The splits that the job reads; the first one is trained on.
        samples: Rows of a step that come from one row of the split.
    """

    def check(model: Model) -> None:
        """Checks lengths, then tokenises the splits, and plans the batches of training."""
        check_rows(rows, read, config.data, model)
        size, parts = config.batch_size // samples, config.microbatches if samples == 1 else 1
        load_batches(model, rows, read[0], config.data, size, config.seed, parts)

    return check


def run_sft(config: SFTCommand) -> files.Path:
    """Trains a policy on a task's demonstrations; returns the folder of the policy artefact.

    A finished run is left as it is.
    """
    with owned(config.run):
        run = open_run("sft", config)
        if not is_finished(run, "policy", "cost.json"):
            read = ("train", "validation")
            rows = of_task(config.data, "demonstrations", read)
            provenance.check_artefacts(config)
            # No name here holds the model: full tuning lets go of the base.
            ready = _ready(config, rows, read)
            train_sft(load_model(config, ready), rows, config, frozen=config.stack_on, run=run)
        return run.artefact("policy")


def run_reward(config: RewardCommand) -> files.Path:
    """Trains a reward model on a task's rows; returns the folder of the reward artefact.

    A finished run is left as it is.
    """
    with owned(config.run):
        run = open_run("reward", config)
        if not is_finished(run, "reward", "evaluation.json"):
            job = reward_job(config)
            check = job.truth
            if config.objective == "pairwise":
                soft = config.split if config.soft_labels else None
                check = functools.partial(targets.check_pairs, soft)
            read = (config.split, "validation", "test")
            rows = of_task(config.data, job.kind, read, check)
            provenance.check_artefacts(config)
            ready = _ready(config, rows, read)
            train_reward(load_model(config, ready), rows, config, frozen=config.stack_on, run=run)
        return run.artefact("reward")


def run_dpo(config: DPOCommand) -> files.Path:
    """Trains a policy on a task's comparisons or labels; returns the folder of the policy artefact.

    A finished run is left as it is.
    """
    with owned(config.run):
        run = open_run("dpo", config)
        if not is_finished(run, "policy", "evaluation.json"):
            kind, check = config.objective.kind, targets.both_classes
            if kind == "comparisons":
                check = functools.partial(
                    targets.check_pairs, "train" if config.soft_labels else None
                )
            read = ("train", "validation", "test")
            rows = of_task(config.data, kind, read, check)
            provenance.check_artefacts(config)
            train_dpo(
                load_model(config, _ready(config, rows, read)),
                rows,
                config,
                policy=config.policy,
                frozen=config.stack_on,
                run=run,
            )
        return run.artefact("policy")


def run_rl(config: RLCommand) -> files.Path:
    """Trains a policy against rewards on a task's prompts; returns the folder of the policy
    artefact.

    A finished run is left as it is.
    """
    with owned(config.run):
        run = open_run("rl", config)
        if not is_finished(run, "policy", "cost.json"):
            terms = compose.read_terms(config.terms)
            rows = of_task(config.data, "prompts", ("train",))
            provenance.check_artefacts(config)
            read = tuple(split for split in ("train", "validation") if split in rows.splits)
            samples = config.algorithm.group
            train_rl(
                load_model(config, _ready(config, rows, read, samples)),
                rows,
                config,
                rewards=RewardTotal(config.reward, config.combine, config.reward_weight, terms),
                policy=config.policy,
                frozen=config.stack_on,
                run=run,
            )
        return run.artefact("policy")
