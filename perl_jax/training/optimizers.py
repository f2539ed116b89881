"""The optimizer of each role: its settings, its schedule, its default learning rate."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from perl_jax.adapters.lora import Adapter
from perl_jax.errors import default_of, one_of, positive, read_by, require
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
        weight_decay: Share of the weights that a step takes off: times the rate with adamw, as it
            is with adafactor.
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
        # Adafactor has no momentum here, its own decay of squares and its own epsilons.
        for field in ("b1", "b2", "epsilon"):
            read_by(
                f"optimizer.{field}",
                getattr(self, field),
                default_of(OptimizerConfig, field),
                self.name,
                ("adamw",),
            )


Optimizers = Mapping[str, optax.GradientTransformation]


# The paper's best reward-model rates (arXiv 2403.10704): adapters 1e-4, full tuning 1e-5. The
# factor of ten is the field's rule too. Bases narrower than WIDTH take more, in proportion to
# (WIDTH / width)^POWER: found on the small bases that are trained on the spot
# (docs/log/hyperparameters.md).
DEFAULT_RATES = {"lora": 1e-4, "full": 1e-5}


WIDTH, POWER = 2048, 0.75


def schedule(config: OptimizerConfig, rate: float, steps: int) -> optax.Schedule:
    """Linear warm-up to `rate`, then constant, or linear or cosine decay to 0 at `steps`."""
    rest = max(steps - config.warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(rate),
        "linear": lambda: optax.linear_schedule(rate, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(rate, rest),
    }[config.schedule]()
    if config.warmup_steps == 0:
        return after
    # Begins at rate / warmup, not 0: the first update counts.
    warmup = optax.linear_schedule(
        rate / config.warmup_steps, rate, max(config.warmup_steps - 1, 1)
    )
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def _rule(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    if config.name == "adamw":
        return optax.adamw(
            rate, b1=config.b1, b2=config.b2, eps=config.epsilon, weight_decay=config.weight_decay
        )
    # Without the parameter-scale factor: B starts at zero, and updates scaled by its size would
    # leave it there.
    return optax.adafactor(
        rate,
        multiply_by_parameter_scale=False,
        weight_decay_rate=config.weight_decay or None,
        momentum=None,
        dtype_momentum=jnp.float32,
    )


def learning_rate(config: OptimizerConfig, tuning: str, width: int = WIDTH) -> float:
    """The configured rate, or the default of the tuning for a base of that width (of hidden
    states).
    """
    if config.learning_rate is not None:
        return config.learning_rate
    return DEFAULT_RATES[tuning] * max(1.0, WIDTH / width) ** POWER


def make_optimizer(
    config: OptimizerConfig, steps: int, tuning: str = "lora", width: int = WIDTH
) -> optax.GradientTransformation:
    """Clipping by the global norm over the role's trainable leaves, then the rule, head apart.

    Clipping comes first and over lora, head and weights together: one bound on one update.
    With lora_b_ratio (LoRA+, Hayou et al. 2024, arXiv 2402.12354) B has the rate times the ratio.
    """
    plus = config.lora_b_ratio != 1.0

    def labels(role: Adapter) -> Adapter:
        name = lambda part, label: jax.tree.map(lambda _: label, part)
        sides = trees.map_named(
            lambda leaf, _: "lora_b" if plus and leaf.endswith("lora_b") else "body", role.lora
        )
        return role.replace(
            lora=sides, weights=name(role.weights, "body"), head=name(role.head, "head")
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
