"""Builds compiled sampling programs for a model."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from perl_jax.errors import require
from perl_jax.generation import sampling
from perl_jax.generation.config import RolloutConfig, SamplingConfig
from perl_jax.generation.continuous import ContinuousSampler
from perl_jax.generation.sampling import Rollout
from perl_jax.hub.model import Model
from perl_jax.runtime.hosts import to_host
from perl_jax.runtime.platforms import decoding_options, platform_of
from perl_jax.runtime.programs import SHAPES, Program


def sampling_config(
    model: Model, max_new_tokens: int, temperature: float, **more: Any
) -> SamplingConfig:
    """Returns how to sample from a model: with its stop tokens, and what suits its platform.

    The fields `stages` and `fused` are selected for the platform, so that decoding is fast.

    Args:
        model: The model.
        max_new_tokens: Largest number of sampled tokens, the stop token included.
        temperature: Divides the logits; 0: greedy.
        more: Further fields of `SamplingConfig`; they replace the values selected here.
    """
    # Matrices that are split over devices cannot be concatenated locally.
    fused = (
        platform_of(model.mesh) == "gpu"
        and model.mesh.shape["fsdp"] == model.mesh.shape["tensor"] == 1
    )
    settings = {
        # On a CPU reading empty cache columns costs a seventh of the time of a decoding step.
        "stages": 2 if platform_of(model.mesh) == "cpu" and max_new_tokens >= 64 else 1,
        "fused": fused,
        "stop_ids": model.tokenizer.stop_ids,
        "pad_id": model.tokenizer.pad_id,
    } | more
    return SamplingConfig(max_new_tokens=max_new_tokens, temperature=temperature, **settings)


def sample_program(
    model: Model, max_new_tokens: int, temperature: float, rollout: RolloutConfig, samples: int = 1
) -> Program | ContinuousSampler:
    """Returns the program that samples responses: (base, policy, prompts, key data) -> Rollout.

    The rollout has `samples` consecutive rows per prompt.

    Args:
        model: The model.
        max_new_tokens: Largest number of sampled tokens, the stop token included.
        temperature: Divides the logits; 0: greedy.
        rollout: How responses are decoded; with continuous batching if `rollout.slots` is set.
        samples: Number of responses per prompt.

    Raises UserError if the number of slots does not suit `samples` or the mesh.
    """
    sampler = sampling_config(
        model,
        max_new_tokens,
        temperature,
        cache=rollout.cache,
        adapters=rollout.adapters,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
    )
    if rollout.slots is not None:
        return ContinuousSampler(
            model.lm,
            dataclasses.replace(sampler, stages=1),
            samples,
            rollout.slots,
            quantised=model.quantise.kind != "none",
        )
    return batch_sampler(model, sampler, samples)


def batch_sampler(model: Model, sampler: SamplingConfig, samples: int) -> Program:
    """Returns the program that decodes a whole batch at once, until its longest response ends.

    The program is (base, policy, prompts, key data) -> Rollout.

    Args:
        model: The model.
        sampler: How tokens are sampled.
        samples: Number of responses per prompt.
    """
    sample = functools.partial(sampling.sample_prompts, model.lm, sampler, samples)
    return Program(
        "sample",
        sample,
        limit=SHAPES,
        compiler_options=decoding_options(model.mesh, model.quantise.kind != "none"),
    )


def require_finite(model: Model, rollout: Rollout) -> None:
    """Raises UserError if a response's log-probabilities are NaN or infinite.

    Its tokens would then have been drawn from no distribution. All processes must call this
    function.

    Args:
        model: The model that sampled, for the message.
        rollout: The responses.
    """
    logp_BT = to_host(rollout.logp_BT)
    wrong = int((~np.isfinite(logp_BT)).any(axis=1).sum())
    require(
        wrong == 0,
        f"{wrong} of {len(logp_BT)} responses of {model.name} have log-probabilities that are NaN "
        "or infinite: weights of the model or of an adapter are damaged, or too large for "
        f"{model.lm.config.dtype}.",
    )
