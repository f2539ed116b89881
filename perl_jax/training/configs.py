"""Settings of SFT, reward and DPO training: frozen dataclasses, checked when they are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from perl_jax import errors
from perl_jax.adapters.lora import TUNINGS, LoRAConfig
from perl_jax.data.config import DataConfig
from perl_jax.objectives.preference import OBJECTIVES, PreferenceObjective
from perl_jax.training.optimizers import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings that every training job has.

    Attributes:
        tuning: Train a LoRA adapter, or every weight of the model.
        lora: Rank, scaling and place of the adapter.
        optimizer: How the trained weights are updated.
        data: Which rows to train on, and how long they may be.
        steps: Number of steps.
        batch_size: Rows of a step (RL: responses), over all devices.
        microbatches: Split each batch into so many parts that are computed one after the other;
            the gradient stays the same and needs less memory.
        evaluate_every: Steps from one validation to the next.
        checkpoint_every: Steps from one checkpoint to the next.
        keep: Number of newest checkpoints to keep.
        seed: Seed of initial weights, the order of rows, dropout and sampling.
        tensorboard: Write metrics for TensorBoard, too.
        wandb: Send metrics to Weights & Biases, too.
        wandb_project: The project there; None: that of WANDB_PROJECT, or perl_jax.
        wandb_name: The run's name there; None: the last two folders of the run's path.
        profile: Steps to trace with jax.profiler, such as 20-22 or 5,20; traces go into the run's
            folder `profile`.
    """

    tuning: Literal["lora", "full"] = "lora"
    lora: LoRAConfig = LoRAConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    steps: int = 1000
    batch_size: int = 128
    microbatches: int = 1
    evaluate_every: int = 100
    checkpoint_every: int = 100
    keep: int = 2
    seed: int = 0
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str | None = None
    wandb_name: str | None = None
    profile: str | None = None

    def __post_init__(self) -> None:
        errors.in_range(self)
        errors.one_of("tuning", self.tuning, TUNINGS)
        for field in (
            "steps",
            "batch_size",
            "microbatches",
            "evaluate_every",
            "checkpoint_every",
            "keep",
        ):
            errors.whole(field, getattr(self, field))
        errors.positive("seed", self.seed, zero=True)
        errors.require(
            self.batch_size % self.microbatches == 0,
            f"microbatches is {self.microbatches}; it must divide batch_size, {self.batch_size}.",
        )
        if not self.wandb:
            errors.unread(
                self, ("wandb_project", "wandb_name"), "a run without wandb", ("a run with wandb",)
            )
        traced = self.profiled
        inside = not traced or (traced[0] >= 1 and traced[-1] <= self.steps)
        errors.require(inside, f"profile is {self.profile!r}; the run has steps 1 to {self.steps}.")
        errors.read_by(
            "optimizer.lora_b_ratio",
            self.optimizer.lora_b_ratio,
            1.0,
            f"tuning {self.tuning}",
            ("tuning lora",),
        )
        if self.tuning == "full":
            errors.unread(
                self,
                [f"lora.{field.name}" for field in dataclasses.fields(LoRAConfig)],
                "tuning full",
                ("tuning lora",),
            )
        else:
            self.lora.check_read()

    @property
    def profiled(self) -> tuple[int, ...]:
        """Returns the numbers of the steps to trace, ascending; () for none.

        Raises UserError if `profile` is not of the form 20-22 or 5,20.
        """
        return errors.numbers("profile", self.profile, "20-22 or 5,20")

    def check_headless(self, job: str) -> None:
        """Raises UserError if `optimizer.head_learning_rate` is set, for a job whose model has no
        head.

        Args:
            job: The name of the job, for the message.
        """
        errors.read_by(
            "optimizer.head_learning_rate",
            self.optimizer.head_learning_rate,
            None,
            job,
            ("reward", "rl with a value model"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainingConfig):
    """Fit a policy to demonstrations, the loss on response tokens only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_headless("sft")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainingConfig):
    """Fit a scalar reward; the best validation step is kept (accuracy of pairs, AUC of labels,
    correlation with ratings).

    Attributes:
        objective: pairwise (Bradley-Terry on comparisons), pointwise (cross-entropy on labels) or
            regression (squared error to ratings).
        split: Which split to train on; judge is kept apart for the judge of win rates.
        soft_labels: Use a comparison's probability as its label, where it is known.
        centring: Weight of (chosen + rejected)^2, which keeps the scores of pairs around 0.
    """

    objective: Literal["pairwise", "pointwise", "regression"] = "pairwise"
    split: Literal["train", "judge"] = "train"
    soft_labels: bool = False
    centring: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.one_of("objective", self.objective, ("pairwise", "pointwise", "regression"))
        errors.one_of("split", self.split, ("train", "judge"))
        errors.positive("centring", self.centring, zero=True)
        pairs = self.objective == "pairwise" or not (self.soft_labels or self.centring)
        errors.require(
            pairs, f"soft_labels and centring are for comparisons; objective is {self.objective!r}."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig(TrainingConfig):
    """Fit a policy to preferences directly, without a reward model: DPO, IPO or ORPO on
    comparisons, KTO on labelled responses. The reference is the policy that training starts from.

    Attributes:
        loss: dpo (Rafailov et al. 2023), ipo (Azar et al. 2023) or orpo (Hong et al. 2024; no
            reference), which read comparisons; kto (Ethayarajh et al. 2024), which reads labels.
        beta: How strongly the policy is kept near the reference; None: 0.5 for dpo (its paper's
            value for summaries: with 0.1 short, noisily labelled responses drift,
            docs/log/algorithms.md), 0.1 for ipo and kto.
        label_smoothing: Assumed share of comparisons whose label is wrong; dpo only.
        soft_labels: Use a comparison's probability as its label, where it is known; dpo only.
        token_mean: Compare the mean log-ratio of a response's tokens instead of their sum; dpo and
            ipo only.
        desirable_weight: Weight of the loss of responses with label 1; kto only.
        undesirable_weight: Weight of the loss of responses with label 0; kto only.
        odds_weight: Weight of the odds-ratio term; orpo only.
    """

    loss: Literal["dpo", "ipo", "kto", "orpo"] = "dpo"
    beta: float | None = None
    label_smoothing: float = 0.0
    soft_labels: bool = False
    token_mean: bool = False
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    odds_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.one_of("loss", self.loss, OBJECTIVES)
        for field in ("desirable_weight", "undesirable_weight", "odds_weight"):
            errors.positive(field, getattr(self, field))
        errors.require(
            0 <= self.label_smoothing < 0.5,
            f"label_smoothing is {self.label_smoothing!r}; it must lie in [0, 0.5).",
        )
        if self.beta is not None:
            errors.positive("beta", self.beta)
        for field, losses in READ_BY.items():
            errors.read_by(
                field, getattr(self, field), errors.default_of(DPOConfig, field), self.loss, losses
            )
        self.check_headless("dpo")

    @property
    def objective(self) -> PreferenceObjective:
        """The entry of `loss` in the table of preference objectives."""
        return OBJECTIVES[self.loss]

    @property
    def strength(self) -> float:
        """Returns beta; if it is None the default of the loss.

        Raises ValueError for a loss without a reference, which has no beta.
        """
        found = self.objective.beta if self.beta is None else self.beta
        if found is None:
            raise ValueError(f"{self.loss} has no reference and so no beta")
        return found


# The fields of `DPOConfig` that only some losses read -> these losses.
READ_BY: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "beta": tuple(name for name, entry in OBJECTIVES.items() if entry.reference),
        "label_smoothing": ("dpo",),
        "soft_labels": ("dpo",),
        "token_mean": ("dpo", "ipo"),
        "desirable_weight": ("kto",),
        "undesirable_weight": ("kto",),
        "odds_weight": ("orpo",),
    }
)
