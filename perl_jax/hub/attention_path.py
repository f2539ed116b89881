"""Chooses the attention path for the devices of a mesh, and prints the choice."""

from __future__ import annotations

import dataclasses
import sys

from jax.sharding import Mesh

from perl_jax.errors import require
from perl_jax.models import kernels
from perl_jax.models.config import ModelConfig
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import hosts
from perl_jax.runtime.platforms import platform_of

# On a CPU, models of at most so many layers have them unrolled.
_SHALLOW = 8


def for_devices(config: ModelConfig, mesh: Mesh, attention: str = "auto") -> ModelConfig:
    """Returns the config with the attention path for the mesh's devices.

    On CPUs, the layers of models with at most `_SHALLOW` layers are also unrolled.

    Args:
        config: The model's configuration.
        mesh: The devices.
        attention: The attention path; auto takes the best one for the devices
            (`kernels.choose_attention`).

    Raises:
        UserError: The devices are CPUs, which do not support the path.
    """
    path = _choice(config, mesh).path if attention == "auto" else attention
    if platform_of(mesh) != "cpu":
        return dataclasses.replace(config, attention=path)
    require(
        attention in ("auto", "plain", "blocked"),
        f"attention is {attention!r}; on a CPU it must be auto, plain or blocked.",
    )
    return dataclasses.replace(
        config, unroll=config.layers if config.layers <= _SHALLOW else 1, attention=path
    )


def _choice(config: ModelConfig, mesh: Mesh) -> kernels.AttentionChoice:
    """Returns the best attention path for the model on the mesh's devices, with the reason."""
    return kernels.choose_attention(
        platform_of(mesh),
        config,
        getattr(mesh.devices.flat[0], "compute_capability", None),
        mesh.size,
    )


def attention_paths(lm: LanguageModel) -> dict[str, str]:
    """Returns how attention is computed, with the reason, as {"training": text, "sampling": text}.

    The path for training is also that for scoring.
    """
    path, (best, why) = lm.config.attention, _choice(lm.config, lm.mesh)
    whole = f"{path} ({why if path == best else '--attention asks for it'})"
    sampling = (
        f"prompts {path}, then plain over the cache (one query a row, for which no kernel "
        "is needed)"
    )
    if local := len(lm.config.windowed):
        sampling += (
            f", which holds {lm.config.window} tokens in {local} of {lm.config.layers} layers"
        )
    return {"training": whole, "sampling": sampling}


def say_attention(job: str, lm: LanguageModel) -> None:
    """Prints the attention paths in one line to standard error; other processes than the first
    print nothing.

    Args:
        job: The command's name, with which the line begins.
        lm: The model's functions.
    """
    if hosts.is_writer():
        print(
            f"{job}: attention: "
            + "; ".join(f"{what}: {path}" for what, path in attention_paths(lm).items())
            + ".",
            file=sys.stderr,
            flush=True,
        )
