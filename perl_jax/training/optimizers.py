"""Makes the optimizer of a role: settings, learning-rate schedule, default learning rate."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from perl_jax.adapters.lora import Adapter
from perl_jax.errors import default_of, in_range, one_of, positive, read_by, require
from perl_jax.runtime import trees

OPTIMIZERS = ("adafactor", "adamw")


SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How trained weights are updated.

    Attributes:
        name: adafactor (the paper's) or adamw.
        learning_rate: The rate after the warm-up; None: 1e-4 for adapters and 1e-5 for full tuning
            (the paper's best for reward models), times (2048 / width)^0.75 on bases narrower than
            2048.
        head_learning_rate: The scalar head's own rate; None: the same as the rest.
        lora_b_ratio: B's rate over A's (LoRA+; its paper uses 16); 1: the same.
        schedule: After the warm-up: constant, or linear or cosine decay to 0.
        warmup_steps: Steps of linear warm-up; 0: none.
        clip_norm: Largest global norm of a role's gradient; None: no clipping.
        weight_decay: Share of the weights that a step subtracts; adamw multiplies it by the
            learning rate, adafactor does not.
        b1: Decay of AdamW's mean of gradients.
        b2: Decay of AdamW's mean of squared gradients.
        epsilon: AdamW's epsilon; 1e-5 instead of 1e-8, because policy gradients are small and rare.
    """

    name: typing.Literal["adafactor", "adamw"] = "adafactor"
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    lora_b_ratio: float = 1.0
    schedule: typing.Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    clip_norm: float | None = 1.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        in_range(self, "optimizer")
        one_of("optimizer.name", self.name, OPTIMIZERS)
        one_of("optimizer.schedule", self.schedule, SCHEDULES)
        for field in ("learning_rate", "head_learning_rate"):
            if getattr(self, field) is not None:
                positive(f"optimizer.{field}", getattr(self, field))
        if self.clip_norm is not None:
            positive("optimizer.clip_norm", self.clip_norm)
        positive("optimizer.warmup_steps", self.warmup_steps, zero=True)
        positive("optimizer.weight_decay", self.weight_decay, zero=True)
        positive("optimizer.epsilon", self.epsilon)
        positive("optimizer.lora_b_ratio", self.lora_b_ratio)
        for field in ("b1", "b2"):
            value = getattr(self, field)
            require(0 <= value < 1, f"optimizer.{field} is {value!r}; it must lie in [0, 1).")
        # Adafactor is used without momentum, with its own decay of squares and its own epsilons.
        for field in ("b1", "b2", "epsilon"):
            read_by(
                f"optimizer.{field}",
                getattr(self, field),
                default_of(OptimizerConfig, field),
                self.name,
                ("adamw",),
            )


# The optimizer of each role, by name.
Optimizers = Mapping[str, optax.GradientTransformation]


# The paper's best rates for reward models (arXiv 2403.10704): 1e-4 for adapters and 1e-5 for full
# tuning. A factor of ten between the two is usual. On bases narrower than WIDTH the rates are
# multiplied by (WIDTH / width)^POWER, which was found on small bases
# (docs/log/hyperparameters.md).
DEFAULT_RATES = {"lora": 1e-4, "full": 1e-5}


WIDTH, POWER = 2048, 0.75


def schedule(config: OptimizerConfig, rate: float, steps: int) -> optax.Schedule:
    """Returns the learning-rate schedule of a run: number of updates done -> learning rate.

    A linear warm-up to `rate` is followed by a constant rate, or by a linear or cosine decay that
    reaches 0 at `steps`. The first update has the rate `rate / warmup_steps`.

    Args:
        config: The kind of schedule and the steps of warm-up.
        rate: The learning rate after the warm-up.
        steps: Number of updates of the run.
    """
    rest = max(steps - config.warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(rate),
        "linear": lambda: optax.linear_schedule(rate, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(rate, rest),
    }[config.schedule]()
    if config.warmup_steps == 0:
        return after
    # The warm-up begins at rate / warmup_steps: at 0 the first update would change nothing.
    warmup = optax.linear_schedule(
        rate / config.warmup_steps, rate, max(config.warmup_steps - 1, 1)
    )
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def _rule(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Returns AdamW or Adafactor, as `config.name` says, with a learning-rate schedule."""
    if config.name == "adamw":
        return optax.adamw(
            rate, b1=config.b1, b2=config.b2, eps=config.epsilon, weight_decay=config.weight_decay
        )
    # Updates are not multiplied by the scale of the parameters: B starts at zero, and would stay
    # there.
    return optax.adafactor(
        rate,
        multiply_by_parameter_scale=False,
        weight_decay_rate=config.weight_decay or None,
        momentum=None,
        dtype_momentum=jnp.float32,
    )


def learning_rate(config: OptimizerConfig, tuning: str, width: int = WIDTH) -> float:
    """Returns `config.learning_rate`, or the default of the tuning if that is None.

    The default is DEFAULT_RATES[tuning] * max(1, WIDTH / width)^POWER.

    Args:
        config: Settings of the optimizer.
        tuning: lora or full.
        width: The size of the base's hidden states.
    """
    if config.learning_rate is not None:
        return config.learning_rate
    return DEFAULT_RATES[tuning] * max(1.0, WIDTH / width) ** POWER


def make_optimizer(
    config: OptimizerConfig, steps: int, tuning: str = "lora", width: int = WIDTH
) -> optax.GradientTransformation:
    """Returns a role's optimizer: gradient clipping, then AdamW or Adafactor.

    The gradient is clipped by its global norm over all trainable leaves (LoRA, head and weights
    together). The head has its own learning rate. With `lora_b_ratio` (LoRA+, Hayou et al. 2024,
    arXiv 2402.12354) the rate of B is that of A times the ratio.

    Args:
        config: Settings of the optimizer.
        steps: Number of updates of the run; the learning-rate schedule ends there.
        tuning: lora or full; decides the default learning rate.
        width: The size of the base's hidden states; decides the default learning rate too.
    """
    plus = config.lora_b_ratio != 1.0

    def labels(role: Adapter) -> Adapter:
        name = lambda part, label: jax.tree.map(lambda _: label, part)
        sides = trees.map_named(
            lambda leaf, _: "lora_b" if plus and leaf.endswith("lora_b") else "body", role.lora
        )
        return dataclasses.replace(
            role, lora=sides, weights=name(role.weights, "body"), head=name(role.head, "head")
        )

    body_rate = learning_rate(config, tuning, width)
    head_rate = body_rate if config.head_learning_rate is None else config.head_learning_rate
    rules = {
        "body": _rule(config, schedule(config, body_rate, steps)),
        "head": _rule(config, schedule(config, head_rate, steps)),
    }
    if plus:
        rules["lora_b"] = _rule(config, schedule(config, body_rate * config.lora_b_ratio, steps))
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    return optax.chain(clip, optax.multi_transform(rules, labels))
