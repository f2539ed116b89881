"""The table of policy-gradient algorithms: the advantage, ratio and token reduction of each.

Each algorithm combines three pure functions: an advantage (`compute_advantages`), a policy loss
(`policy_loss`) and a reduction over tokens (`perl_jax.objectives.losses.reduce_tokens`). While the
policy is still the one that sampled, every ratio is 1 and every algorithm has the gradient of

    -sum_t log pi(a_t | x_t) A_t

so the algorithms differ in A alone. R - b has the exact policy gradient in expectation if the
baseline b depends on the prompt only. Comments in the table say which algorithms are biased.

The last entries are no policy gradients: they fit the policy to comparisons of its own samples.
Their advantage only says which sample of a prompt is preferred to which; their loss is
`perl_jax.objectives.pairs.pair_loss`.
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
from perl_jax.objectives import advantages, losses, ratios
from perl_jax.objectives.losses import LossSum
from perl_jax.runtime.masked import masked_mean, masked_whiten
from perl_jax.types import Array

ADVANTAGES = (
    "critic",
    "gae",
    "batch-mean",
    "leave-one-out",
    "greedy",
    "group",
    "group-std",
    "best-worst",
)


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """One entry of `ALGORITHMS`.

    Attributes:
        advantage: How advantages are computed: one of ADVANTAGES, or a function from returns [P, G]
            (prompts, samples) to advantages of the same shape.
        ratio: Importance ratio of the clipped loss, one of `ratios.RATIOS`. None: REINFORCE loss;
            stale samples are weighted by a truncated ratio.
        normalise: Default reduction over tokens, one of `losses.NORMALISERS`.
        kl: Default place of the KL to the reference: in the reward or in the loss.
        whiten: Whether advantages are whitened over the batch by default.
        pairs: The loss of two samples of a prompt, "dpo" or "ipo" (`losses.preference`), for an
            algorithm that compares its samples with each other. None: the algorithm is a policy
            gradient.
    """

    advantage: str | Callable[[Array], Array]
    ratio: str | None
    normalise: str
    kl: Literal["reward", "loss"]
    whiten: bool = False
    pairs: Literal["dpo", "ipo"] | None = None

    @property
    def critic(self) -> bool:
        """Whether the algorithm trains a value model."""
        return self.advantage in ("critic", "gae")

    @property
    def grouped(self) -> bool:
        """Whether the algorithm compares the samples of a prompt and so needs 2 or more of them."""
        grouped = ("leave-one-out", "group", "group-std", "best-worst")
        return callable(self.advantage) or self.advantage in grouped

    @property
    def greedy(self) -> bool:
        """Whether the algorithm also needs the greedy response to each prompt."""
        return self.advantage == "greedy"


_ENTRIES: dict[str, Algorithm] = {
    # PERL (arXiv 2403.10704): A_t = R - V(x_t), V learned beside the policy.
    "reinforce": Algorithm("critic", None, "sequence", "reward"),
    # A = R - mean R of the batch. The mean includes the row's own R, so the expected gradient is
    # (1 - 1/B) times the exact one.
    "reinforce-mean": Algorithm("batch-mean", None, "sequence", "reward"),
    # Ahmadian et al. 2024 (arXiv 2402.14740): A = R - mean of the prompt's other samples.
    "rloo": Algorithm("leave-one-out", "product", "sequence-mean", "reward"),
    # Li et al. 2023 (arXiv 2310.10505): A = R - R(greedy response).
    "remax": Algorithm("greedy", None, "sequence", "reward"),
    # Shao et al. 2024 (arXiv 2402.03300): A = (R - mean) / std of the prompt's samples, and the
    # mean over each response's tokens. Both divisions bias the gradient.
    "grpo": Algorithm("group-std", "token", "sequence-mean", "loss"),
    # Liu et al. 2025 (arXiv 2503.20783), Dr. GRPO: no division by std; a constant length.
    "dr-grpo": Algorithm("group", "token", "constant", "loss"),
    # Zheng et al. 2025 (arXiv 2507.18071): GRPO with one ratio per sequence.
    "gspo": Algorithm("group-std", "sequence", "sequence-mean", "loss"),
    # Schulman et al. 2017 (arXiv 1707.06347) with GAE (arXiv 1506.02438). The KL in each token's
    # reward and the whitened advantages follow Ziegler et al. 2019 (arXiv 1909.08593).
    "ppo": Algorithm("gae", "token", "token", "reward", whiten=True),
    # Guo et al. 2024 (arXiv 2402.04792): DPO or IPO of the prompt's best sample against its worst;
    # beta is the KL's coefficient. Departure from the paper: rewards decide instead of a prompted
    # model, and a prompt with equal rewards counts nothing.
    "online-dpo": Algorithm("best-worst", None, "sequence", "loss", pairs="dpo"),
    "online-ipo": Algorithm("best-worst", None, "sequence", "loss", pairs="ipo"),
}
# The values of `AlgorithmConfig.name`; `register_algorithm` adds to them.
ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType(_ENTRIES)


def register_algorithm(name: str, algorithm: Algorithm) -> None:
    """Adds an algorithm to `ALGORITHMS`, for `AlgorithmConfig(name=...)` in this process.

    Args:
        name: Name of the algorithm.
        algorithm: Its entry. Registering an equal entry again changes nothing.

    Raises UserError if the name belongs to another algorithm, or for an unknown advantage, ratio,
    reduction or place of the KL.
    """
    require(
        _ENTRIES.get(name, algorithm) == algorithm,
        f"There is another algorithm {name!r}; give yours a different name.",
    )
    if not callable(algorithm.advantage):
        errors.one_of("advantage", algorithm.advantage, ADVANTAGES)
    errors.one_of("ratio", algorithm.ratio, (None, *ratios.RATIOS))
    errors.one_of("normalise", algorithm.normalise, losses.NORMALISERS)
    errors.one_of("kl", algorithm.kl, ("reward", "loss"))
    errors.one_of("pairs", algorithm.pairs, (None, "dpo", "ipo"))
    require(
        algorithm.pairs is None or algorithm.kl == "loss",
        f"kl is {algorithm.kl!r}; an algorithm with pairs has its KL in the loss.",
    )
    _ENTRIES[name] = algorithm


# Options of `AlgorithmConfig` and of the RL config that only some algorithms read, each with the
# test whether an algorithm reads it. Every algorithm reads all other options.
READ: Mapping[str, Callable[[Algorithm], bool]] = MappingProxyType(
    {
        "algorithm.clip": lambda rule: rule.ratio is not None,
        "algorithm.clip_high": lambda rule: rule.ratio is not None,
        "algorithm.max_ratio": lambda rule: rule.ratio is None and rule.pairs is None,
        "algorithm.normalise": lambda rule: rule.pairs is None,
        "algorithm.whiten": lambda rule: rule.pairs is None,
        "algorithm.std_epsilon": lambda rule: rule.advantage == "group-std",
        "algorithm.gamma": lambda rule: rule.advantage == "gae",
        "algorithm.gae_lambda": lambda rule: rule.advantage == "gae",
        "algorithm.value_clip": lambda rule: rule.advantage == "gae",
        "value_head": lambda rule: rule.critic,
        "value_learning_rate": lambda rule: rule.critic,
        "optimizer.head_learning_rate": lambda rule: rule.critic,
        "kl.place": lambda rule: rule.pairs is None,
        "kl.estimator": lambda rule: rule.pairs is None,
    }
)


def check_read(option: str, value: Any, default: Any, name: str) -> None:
    """Raises UserError if an option is set although the algorithm `name` does not read it.

    Args:
        option: Name of the option, a key of READ.
        value: The option's value; the default always passes.
        default: The option's default.
        name: Name of the algorithm, a key of ALGORITHMS.
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
    """The RL algorithm, and how many updates each batch of rollouts gives.

    Setting an option that the algorithm does not read (see READ) is an error.

    Attributes:
        name: reinforce (PERL's), reinforce-mean, rloo, remax, grpo, dr-grpo, gspo or ppo; or
            online-dpo or online-ipo, which fit the policy to comparisons of its own samples.
        samples: Responses per prompt; None: 4 for algorithms that compare a prompt's samples, 2 for
            online-dpo and online-ipo, else 1.
        epochs: Passes over each batch of rollouts.
        minibatches: Updates per pass, each on its own part of the rollouts.
        clip: Ratios are clipped to [1 - clip, 1 + clip].
        clip_high: Replaces clip in the upper bound; None: the same as clip.
        max_ratio: Largest importance weight of a stale sample, for algorithms without clipping.
        normalise: token, sequence, sequence-mean or constant; None: the algorithm's default.
        whiten: Whiten advantages over the batch's response tokens; None: the algorithm's default.
        std_epsilon: Added to a group's standard deviation before the division by it (grpo, gspo).
            Scores have a standard deviation of about 1 over all responses; much smaller differences
            within a group are mostly errors of the reward model.
        gamma: PPO's discount per token.
        gae_lambda: PPO's lambda of generalised advantage estimation.
        value_clip: Largest distance of PPO's values from those at sampling time; None: no limit.
    """

    name: Literal[
        "reinforce",
        "reinforce-mean",
        "rloo",
        "remax",
        "grpo",
        "dr-grpo",
        "gspo",
        "ppo",
        "online-dpo",
        "online-ipo",
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
        errors.in_range(self, "algorithm")
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
        # The update computes the critic's baseline one microbatch at a time, so whitening would use
        # the deviation of one microbatch.
        known_before = not (self.whiten and self.rule.advantage == "critic")
        require(
            known_before,
            "algorithm.whiten needs advantages that are known before the update; those of "
            f"{self.name} are not.",
        )
        # Other reductions would count the one term of a row once for each of its tokens.
        whole = self.rule.ratio in (None, "token") or self.reduction == "sequence-mean"
        require(
            whole,
            f"algorithm.normalise is {self.normalise!r}; {self.name} has one ratio per sequence, "
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
        """The algorithm's entry in `ALGORITHMS`."""
        return ALGORITHMS[self.name]

    @property
    def group(self) -> int:
        """G, the number of responses per prompt."""
        if self.samples is not None:
            return self.samples
        return 2 if self.rule.pairs else 4 if self.rule.grouped else 1

    @property
    def reduction(self) -> str:
        """The reduction over tokens, one of `losses.NORMALISERS`."""
        return self.normalise or self.rule.normalise

    @property
    def kl_reduction(self) -> str:
        """The reduction over tokens of a KL term in the loss, one of `losses.NORMALISERS`.

        It is the objective's reduction, except for the ratio "product". There every token of a row
        holds the same ratio of whole sequences, and the mean over tokens counts it once. The KL
        belongs to the whole sequence, so its tokens are summed.
        """
        return "sequence" if self.rule.ratio == "product" else self.reduction

    @property
    def updates(self) -> int:
        """Number of updates from one batch of rollouts."""
        return self.epochs * self.minibatches

    @property
    def whitened(self) -> bool:
        """Whether advantages are whitened over the batch's response tokens."""
        return self.rule.whiten if self.whiten is None else self.whiten

    def constant_length(self, max_response_length: int) -> int | None:
        """Returns `max_response_length`, the divisor of "constant"; None for other reductions."""
        return max_response_length if self.reduction == "constant" else None


@flax.struct.dataclass
class Outcomes:
    """Returns, rewards and values of a batch of rollouts. The G rows of a prompt are consecutive.

    Attributes:
        return_B: Return R of each response; includes the KL if the KL is in the reward.
        rewards_BT: The same reward token by token; read by the advantage "gae".
        mask_BT: True on response tokens.
        values_BT: Value of the state before each token, at sampling time; for "gae" only, else
            None.
        greedy_P: Return of the greedy response to each prompt; for "greedy" only, else None.
    """

    return_B: Array
    rewards_BT: Array
    mask_BT: Array
    values_BT: Array | None = None
    greedy_P: Array | None = None


def compute_advantages(
    config: AlgorithmConfig, outcomes: Outcomes
) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns (advantage_BT, target_BT): advantages, and what the value model is fitted to.

    Both are 0 outside the mask and have no gradient. advantage_BT is None for "critic", because its
    baseline is the value model at the time of the update (`critic_advantages`). target_BT is None
    without a value model.

    Args:
        config: The algorithm.
        outcomes: Returns, rewards and values of the rollouts.

    Raises ValueError if `outcomes.greedy_P` is missing for "greedy".
    """
    outcomes = jax.lax.stop_gradient(outcomes)
    mask_BT, return_B = outcomes.mask_BT, outcomes.return_B
    to_tokens = lambda x_B: advantages.returns_to_tokens(x_B, mask_BT)
    return_PG = return_B.reshape(-1, config.group)
    kind = config.rule.advantage
    if kind == "critic":
        return None, to_tokens(return_B)
    if kind == "gae":
        advantage_BT = advantages.gae(
            outcomes.rewards_BT, outcomes.values_BT, mask_BT, config.gamma, config.gae_lambda
        )
        target_BT = jnp.where(mask_BT, advantage_BT + outcomes.values_BT, 0)
        return (_whitened(advantage_BT, mask_BT) if config.whitened else advantage_BT), target_BT
    if callable(kind):
        advantage_B = kind(return_PG).reshape(-1)
    elif kind == "batch-mean":
        # Filler rows have no response token and do not count in the mean.
        advantage_B = return_B - masked_mean(return_B, jnp.any(mask_BT, axis=1))
    elif kind == "greedy":
        if outcomes.greedy_P is None:
            raise ValueError("the advantage 'greedy' needs the greedy responses' returns greedy_P")
        advantage_B = (return_PG - outcomes.greedy_P[:, None]).reshape(-1)
    elif kind == "leave-one-out":
        advantage_B = advantages.leave_one_out(return_PG).reshape(-1)
    elif kind == "best-worst":
        advantage_B = advantages.best_and_worst(return_PG).reshape(-1)
    else:
        advantage_B = advantages.group_advantages(
            return_PG, normalise_std=kind == "group-std", epsilon=config.std_epsilon
        ).reshape(-1)
    advantage_BT = to_tokens(advantage_B)
    return (_whitened(advantage_BT, mask_BT) if config.whitened else advantage_BT), None


def critic_advantages(target_BT: Array, values_BT: Array, mask_BT: Array) -> jax.Array:
    """Returns A_t = Z_t - V(x_t) with the current V, without gradient; 0 outside the mask.

    Args:
        target_BT: Z, the return of each token.
        values_BT: V of the state before each token.
        mask_BT: True on response tokens.
    """
    return jax.lax.stop_gradient(jnp.where(mask_BT, target_BT - values_BT, 0))


def policy_loss(
    config: AlgorithmConfig,
    logp_BT: Array,
    old_BT: Array,
    advantage_BT: Array,
    mask_BT: Array,
    max_response_length: int,
) -> LossSum:
    """Returns the `LossSum` of the algorithm's policy loss: `losses.reinforce` or `losses.clipped`.

    Args:
        config: The algorithm.
        logp_BT: Log-probabilities under the trained policy; differentiated.
        old_BT: Log-probabilities under the policy that sampled.
        advantage_BT: Advantage of each token.
        mask_BT: True on response tokens.
        max_response_length: Divisor of the reduction "constant"; other reductions ignore it.
    """
    length = config.constant_length(max_response_length)
    if config.rule.ratio is None:
        return losses.reinforce(
            logp_BT,
            advantage_BT,
            mask_BT,
            config.reduction,
            length=length,
            old_BT=old_BT,
            max_ratio=config.max_ratio,
        )
    ratio_BT = ratios.importance_ratio(logp_BT, old_BT, mask_BT, config.rule.ratio)
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
    """Returns the advantages with mean 0 and variance 1 over all response tokens."""
    return masked_whiten(advantage_BT, mask_BT, shift_mean=True)
