"""What becomes of a score before the KL is taken off: clipping, whitening, penalties."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from perl_jax import errors
from perl_jax.generation.sampling import Rollout
from perl_jax.objectives import advantages
from perl_jax.types import Array


@dataclasses.dataclass(frozen=True)
class ShapingConfig:
    """What becomes of a score before the KL is taken off.

    Attributes:
        clip: Scores are kept within +- this; None: as they are.
        whiten: Divide scores by their deviation over the batch; their mean stays.
        missing_eos_penalty: Taken off where a response did not end within its room.
        overlong_penalty: Taken off, in proportion, over the last overlong_buffer tokens of the
        room. overlong_buffer: In tokens; 0: no such penalty.
    """

    clip: float | None = None
    whiten: bool = False
    missing_eos_penalty: float = 1.0
    overlong_penalty: float = 1.0
    overlong_buffer: int = 0

    def __post_init__(self) -> None:
        if self.clip is not None:
            errors.positive("shaping.clip", self.clip)
        for field in ("missing_eos_penalty", "overlong_penalty", "overlong_buffer"):
            errors.positive(f"shaping.{field}", getattr(self, field), zero=True)
        taken = self.overlong_buffer > 0 or self.overlong_penalty == ShapingConfig.overlong_penalty
        penalty = (
            f"shaping.overlong_penalty is {self.overlong_penalty!r}, which nothing reads "
            "while shaping.overlong_buffer is 0"
        )
        errors.require(taken, f"{penalty}; leave it out, or give shaping.overlong_buffer.")

    def check_room(self, room: int) -> None:
        """UserError unless the over-length penalty begins within a response's room, in tokens."""
        errors.require(
            self.overlong_buffer <= room,
            f"shaping.overlong_buffer is {self.overlong_buffer}; a response has room for {room} "
            "tokens.",
        )


def shaped(shaping: ShapingConfig, room: int, score_B: Array, rollout: Rollout) -> jax.Array:
    """Scores after clipping, whitening and penalties (`ShapingConfig`), in that order. room: a
    response's, in tokens.
    """
    mask_BT = rollout.sequences.response_BT
    score_B = advantages.shape_scores(
        score_B, jnp.any(mask_BT, axis=1), clip=shaping.clip, whiten=shaping.whiten
    )
    score_B = advantages.missing_eos_penalty(
        score_B, rollout.finished_B, shaping.missing_eos_penalty
    )
    return advantages.overlong_penalty(
        score_B, jnp.sum(mask_BT, axis=1), room, shaping.overlong_buffer, shaping.overlong_penalty
    )
