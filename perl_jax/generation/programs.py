"""Compiled samplers of a model."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from perl_jax.generation import sampling
from perl_jax.generation.config import RolloutConfig
from perl_jax.generation.continuous import ContinuousSampler
from perl_jax.generation.sampling import SamplingConfig
from perl_jax.hub.model import Model
from perl_jax.runtime.platforms import decoding_options, platform_of
from perl_jax.runtime.programs import SHAPES, Program

# Layers of a model that are inlined in sampling: further ones would be minutes to compile.
_INLINED = 16


def sampling_config(
    model: Model, max_new_tokens: int, temperature: float, **more: Any
) -> SamplingConfig:
    """How responses are sampled: until one of the tokenizer's stop tokens."""
    # Parts of matrices that are split over devices do not lie beside each other.
    fused = (
        platform_of(model.mesh) == "gpu"
        and model.mesh.shape["fsdp"] == model.mesh.shape["tensor"] == 1
    )
    inlined = (
        platform_of(model.mesh) == "cpu"
        and model.mesh.size == 1
        and model.lm.config.layers <= _INLINED
    )
    # A CPU reads what there is of the cache at its own expense, and has memory for its growth.
    # Inlined layers are compiled once a stage.
    stages = 1 if max_new_tokens < 64 or platform_of(model.mesh) != "cpu" else 2 if inlined else 4
    settings = {
        "stages": stages,
        "fused": fused,
        "inlined": inlined,
        "stop_ids": model.tokenizer.stop_ids,
        "pad_id": model.tokenizer.pad_id,
    } | more
    return SamplingConfig(max_new_tokens=max_new_tokens, temperature=temperature, **settings)


def sample_program(
    model: Model, max_new_tokens: int, temperature: float, rollout: RolloutConfig, samples: int = 1
) -> Program | ContinuousSampler:
    """(base, policy, prompts, key data) -> Rollout, `samples` rows a prompt."""
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
    """(base, policy, prompts, key data) -> Rollout, one batch at a time."""
    sample = functools.partial(sampling.sample_prompts, model.lm, sampler, samples)
    return Program(
        "sample",
        sample,
        limit=SHAPES,
        compiler_options=decoding_options(model.mesh, model.quantise.kind != "none"),
    )
