"""Builds compiled sampling programs for a model."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from perl_jax.generation import sampling
from perl_jax.generation.config import RolloutConfig, SamplingConfig
from perl_jax.generation.continuous import ContinuousSampler
from perl_jax.hub.model import Model
from perl_jax.runtime.platforms import decoding_options, platform_of
from perl_jax.runtime.programs import SHAPES, Program


def sampling_config(
    model: Model, max_new_tokens: int, temperature: float, **more: Any
) -> SamplingConfig:
    """Returns a model's sampling config: its stop tokens, and what decodes fastest on its platform.

    Args:
        model: The model.
        max_new_tokens: Largest number of sampled tokens, the stop token included.
        temperature: Divides the logits; 0: greedy.
        more: Further fields of `SamplingConfig`; they replace the defaults chosen here.
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

    The rollout has `samples` rows per prompt. The program uses continuous batching if
    `rollout.slots` is set.
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
    """Returns a program (base, policy, prompts, key data) -> Rollout that decodes a batch."""
    sample = functools.partial(sampling.sample_prompts, model.lm, sampler, samples)
    return Program(
        "sample",
        sample,
        limit=SHAPES,
        compiler_options=decoding_options(model.mesh, model.quantise.kind != "none"),
    )
