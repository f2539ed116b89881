"""The policy gradients in one table: what each takes for its advantage, its ratio and its mean.

Every one is a combination of three pure functions: an advantage (`advantages`), a policy loss
(`policy_loss`), and a reduction over tokens (`perl_jax.objectives.losses.reduce_tokens`). While the
policy is still the one that sampled, every ratio is 1 and the gradient is that of

    -sum_t log pi(a_t | x_t) A_t

so that the entries differ then in A alone. With a baseline b(prompt) that does not depend on the
response, R - b has the exact policy gradient in expectation. What is biased says so below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp

from perl_jax import errors
from perl_jax.errors import require
from perl_jax.objectives import advantages as advantages_lib
from perl_jax.objectives import losses
from perl_jax.objectives.losses import LossSum
from perl_jax.runtime.masked import masked_mean, masked_whiten
from perl_jax.types import Array

ADVANTAGES = ("critic", "gae", "batch-mean", "leave-one-out", "greedy", "group", "group-std")


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """One entry of `ALGORITHMS`.

    advantage: one of ADVANTAGES, or a function from returns [prompts, samples] to advantages of the
    same shape. ratio: of `losses.RATIOS`, clipped; None: REINFORCE, stale samples
    weighed by a truncated ratio. normalise: of `losses.NORMALISERS`. kl: where the KL to the
    reference goes unless the user says otherwise, the reward or the loss. whiten: whether
    advantages are whitened over the batch unless the user says otherwise.
    """

    advantage: str | Callable[[Array], Array]
    ratio: str | None
    normalise: str
    kl: Literal["reward", "loss"]
    whiten: bool = False

    @property
    def critic(self) -> bool:
        """Whether a value model is trained."""
        return self.advantage in ("critic", "gae")

    @property
    def grouped(self) -> bool:
        """Whether the samples of one prompt are compared: there must be 2 or more."""
        return callable(self.advantage) or self.advantage in ("leave-one-out", "group", "group-std")

    @property
    def greedy(self) -> bool:
        """Whether each prompt's greedy response is needed too."""
        return self.advantage == "greedy"


_ENTRIES: dict[str, Algorithm] = {
    # PERL (arXiv 2403.10704): A_t = R - V(x_t), V learned beside the policy.
    "reinforce": Algorithm("critic", None, "sequence", "reward"),
    # A = R - mean of the batch's R; its own R is in the mean: (1 - 1/B) of the exact gradient.
    "reinforce-mean": Algorithm("batch-mean", None, "sequence", "reward"),
    # Ahmadian et al. 2024 (arXiv 2402.14740): A = R - mean of the prompt's other samples.
    "rloo": Algorithm("leave-one-out", "product", "sequence-mean", "reward"),
    # Li et al. 2023 (arXiv 2310.10505): A = R - R(greedy response).
    "remax": Algorithm("greedy", None, "sequence", "reward"),
    # Shao et al. 2024 (arXiv 2402.03300): A = (R - mean) / std of the prompt's samples, tokens
    # averaged within a response first: biased on both counts.
    "grpo": Algorithm("group-std", "token", "sequence-mean", "loss"),
    # Liu et al. 2025 (arXiv 2503.20783), Dr. GRPO: neither division; a constant length.
    "dr-grpo": Algorithm("group", "token", "constant", "loss"),
    # Zheng et al. 2025 (arXiv 2507.18071): GRPO with one ratio a sequence.
    "gspo": Algorithm("group-std", "sequence", "sequence-mean", "loss"),
    # Schulman et al. 2017 (arXiv 1707.06347) with GAE (arXiv 1506.02438), KL in each token's
    # reward and whitened advantages as in Ziegler et al. 2019 (arXiv 1909.08593).
    "ppo": Algorithm("gae", "token", "token", "reward", whiten=True),
}
# What `AlgorithmConfig.name` may be; `register_algorithm` adds to it.
ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType(_ENTRIES)


def register_algorithm(name: str, algorithm: Algorithm) -> None:
    """Makes an algorithm known under a name, for `AlgorithmConfig(name=...)` in this process.

    Raises UserError for a name that is taken by another algorithm, and for settings that no
    algorithm has.
    """
    require(
        _ENTRIES.get(name, algorithm) == algorithm,
        f"There is another algorithm {name!r}; give yours a name of its own.",
    )
    if not callable(algorithm.advantage):
        errors.one_of("advantage", algorithm.advantage, ADVANTAGES)
    errors.one_of("ratio", algorithm.ratio, (None, *losses.RATIOS))
    errors.one_of("normalise", algorithm.normalise, losses.NORMALISERS)
    errors.one_of("kl", algorithm.kl, ("reward", "loss"))
    _ENTRIES[name] = algorithm


# Options that some entries do not read: of `AlgorithmConfig`, and of RL beside it. Every entry
# reads the others.
READ: Mapping[str, Callable[[Algorithm], bool]] = MappingProxyType(
    {
        "algorithm.clip": lambda rule: rule.ratio is not None,
        "algorithm.clip_high": lambda rule: rule.ratio is not None,
        "algorithm.max_ratio": lambda rule: rule.ratio is None,
        "algorithm.std_epsilon": lambda rule: rule.advantage == "group-std",
        "algorithm.gamma": lambda rule: rule.advantage == "gae",
        "algorithm.gae_lambda": lambda rule: rule.advantage == "gae",
        "algorithm.value_clip": lambda rule: rule.advantage == "gae",
        "value_head": lambda rule: rule.critic,
        "value_learning_rate": lambda rule: rule.critic,
        "optimizer.head_learning_rate": lambda rule: rule.critic,
    }
)


def check_read(option: str, value: Any, default: Any, name: str) -> None:
    """UserError where an option of READ is set although the algorithm of that name does not read
    it.
    """
    errors.read_by(
        option,
        value,
        default,
        name,
        [other for other, rule in ALGORITHMS.items() if READ[option](rule)],
    )


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
    """Which policy gradient, and how often a rollout is used. An option that it does not read
    (READ) is refused.

    Attributes:
        name: reinforce (the paper's), reinforce-mean, rloo, remax, grpo, dr-grpo, gspo or ppo.
        samples: Responses to each prompt; None: 4 where a prompt's samples are compared, else 1.
        epochs: Passes over each batch of rollouts.
        minibatches: Updates a pass, each from its own part of the rollouts.
        clip: Ratios are clipped to [1 - clip, 1 + clip].
        clip_high: Another upper distance; None: the same.
        max_ratio: Where ratios are not clipped, stale samples weigh their ratio, at most this.
        normalise: token, sequence, sequence-mean or constant; None: the algorithm's own.
        whiten: Whiten advantages over the batch's response tokens; None: as the algorithm does.
        std_epsilon: Added to a group's deviation before dividing by it (grpo, gspo). Scores have a
            deviation of about 1 over all responses; a group that differs by much less differs by
            the reward model's errors.
        gamma: PPO's discount a token.
        gae_lambda: PPO's lambda of generalised advantages.
        value_clip: PPO keeps values within this of the old ones; None: does not.
    """

    name: Literal[
        "reinforce", "reinforce-mean", "rloo", "remax", "grpo", "dr-grpo", "gspo", "ppo"
    ] = "reinforce"
    samples: int | None = None
    epochs: int = 1
    minibatches: int = 1
    clip: float = 0.2
    clip_high: float | None = None
    max_ratio: float = 2.0
    normalise: Literal["token", "sequence", "sequence-mean", "constant"] | None = None
    whiten: bool | None = None
    std_epsilon: float = 0.1
    gamma: float = 1.0
    gae_lambda: float = 0.95
    value_clip: float | None = 0.2

    def __post_init__(self) -> None:
        errors.one_of("algorithm.name", self.name, ALGORITHMS)
        for field in ("epochs", "minibatches", *(("samples",) if self.samples is not None else ())):
            errors.whole(f"algorithm.{field}", getattr(self, field))
        enough = not self.rule.grouped or self.group >= 2
        require(
            enough,
            f"algorithm.samples is {self.samples}; {self.name} compares a prompt's samples and "
            "needs 2 or more.",
        )
        require(0 < self.clip < 1, f"algorithm.clip is {self.clip!r}; it must lie in (0, 1).")
        for field in ("clip_high", "value_clip"):
            if getattr(self, field) is not None:
                errors.positive(f"algorithm.{field}", getattr(self, field))
        require(
            self.max_ratio >= 1, f"algorithm.max_ratio is {self.max_ratio!r}; it must be 1 or more."
        )
        errors.positive("algorithm.std_epsilon", self.std_epsilon)
        if self.normalise is not None:
            errors.one_of("algorithm.normalise", self.normalise, losses.NORMALISERS)
        # Its baseline is read in the update, microbatch by microbatch: a deviation would be a
        # microbatch's.
        at_once = not (self.whiten and self.rule.advantage == "critic")
        require(
            at_once,
            "algorithm.whiten needs advantages that are known before the update; those of "
            f"{self.name} are not.",
        )
        # A row's only term would be counted once for each of its tokens.
        whole = self.rule.ratio in (None, "token") or self.reduction == "sequence-mean"
        require(
            whole,
            f"algorithm.normalise is {self.normalise!r}; {self.name} has one ratio a sequence, "
            "which needs sequence-mean.",
        )
        for field in ("gamma", "gae_lambda"):
            require(
                0 <= getattr(self, field) <= 1,
                f"algorithm.{field} is {getattr(self, field)!r}; it must lie in [0, 1].",
            )
        for field in dataclasses.fields(self):
            option = f"algorithm.{field.name}"
            if option in READ:
                check_read(option, getattr(self, field.name), field.default, self.name)

    @property
    def rule(self) -> Algorithm:
        """The table's entry."""
        return ALGORITHMS[self.name]

    @property
    def group(self) -> int:
        """G, responses to each prompt."""
        return (4 if self.rule.grouped else 1) if self.samples is None else self.samples

    @property
    def reduction(self) -> str:
        """How tokens are reduced: `losses.NORMALISERS`."""
        return self.normalise or self.rule.normalise

    @property
    def kl_reduction(self) -> str:
        """How tokens of a KL in the loss are reduced: as the objective's.

        Where one product of ratios stands at each token a mean over them counts it once, and the
        objective is of the sum.
        """
        return "sequence" if self.rule.ratio == "product" else self.reduction

    @property
    def updates(self) -> int:
        """Updates from one batch of rollouts."""
        return self.epochs * self.minibatches

    @property
    def whitened(self) -> bool:
        """Whether advantages are whitened."""
        return self.rule.whiten if self.whiten is None else self.whiten

    def length(self, room: int) -> int | None:
        """The constant length of the reduction: the room for a response; None for the others."""
        return room if self.reduction == "constant" else None


@flax.struct.dataclass
class Outcomes:
    """What rollouts were worth; rows of one prompt follow each other, G at a time.

    return_B: R, with the KL in it where it belongs there. rewards_BT: the same, token by token
    (gae). values_BT: V before each token, at sampling time (gae). greedy_P: R of each prompt's
    greedy response (greedy). mask_BT: response tokens.
    """

    return_B: Array
    rewards_BT: Array
    mask_BT: Array
    values_BT: Array | None = None
    greedy_P: Array | None = None


def advantages(
    config: AlgorithmConfig, outcomes: Outcomes
) -> tuple[jax.Array | None, jax.Array | None]:
    """(A_BT, the critic's targets Z_BT), 0 outside the mask, without gradient.

    A is None for "critic", whose baseline is the value model as it is when the update reads it
    (`critic_advantages`); Z is None without a value model.
    """
    outcomes = jax.lax.stop_gradient(outcomes)
    mask_BT, return_B = outcomes.mask_BT, outcomes.return_B
    to_tokens = lambda x_B: advantages_lib.returns_to_tokens(x_B, mask_BT)
    return_PG = return_B.reshape(-1, config.group)
    kind = config.rule.advantage
    if kind == "critic":
        return None, to_tokens(return_B)
    if kind == "gae":
        advantage_BT = advantages_lib.gae(
            outcomes.rewards_BT, outcomes.values_BT, mask_BT, config.gamma, config.gae_lambda
        )
        target_BT = jnp.where(mask_BT, advantage_BT + outcomes.values_BT, 0)
        return (_whitened(advantage_BT, mask_BT) if config.whitened else advantage_BT), target_BT
    if callable(kind):
        advantage_B = kind(return_PG).reshape(-1)
    elif kind == "batch-mean":
        # Filler rows have no token and are no part of the mean.
        advantage_B = return_B - masked_mean(return_B, jnp.any(mask_BT, axis=1))
    elif kind == "greedy":
        advantage_B = (return_PG - outcomes.greedy_P[:, None]).reshape(-1)
    elif kind == "leave-one-out":
        advantage_B = advantages_lib.leave_one_out(return_PG).reshape(-1)
    else:
        divided = kind == "group-std"
        advantage_B = advantages_lib.group_advantages(
            return_PG, normalise_std=divided, epsilon=config.std_epsilon
        ).reshape(-1)
    advantage_BT = to_tokens(advantage_B)
    return (_whitened(advantage_BT, mask_BT) if config.whitened else advantage_BT), None


def critic_advantages(target_BT: Array, values_BT: Array, mask_BT: Array) -> jax.Array:
    """A_t = Z_t - V(x_t), V as it is now, without gradient; 0 outside the mask."""
    return jax.lax.stop_gradient(jnp.where(mask_BT, target_BT - values_BT, 0))


def policy_loss(
    config: AlgorithmConfig,
    logp_BT: Array,
    old_BT: Array,
    advantage_BT: Array,
    mask_BT: Array,
    room: int,
) -> LossSum:
    """The policy's loss; logp_BT is differentiated, old_BT is of the policy that sampled.

    room: the most tokens a response may have (for the reduction "constant").
    """
    length = config.length(room)
    if config.rule.ratio is None:
        return losses.reinforce(
            logp_BT,
            advantage_BT,
            mask_BT,
            config.reduction,
            length=length,
            old_BT=old_BT,
            most=config.max_ratio,
        )
    ratio_BT = losses.importance_ratio(logp_BT, old_BT, mask_BT, config.rule.ratio)
    high = config.clip if config.clip_high is None else config.clip_high
    return losses.clipped(
        ratio_BT,
        advantage_BT,
        mask_BT,
        low=config.clip,
        high=high,
        normalise=config.reduction,
        length=length,
    )


def _whitened(advantage_BT: jax.Array, mask_BT: Array) -> jax.Array:
    return masked_whiten(advantage_BT, mask_BT, shift_mean=True)
