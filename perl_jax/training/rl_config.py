"""Settings of RL: the KL, the algorithm, the rollouts."""

from __future__ import annotations

import dataclasses
from typing import Literal

from perl_jax import errors
from perl_jax.generation.config import RolloutConfig
from perl_jax.objectives import algorithms
from perl_jax.objectives.algorithms import AlgorithmConfig
from perl_jax.objectives.kl import LOSS_ESTIMATORS
from perl_jax.rewards.shaping import ShapingConfig
from perl_jax.training.configs import TrainingConfig
from perl_jax.training.optimizers import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """How the policy is kept near a reference.

    Attributes:
        beta: Weight of the KL. In the reward, R = (1 - beta) score - beta KL; in the loss,
            R = score. Of online-dpo and online-ipo it is the beta of DPO and IPO.
        place: Put the KL into the reward or into the loss; None: where the algorithm has it.
        estimator: In the reward only k1, whose product with grad log pi is the KL's gradient; in
            the loss k2, or k3 with k2's gradient. None: k1 in the reward, k3 in the loss.
        reference: start (a frozen copy of the policy as it starts), base, none, or the folder of a
            policy artefact.
        refresh: Make the current policy the reference every so many steps; None: never.
        target: Adapt beta so that the mean KL of a response comes near this; None: beta stays.
        horizon: Number of responses in which an adapted beta may change by 20 % at most.
        whole_score: With the KL in the reward, R = score - beta KL: the score is not multiplied by
            1 - beta.
    """

    beta: float = 0.05
    place: Literal["reward", "loss"] | None = None
    estimator: Literal["k1", "k2", "k3"] | None = None
    reference: str = "start"
    refresh: int | None = None
    target: float | None = None
    horizon: int = 10_000
    whole_score: bool = False

    def __post_init__(self) -> None:
        errors.in_range(self, "kl")
        errors.require(0 <= self.beta < 1, f"kl.beta is {self.beta!r}; it must lie in [0, 1).")
        if self.place is not None:
            errors.one_of("kl.place", self.place, ("reward", "loss"))
        if self.estimator is not None:
            errors.one_of("kl.estimator", self.estimator, ("k1", *LOSS_ESTIMATORS))
        without = self.reference != "none" or (self.beta == 0 and self.target is None)
        errors.require(
            without,
            f"kl.reference is none; kl.beta must be 0 then, it is {self.beta!r}, and kl.target "
            "None.",
        )
        if self.refresh is not None:
            errors.whole("kl.refresh", self.refresh)
            errors.require(
                self.reference == "start",
                f"kl.refresh needs kl.reference start, it is {self.reference!r}.",
            )
        if self.target is not None:
            errors.positive("kl.target", self.target)
            errors.positive("kl.beta", self.beta)
        errors.whole("kl.horizon", self.horizon)
        adapts = self.target is not None or self.horizon == KLConfig.horizon
        errors.require(
            adapts,
            f"kl.horizon is {self.horizon}, which nothing reads where kl.beta stays; leave it "
            "out, or give kl.target.",
        )
        for field in ("place", "estimator", "whole_score"):
            value = getattr(self, field)
            used = self.reference != "none" or value == errors.default_of(KLConfig, field)
            errors.require(
                used,
                f"kl.{field} is {value!r}, which nothing reads without a KL; leave it out, or "
                "give kl.reference.",
            )
        errors.require(
            self.beta > 0 or not self.whole_score,
            "kl.whole_score is True, which nothing reads while kl.beta is 0; leave it out, or "
            "give kl.beta.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(TrainingConfig):
    """Policy gradients on rollouts: sample, score, compare with a reference, learn.

    Attributes:
        algorithm: Which algorithm. In Python a name such as "rloo" stands for its defaults.
        kl: How the policy is kept near a reference.
        shaping: Clipping, whitening and penalties of scores.
        temperature: The sampling temperature; log-probabilities are computed at it too.
        rollout: How responses are decoded.
        value_head: Begin the value model's head at zero, or with the (first) reward model's.
        value_learning_rate: The value model's own rate; None: the policy's.
        max_mismatch: The run fails when the mean of exp|sampler - trainer logprob| exceeds this.
        validation_prompts: The first so many prompts of the validation split are answered every
            evaluate_every steps and at the end; 0: none. Data without that split are trained on
            without validation.
        select: Which step the artefacts are of: the validated one with the best mean reward, or the
            last.
        show_samples: How many responses are printed before the first step, every evaluate_every
            steps and at the end; the run's samples.jsonl has at least 8 of each time.
    """

    algorithm: AlgorithmConfig = AlgorithmConfig()
    kl: KLConfig = KLConfig()
    shaping: ShapingConfig = ShapingConfig()
    temperature: float = 0.7
    rollout: RolloutConfig = RolloutConfig()
    value_head: Literal["zero", "reward"] = "zero"
    value_learning_rate: float | None = None
    max_mismatch: float = 1.1
    validation_prompts: int = 64
    select: Literal["best", "last"] = "best"
    show_samples: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.algorithm, str):
            named = dataclasses.replace(AlgorithmConfig(), name=self.algorithm)
            object.__setattr__(self, "algorithm", named)
        super().__post_init__()
        self._check_rollouts()
        self._check_batch()
        self.shaping.check_length(self.data.max_response_length)
        whitened_by_greedy = self.algorithm.rule.greedy and self.shaping.whiten
        errors.require(
            not whitened_by_greedy,
            "shaping.whiten is over the batch's samples; remax compares them with greedy "
            "responses: leave it out.",
        )
        self._check_kl()
        for option, value, default in (
            ("value_head", self.value_head, RLConfig.value_head),
            ("value_learning_rate", self.value_learning_rate, RLConfig.value_learning_rate),
            (
                "optimizer.head_learning_rate",
                self.optimizer.head_learning_rate,
                OptimizerConfig.head_learning_rate,
            ),
            ("kl.place", self.kl.place, None),
            ("kl.estimator", self.kl.estimator, None),
        ):
            algorithms.check_read(option, value, default, self.algorithm.name)

    def _check_rollouts(self) -> None:
        """Raises UserError for invalid settings of sampling, validation or the critic."""
        errors.positive("temperature", self.temperature)
        errors.positive("validation_prompts", self.validation_prompts, zero=True)
        errors.positive("show_samples", self.show_samples, zero=True)
        errors.one_of("select", self.select, ("best", "last"))
        # The gradient needs log-probabilities of the distribution that was sampled from, and the
        # trainer computes those of the whole softmax.
        for field, value in (("top_k", self.rollout.top_k), ("top_p", self.rollout.top_p)):
            whole = (
                f"rollout.{field} is {value!r}; RL learns from the whole distribution: leave "
                "it out, and lower temperature instead."
            )
            errors.require(value is None, whole)
        if self.value_learning_rate is not None:
            errors.positive("value_learning_rate", self.value_learning_rate)
        errors.one_of("value_head", self.value_head, ("zero", "reward"))
        if self.validation_prompts == 0:
            errors.unread(
                self,
                ("evaluate_every",),
                "rl without validation_prompts",
                ("rl with validation_prompts",),
            )
        if self.tuning == "full":
            errors.unread(self, ("rollout.adapters",), "tuning full", ("tuning lora",))
        errors.require(
            self.max_mismatch > 1,
            f"max_mismatch is {self.max_mismatch!r}; it must be greater than 1.",
        )

    def _check_batch(self) -> None:
        """Checks `batch_size`, the number of responses per step.

        Raises UserError unless `batch_size` is a multiple of `algorithm.minibatches` *
        `microbatches` and of the samples per prompt, and 2 or more if the algorithm's advantage is
        batch-mean.
        """
        parts = self.algorithm.minibatches * self.microbatches
        errors.require(
            self.batch_size % parts == 0,
            f"batch_size is {self.batch_size}; it must be a multiple of algorithm.minibatches "
            f"times microbatches, {parts}.",
        )
        if self.algorithm.rule.pairs:
            errors.require(
                self.batch_size % (parts * self.algorithm.group) == 0,
                f"batch_size is {self.batch_size}; {self.algorithm.name} keeps a prompt's samples "
                "together, so it must be a multiple of algorithm.samples times "
                f"algorithm.minibatches times microbatches, {parts * self.algorithm.group}.",
            )
        errors.require(
            self.batch_size % self.algorithm.group == 0,
            f"batch_size is {self.batch_size} episodes; it must be a multiple of "
            f"algorithm.samples, {self.algorithm.group}.",
        )
        compared = self.algorithm.rule.advantage != "batch-mean" or self.batch_size > 1
        errors.require(
            compared,
            f"batch_size is {self.batch_size}; {self.algorithm.name} compares the batch's "
            "episodes and needs 2 or more.",
        )

    def _check_kl(self) -> None:
        """Raises UserError for settings of the KL that do not fit the algorithm or the batch."""
        compared = not self.algorithm.rule.pairs or (
            self.kl.reference != "none" and self.kl.beta > 0
        )
        errors.require(
            compared,
            f"kl.reference is {self.kl.reference} and kl.beta {self.kl.beta!r}; "
            f"{self.algorithm.name} compares the policy with a reference, and kl.beta, above 0, is "
            "its beta.",
        )
        place, estimators = (
            ("loss", tuple(LOSS_ESTIMATORS)) if self.kl_in_loss else ("reward", ("k1",))
        )
        fitting = self.kl.estimator in (None, *estimators)
        errors.require(
            fitting,
            f"kl.estimator is {self.kl.estimator!r}; in the {place} it must be "
            f"{' or '.join(estimators)}.",
        )
        # An update multiplies the adaptive coefficient by at least 1 - 0.2 batch_size / horizon,
        # which must stay positive.
        short = self.kl.target is not None and self.batch_size >= 5 * self.kl.horizon
        errors.require(
            not short,
            f"kl.horizon is {self.kl.horizon} episodes; it must be more than a fifth of "
            f"batch_size, {self.batch_size}.",
        )
        in_reward = not (self.kl_in_loss and self.kl.whole_score)
        errors.require(
            in_reward,
            "kl.whole_score is for a KL in the reward; this one is in the loss, where the score "
            "is whole anyway: leave it out.",
        )

    def check_value_head(self, models: int) -> None:
        """Raises UserError if `value_head` is reward in a run without reward models.

        Args:
            models: Number of reward models.
        """
        errors.require(
            self.value_head == "zero" or models > 0,
            "value_head reward begins with a reward artefact's head; there is none.",
        )

    def check_stale(self, dropout: float) -> None:
        """Raises UserError for bounds on policy ratios and values that can never take effect.

        With a single update per rollout all ratios are 1 and all values are the old ones, unless
        the policy has dropout.

        Args:
            dropout: The dropout rate of the policy's adapter; 0.0 for full tuning.
        """
        if self.algorithm.updates > 1 or (dropout > 0 and self.tuning == "lora"):
            return
        for field in ("clip", "clip_high", "max_ratio", "value_clip"):
            value, default = vars(self.algorithm)[field], errors.default_of(AlgorithmConfig, field)
            more = "leave it out, or give algorithm.epochs or algorithm.minibatches"
            errors.require(
                value == default,
                f"algorithm.{field} is {value!r}, which nothing reads in one update of each "
                f"rollout: all ratios are 1 there; {more}.",
            )

    @property
    def kl_in_loss(self) -> bool:
        """Returns whether the KL is a term of the loss; otherwise it is in the reward."""
        return (self.kl.place or self.algorithm.rule.kl) == "loss"

    @property
    def estimator(self) -> str:
        """Returns the estimator of the KL: the given one, or k1 in the reward, k3 in the loss."""
        return self.kl.estimator or ("k3" if self.kl_in_loss else "k1")
