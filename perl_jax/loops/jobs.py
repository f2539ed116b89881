"""What each job can be told: frozen configs from which the command line is made."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from perl_jax import config as config_lib
from perl_jax.config import OptimizerConfig
from perl_jax.hf.chat import DATE
from perl_jax.lora import LoRAConfig
from perl_jax.models.cache import CACHES, CacheKind
from perl_jax.models.config import ATTENTION, REMAT
from perl_jax.quantise import QuantiseConfig
from perl_jax.rl import algorithms
from perl_jax.rl.algorithms import AlgorithmConfig
from perl_jax.programs import LENGTHS
from perl_jax.rl.kl import LOSS_ESTIMATORS
from perl_jax.sampling import ADAPTERS
from perl_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The base model and where it computes.

    Attributes:
        model: A local Hugging Face folder or a hub name.
        dtype: Of the frozen base and of activations.
        remat: What the backward pass computes again (less memory, more time): none, dots (all but the
            products with weights) or full (whole layers).
        attention: Which path whole sequences take: auto is splash on TPUs, cudnn on GPUs where it can be,
            and XLA's own operations elsewhere: blocked (queries in blocks) on one CPU device and on
            GPUs, plain on several CPU devices. A run prints the path and why it is taken.
        quantise: Keep the frozen base's matrices in 8 or 4 bits.
        mesh: Devices along each axis of the mesh.
        compile_cache: A folder that keeps compiled programs for later processes; None: what
            JAX_COMPILATION_CACHE_DIR says, or nothing is kept.
    """

    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["auto", "plain", "blocked", "splash", "cudnn"] = "auto"
    quantise: QuantiseConfig = QuantiseConfig()
    mesh: MeshConfig = MeshConfig()
    compile_cache: str | None = None

    def __post_init__(self) -> None:
        config_lib.one_of("dtype", self.dtype, config_lib.DTYPES)
        config_lib.one_of("remat", self.remat, REMAT)
        config_lib.one_of("attention", self.attention, ("auto", *ATTENTION))


    def check_forward(self, command: str) -> None:
        """UserError for options of the backward pass in a command that has none."""
        config_lib.unread(self, ("remat",), command, ("training",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateOptions(ModelOptions):
    """What commands that read a tokenizer, and have no data options, are told of its chat template.

    Attributes:
        template: auto (the tokenizer's chat template), none, or a file with a Jinja template.
        template_date: What a template gets that asks for today's date.
    """

    template: str = "auto"
    template_date: str = DATE


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The task and the lengths of its rows, in tokens.

    Attributes:
        task: orders (embedded), taskmaster_coffee, taskmaster_ticketing, taskmaster (the corpora of both), or jsonl.
        data_dir: The data set's upstream folder; for jsonl the file or folder.
        data_seed: Seed of the embedded task's rows.
        train_size: At most so many rows of the training split; None: all.
        evaluation_size: At most so many rows of each other split; None: all.
        max_prompt_length: In tokens, the chat template's among them; the text of longer prompts loses its beginning,
            and a prompt that came rendered its first turns.
        bucket_count: Rows are padded to at most so many lengths. A batch holds rows of similar length;
            1 mixes them all.
        max_response_length: In tokens; longer responses lose their end, eos included. In sampling,
            the room for a response.
        template: How prompts become a chat turn: auto (the tokenizer's chat template; prompts that are
            rendered already, which end with its cue and begin as it does or hold its special tokens, stay
            as they are), none, or a file with a Jinja template.
        template_date: What a template gets that asks for today's date, so that a resumed run has the same tokens.
        packing: Compute each real token once: no padding, and what rows have in common (a pair's prompt,
            a prompt's samples) a single time. auto: on a CPU or GPU.
    """

    task: str = "orders"
    data_dir: str | None = None
    data_seed: int = 0
    train_size: int | None = None
    evaluation_size: int | None = None
    bucket_count: int = 4
    max_prompt_length: int = 512
    max_response_length: int = 128
    template: str = "auto"
    template_date: str = DATE
    packing: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        config_lib.one_of("packing", self.packing, ("auto", "on", "off"))
        for field in ("bucket_count", "max_prompt_length", "max_response_length"):
            config_lib.whole(field, getattr(self, field))
        config_lib.require(self.bucket_count <= LENGTHS, f"bucket_count is {self.bucket_count}; it must be at most {LENGTHS}: each length is a program to compile.")
        config_lib.read_by("data.data_seed", self.data_seed, 0, f"the task {self.task}", ("the task orders",))
        embedded = self.task == "orders" and self.data_dir is not None
        config_lib.require(not embedded, f"data.data_dir is {self.data_dir!r}, which the task orders (embedded) does not read; leave it out, or give data.task.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig(ModelOptions):
    """What every training job has.

    Attributes:
        run: The run's folder; the same command again resumes it.
        tuning: Train adapters, or every weight.
        lora: The adapter's size and place.
        stack_on: An adapter that stays frozen beneath the fresh one; None: the base alone.
        optimizer: How the trained weights are updated.
        data: The rows to train on.
        steps: Number of updates.
        batch_size: Rows (RL: episodes) an update, over all devices.
        microbatches: The batch in so many parts, one after the other, with the same gradient.
        evaluate_every: Steps between validations.
        checkpoint_every: Steps between checkpoints.
        keep: Last checkpoints to keep.
        seed: Of initial values, the order of rows, dropout and sampling.
        tensorboard: Write metrics for TensorBoard too.
        wandb: Send metrics to Weights & Biases too.
        profile: Trace these steps, such as 20-22 or 5,20, with jax.profiler into the run's folder `profile`.
    """

    run: str
    tuning: Literal["lora", "full"] = "lora"
    lora: LoRAConfig = LoRAConfig()
    stack_on: str | None = None
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
    profile: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        config_lib.one_of("tuning", self.tuning, config_lib.TUNINGS)
        stackable = self.stack_on is None or self.tuning == "lora"
        config_lib.require(stackable, "stack_on needs tuning lora: full tuning has no adapter to put on top.")
        for field in ("steps", "batch_size", "microbatches", "evaluate_every", "checkpoint_every", "keep"):
            config_lib.whole(field, getattr(self, field))
        config_lib.positive("seed", self.seed, zero=True)
        config_lib.require(
            self.batch_size % self.microbatches == 0,
            f"microbatches is {self.microbatches}; it must divide batch_size, {self.batch_size}.",
        )
        traced = self.profiled
        inside = not traced or 1 <= traced[0] and traced[-1] <= self.steps
        config_lib.require(inside, f"profile is {self.profile!r}; the run has steps 1 to {self.steps}.")
        config_lib.read_by("optimizer.lora_b_ratio", self.optimizer.lora_b_ratio, 1.0, f"tuning {self.tuning}", ("tuning lora",))
        if self.tuning == "full":
            config_lib.unread(self, [f"lora.{field.name}" for field in dataclasses.fields(LoRAConfig)], "tuning full", ("tuning lora",))
        else:
            self.lora.check_read()
        if not self.has_adapters:
            config_lib.unread(self, ("mesh.adapters",), "tuning full", ("tuning lora",))

    @property
    def has_adapters(self) -> bool:
        """Whether a role of the job is, or may be, an adapter."""
        return self.tuning == "lora"

    @property
    def profiled(self) -> tuple[int, ...]:
        """Numbers of the steps to trace."""
        return config_lib.numbers("profile", self.profile, "20-22 or 5,20")

    def check_headless(self, job: str) -> None:
        """UserError for a rate of the scalar head in a job whose model has none."""
        config_lib.read_by("optimizer.head_learning_rate", self.optimizer.head_learning_rate, None, job, ("reward", "rl with a value model"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig(JobConfig):
    """What jobs that improve on a policy have.

    Attributes:
        policy: The policy artefact to start from; None: the base.
    """

    policy: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one = self.policy is None or self.stack_on is None
        config_lib.require(one, "Give policy (an adapter to train on) or stack_on (one to leave frozen under a fresh adapter), not both.")

    @property
    def has_adapters(self) -> bool:
        return super().has_adapters or self.policy is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardOptions(ModelOptions):
    """What responses are paid.

    Attributes:
        reward: Reward artefacts of this base; several are an ensemble.
        combine: An ensemble's score: the mean of its members', or the least.
        reward_weight: What the reward models' score counts beside `terms`.
        terms: More rewards, as a JSON list or a file of one: rules, a Python function, a judge.
    """

    reward: tuple[str, ...] = ()
    combine: Literal["mean", "min"] = "mean"
    reward_weight: float = 1.0
    terms: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        config_lib.require(bool(self.reward) or self.terms is not None, "There is no reward: give reward artefacts, or terms.")
        config_lib.one_of("combine", self.combine, ("mean", "min"))
        config_lib.require(math.isfinite(self.reward_weight), f"reward_weight is {self.reward_weight!r}; it must be a finite number.")
        several = len(self.reward) > 1 or self.combine == "mean"
        config_lib.require(several, f"combine is {self.combine!r} over {len(self.reward)} reward artefacts; leave it out, or give two or more.")
        weighed = bool(self.reward) or self.reward_weight == 1.0
        config_lib.require(weighed, f"reward_weight is {self.reward_weight!r} without a reward artefact; leave it out, or give reward (weights of terms are in terms).")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(JobConfig):
    """Fit a policy to demonstrations, the loss on response tokens only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_headless("sft")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(JobConfig):
    """Fit a scalar reward; the best validation step is kept (accuracy of pairs, AUC of labels,
    correlation with ratings).

    Attributes:
        objective: pairwise (Bradley-Terry on comparisons), pointwise (cross-entropy on labels) or
            regression (squared error to ratings).
        split: What to train on; judge is a part kept apart for a judge of win rates.
        soft_labels: A comparison's probability, where known, is its label.
        centring: Weight of (chosen + rejected)^2, which keeps the scores of pairs around 0.
    """

    objective: Literal["pairwise", "pointwise", "regression"] = "pairwise"
    split: Literal["train", "judge"] = "train"
    soft_labels: bool = False
    centring: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        config_lib.one_of("objective", self.objective, ("pairwise", "pointwise", "regression"))
        config_lib.one_of("split", self.split, ("train", "judge"))
        config_lib.positive("centring", self.centring, zero=True)
        pairs = self.objective == "pairwise" or not (self.soft_labels or self.centring)
        config_lib.require(pairs, f"soft_labels and centring are for comparisons; objective is {self.objective!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig(PolicyConfig):
    """Fit a policy to comparisons directly, without a reward model; it is compared with where it starts.

    Attributes:
        loss: dpo (Rafailov et al. 2023) or ipo (Azar et al. 2023).
        beta: How strongly the policy is held to where it starts; None: 0.5 for dpo (its paper's for
            summaries: at 0.1 short, noisily labelled responses drift, experiments/LOG.md), 0.1 for ipo.
        label_smoothing: Share of comparisons taken to be the wrong way round; dpo only.
        soft_labels: A comparison's probability, where known, is its label; dpo only.
        token_mean: Compare log-ratios a token instead of those of whole responses.
    """

    loss: Literal["dpo", "ipo"] = "dpo"
    beta: float | None = None
    label_smoothing: float = 0.0
    soft_labels: bool = False
    token_mean: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        config_lib.one_of("loss", self.loss, ("dpo", "ipo"))
        config_lib.positive("beta", self.strength)
        smoothed = 0 <= self.label_smoothing < 0.5 and (self.loss == "dpo" or self.label_smoothing == 0)
        config_lib.require(smoothed, f"label_smoothing is {self.label_smoothing!r}; it must lie in [0, 0.5) for dpo, and be 0 for ipo.")
        config_lib.require(self.loss == "dpo" or not self.soft_labels, f"soft_labels are for the loss dpo; loss is {self.loss!r}.")
        self.check_headless("dpo")

    @property
    def strength(self) -> float:
        """beta, or the loss's own."""
        return {"dpo": 0.5, "ipo": 0.1}[self.loss] if self.beta is None else self.beta


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """How the policy is kept near a reference.

    Attributes:
        beta: The KL's weight. In the reward, R = (1 - beta) score - beta KL; in the loss, R = score.
        place: reward or loss; None: where the algorithm has it.
        estimator: In the reward k1, whose product with grad log pi is the KL's gradient, and no other's;
            in the loss k2 or k3 (with k2's gradient). None: k1 and k3.
        reference: start (a frozen copy of the policy as it starts), base, none, or an artefact.
        refresh: Every so many steps the reference becomes the policy as it is; None: never.
        target: Adapt beta so that a response's mean KL comes near this; None: beta stays.
        horizon: Episodes in which beta may change by 20 % at most, where it adapts.
        whole_score: In the reward, R = score - beta KL: the score is not weighed by 1 - beta.
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
        config_lib.require(0 <= self.beta < 1, f"kl.beta is {self.beta!r}; it must lie in [0, 1).")
        if self.place is not None:
            config_lib.one_of("kl.place", self.place, ("reward", "loss"))
        if self.estimator is not None:
            config_lib.one_of("kl.estimator", self.estimator, ("k1", *LOSS_ESTIMATORS))
        without = self.reference != "none" or (self.beta == 0 and self.target is None)
        config_lib.require(without, f"kl.reference is none; kl.beta must be 0 then, it is {self.beta!r}, and kl.target None.")
        if self.refresh is not None:
            config_lib.whole("kl.refresh", self.refresh)
            config_lib.require(self.reference == "start", f"kl.refresh needs kl.reference start, it is {self.reference!r}.")
        if self.target is not None:
            config_lib.positive("kl.target", self.target)
            config_lib.positive("kl.beta", self.beta)
        config_lib.whole("kl.horizon", self.horizon)
        adapts = self.target is not None or self.horizon == KLConfig.horizon
        config_lib.require(adapts, f"kl.horizon is {self.horizon}, which nothing reads where kl.beta stays; leave it out, or give kl.target.")
        for field in ("place", "estimator", "whole_score"):
            value = getattr(self, field)
            used = self.reference != "none" or value == config_lib.default_of(KLConfig, field)
            config_lib.require(used, f"kl.{field} is {value!r}, which nothing reads without a KL; leave it out, or give kl.reference.")
        config_lib.require(self.beta > 0 or not self.whole_score, "kl.whole_score is True, which nothing reads while kl.beta is 0; leave it out, or give kl.beta.")


@dataclasses.dataclass(frozen=True)
class ShapingConfig:
    """What becomes of a score before the KL is taken off.

    Attributes:
        clip: Scores are kept within +- this; None: as they are.
        whiten: Divide scores by their deviation over the batch; their mean stays.
        missing_eos_penalty: Taken off where a response did not end within its room.
        overlong_penalty: Taken off, in proportion, over the last overlong_buffer tokens of the room.
        overlong_buffer: In tokens; 0: no such penalty.
    """

    clip: float | None = None
    whiten: bool = False
    missing_eos_penalty: float = 1.0
    overlong_penalty: float = 1.0
    overlong_buffer: int = 0

    def __post_init__(self) -> None:
        if self.clip is not None:
            config_lib.positive("shaping.clip", self.clip)
        for field in ("missing_eos_penalty", "overlong_penalty", "overlong_buffer"):
            config_lib.positive(f"shaping.{field}", getattr(self, field), zero=True)
        taken = self.overlong_buffer > 0 or self.overlong_penalty == ShapingConfig.overlong_penalty
        penalty = f"shaping.overlong_penalty is {self.overlong_penalty!r}, which nothing reads while shaping.overlong_buffer is 0"
        config_lib.require(taken, f"{penalty}; leave it out, or give shaping.overlong_buffer.")

    def check_room(self, room: int) -> None:
        """UserError unless the over-length penalty begins within a response's room, in tokens."""
        config_lib.require(self.overlong_buffer <= room, f"shaping.overlong_buffer is {self.overlong_buffer}; a response has room for {room} tokens.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How responses are decoded.

    Attributes:
        slots: Responses that are decoded at a time; a finished one makes room for the next prompt's
            (continuous batching). None: the whole batch at once, until its longest response ends.
        cache: What keys and values are kept in; auto: the activations' dtype.
        adapters: Applied to every token, merged into a copy of the base, or auto: merged where that is
            fewer operations and the base is float32.
        top_k: Sample from the k most likely tokens only; None: off. Not in RL.
        top_p: Sample from the fewest tokens with this probability in total; None: off. Not in RL.
    """

    slots: int | None = None
    cache: CacheKind = "auto"
    adapters: Literal["auto", "applied", "merged"] = "auto"
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.slots is not None:
            config_lib.whole("rollout.slots", self.slots)
        config_lib.one_of("rollout.cache", self.cache, CACHES)
        config_lib.one_of("rollout.adapters", self.adapters, ADAPTERS)
        if self.top_k is not None:
            config_lib.whole("rollout.top_k", self.top_k)
        if self.top_p is not None:
            config_lib.require(0 < self.top_p <= 1, f"rollout.top_p is {self.top_p!r}; it must lie in (0, 1].")


# What does not read the options of a draw, and what does, for `config.unread`.
GREEDY = ("temperature 0 (greedy)", ("a temperature above 0",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(RewardOptions, PolicyConfig):
    """Policy gradients on rollouts: sample, score, compare with a reference, learn.

    Attributes:
        algorithm: Which policy gradient.
        kl: How the policy is kept near a reference.
        shaping: Clipping, whitening and penalties of scores.
        temperature: Of sampling and of every log-probability.
        rollout: How responses are decoded.
        value_head: Begin the value model's head at zero, or with the (first) reward model's.
        value_learning_rate: The value model's own rate; None: the policy's.
        max_mismatch: The run fails when the mean of exp|sampler - trainer logprob| exceeds this.
        validation_prompts: The first so many prompts of the validation split are answered every evaluate_every
            steps and at the end; 0: none. Data without that split are trained on without validation.
        select: Which step the artefacts are of: the validated one with the best mean reward, or the last.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        config_lib.positive("temperature", self.temperature)
        config_lib.positive("validation_prompts", self.validation_prompts, zero=True)
        config_lib.one_of("select", self.select, ("best", "last"))
        # A gradient needs the log-probabilities of what was sampled from; the trainer has those of the whole softmax.
        for field, value in (("top_k", self.rollout.top_k), ("top_p", self.rollout.top_p)):
            whole = f"rollout.{field} is {value!r}; RL learns from the whole distribution: leave it out, and lower temperature instead."
            config_lib.require(value is None, whole)
        if self.value_learning_rate is not None:
            config_lib.positive("value_learning_rate", self.value_learning_rate)
        config_lib.one_of("value_head", self.value_head, ("zero", "reward"))
        known = self.value_head == "zero" or bool(self.reward)
        config_lib.require(known, "value_head reward begins with a reward artefact's head; there is none.")
        if self.validation_prompts == 0:
            config_lib.unread(self, ("evaluate_every",), "rl without validation_prompts", ("rl with validation_prompts",))
        if self.tuning == "full":
            config_lib.unread(self, ("rollout.adapters",), "tuning full", ("tuning lora",))
        if self.policy is None:
            self.check_stale(self.lora.dropout)
        config_lib.require(self.max_mismatch > 1, f"max_mismatch is {self.max_mismatch!r}; it must be greater than 1.")
        parts = self.algorithm.minibatches * self.microbatches
        config_lib.require(
            self.batch_size % parts == 0,
            f"batch_size is {self.batch_size}; it must be a multiple of algorithm.minibatches times microbatches, {parts}.",
        )
        config_lib.require(
            self.batch_size % self.algorithm.group == 0,
            f"batch_size is {self.batch_size} episodes; it must be a multiple of algorithm.samples, {self.algorithm.group}.",
        )
        compared = self.algorithm.rule.advantage != "batch-mean" or self.batch_size > 1
        config_lib.require(compared, f"batch_size is {self.batch_size}; {self.algorithm.name} compares the batch's episodes and needs 2 or more.")
        self.shaping.check_room(self.data.max_response_length)
        apart = not (self.algorithm.rule.greedy and self.shaping.whiten)
        config_lib.require(apart, "shaping.whiten is over the batch's samples; remax compares them with greedy responses: leave it out.")
        place, estimators = ("loss", tuple(LOSS_ESTIMATORS)) if self.kl_in_loss else ("reward", ("k1",))
        fitting = self.kl.estimator in (None, *estimators)
        config_lib.require(fitting, f"kl.estimator is {self.kl.estimator!r}; in the {place} it must be {' or '.join(estimators)}.")
        # The gain of the adaptive coefficient, batch_size / horizon, could turn its sign.
        short = self.kl.target is not None and self.batch_size >= 5 * self.kl.horizon
        config_lib.require(not short, f"kl.horizon is {self.kl.horizon} episodes; it must be more than a fifth of batch_size, {self.batch_size}.")
        in_reward = not (self.kl_in_loss and self.kl.whole_score)
        config_lib.require(in_reward, "kl.whole_score is for a KL in the reward; this one is in the loss, where the score is whole anyway: leave it out.")
        for option, value, default in (
            ("value_head", self.value_head, RLConfig.value_head),
            ("value_learning_rate", self.value_learning_rate, RLConfig.value_learning_rate),
            ("optimizer.head_learning_rate", self.optimizer.head_learning_rate, OptimizerConfig.head_learning_rate),
        ):
            algorithms.check_read(option, value, default, self.algorithm.name)

    def check_stale(self, dropout: float) -> None:
        """UserError for bounds on stale samples where there are none.

        In the only update of a rollout every ratio is 1, and the values are the old ones, unless there is dropout (the policy's).
        """
        if self.algorithm.updates > 1 or (dropout > 0 and self.tuning == "lora"):
            return
        for field in ("clip", "clip_high", "max_ratio", "value_clip"):
            value, default = vars(self.algorithm)[field], config_lib.default_of(AlgorithmConfig, field)
            more = "leave it out, or give algorithm.epochs or algorithm.minibatches"
            config_lib.require(value == default, f"algorithm.{field} is {value!r}, which nothing reads in one update of each rollout: all ratios are 1 there; {more}.")

    @property
    def has_adapters(self) -> bool:
        return super().has_adapters or bool(self.reward) or self.kl.reference not in ("start", "base", "none")

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL is a term of the loss; otherwise it is in the reward."""
        return (self.kl.place or self.algorithm.rule.kl) == "loss"

    @property
    def estimator(self) -> str:
        """Of the KL, where it is placed."""
        return self.kl.estimator or ("k3" if self.kl_in_loss else "k1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(RewardOptions):
    """Compare a policy with a baseline on held-out prompts, by gold reward or a judge; the reward (reward,
    combine, reward_weight, terms) is the proxy to report: what the policy was trained for.

    Attributes:
        run: The folder that evaluation.json and samples.jsonl go to.
        policy: The policy artefact.
        baseline: The policy artefact to compare with; None: the base.
        judge: Reward artefacts whose mean score decides wins where the task has no gold reward; none:
            the proxy itself, which flatters a policy trained on it.
        data: The prompts.
        split: The split the prompts are from.
        batch_size: Prompts at a time, over all devices.
        temperature: Of sampling; 0: greedy.
        rollout: How responses are decoded.
        seed: Of sampling.
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
        config_lib.positive("batch_size", self.batch_size)
        config_lib.positive("temperature", self.temperature, zero=True)
        self.check_forward("evaluate")
        config_lib.unread(self, ("data.packing",), "evaluate", ("training",))
        if self.temperature == 0:
            config_lib.unread(self, ("seed", "rollout.top_k", "rollout.top_p"), *GREEDY)
