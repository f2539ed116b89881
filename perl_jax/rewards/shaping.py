"""Shapes scores before the KL penalty is subtracted: clipping, whitening, length penalties."""

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
    """How scores are shaped before the KL penalty is subtracted; applied in the order of the
    fields.

    Attributes:
        clip: Clip scores to [-clip, clip]; None does not clip.
        whiten: Divide scores by their standard deviation over the batch; their mean is kept.
        missing_eos_penalty: Subtracted from the score of a response that reached max_new_tokens
            without an end-of-sequence token.
        overlong_penalty: The largest penalty for length: it grows linearly from 0 to this value
            over the last `overlong_buffer` tokens before max_new_tokens.
        overlong_buffer: The length, in tokens, over which the penalty for length grows; 0 turns it
            off.
    """

    clip: float | None = None
    whiten: bool = False
    missing_eos_penalty: float = 1.0
    overlong_penalty: float = 1.0
    overlong_buffer: int = 0

    def __post_init__(self) -> None:
        errors.in_range(self, "shaping")
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

    def check_length(self, max_response: int) -> None:
        """Raises UserError if `overlong_buffer` is above `max_response`.

        Args:
            max_response: The largest number of tokens of a response.
        """
        errors.require(
            self.overlong_buffer <= max_response,
            f"shaping.overlong_buffer is {self.overlong_buffer}; a response has at most "
            f"{max_response} tokens.",
        )


def shaped(
    shaping: ShapingConfig, max_response: int, score_B: Array, rollout: Rollout
) -> jax.Array:
    """Returns scores [B] that are clipped, whitened, and reduced by the penalties for a missing end
    and for length.

    Args:
        shaping: Which steps are applied, and how strongly.
        max_response: The largest number of tokens of a response (max_new_tokens).
        score_B: The unshaped scores [B].
        rollout: The sampled responses. Gives their lengths and whether each one ended with a stop
            token. Rows without response tokens are left out of the statistics of whitening.
    """
    mask_BT = rollout.sequences.response_BT
    score_B = advantages.shape_scores(
        score_B, jnp.any(mask_BT, axis=1), clip=shaping.clip, whiten=shaping.whiten
    )
    score_B = advantages.missing_eos_penalty(
        score_B, rollout.finished_B, shaping.missing_eos_penalty
    )
    return advantages.overlong_penalty(
        score_B,
        jnp.sum(mask_BT, axis=1),
        max_response,
        shaping.overlong_buffer,
        shaping.overlong_penalty,
    )
