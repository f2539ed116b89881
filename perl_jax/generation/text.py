"""`generate`: a model, perhaps with an adapter, continues a prompt."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from perl_jax import errors
from perl_jax.errors import require
from perl_jax.generation.config import GREEDY
from perl_jax.generation.programs import batch_sampler, sampling_config
from perl_jax.hub.model import TemplateOptions, load_model
from perl_jax.runtime.hosts import to_host
from perl_jax.types import Prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(TemplateOptions):
    """Continue a prompt.

    Attributes:
        prompt: The text to continue.
        adapter: A policy artefact; None: the base.
        max_new_tokens: Room for a continuation, in tokens.
        temperature: Divides the logits; 0: greedy.
        top_k: Sample from the k most likely tokens only; None: off.
        top_p: Sample from the fewest tokens with this probability in total; None: off.
        samples: Number of continuations.
        seed: Of sampling.
    """

    prompt: str
    adapter: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.7
    top_k: int | None = None
    top_p: float | None = None
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.whole("samples", self.samples)
        self.check_forward("generate")
        if self.temperature == 0:
            errors.unread(self, ("seed", "top_k", "top_p"), *GREEDY)


def generate(config: GenerateConfig) -> list[str]:
    """Sampled continuations of the prompt."""
    model = load_model(config)
    adapter = None if config.adapter is None else model.load_role(config.adapter)[0]
    ids = model.tokenizer.prompt_ids(config.prompt)
    require(
        bool(ids),
        f"The prompt {config.prompt!r} has no tokens, and {model.name} has no bos token to begin "
        "with; give a text to continue.",
    )
    room = model.lm.config.max_positions
    require(
        len(ids) + config.max_new_tokens <= room,
        f"The prompt has {len(ids)} tokens and max_new_tokens is {config.max_new_tokens}; "
        f"{model.name} has {room} positions.",
    )
    sampler = sampling_config(
        model, config.max_new_tokens, config.temperature, top_k=config.top_k, top_p=config.top_p
    )
    prompts = Prompts(
        np.asarray([ids], np.int32), np.ones((1, len(ids)), bool), np.zeros(1, np.int32)
    )
    rollout = batch_sampler(model, sampler, config.samples)(
        model.base, adapter, prompts, jax.random.key_data(jax.random.key(config.seed))
    )
    sequences = to_host(rollout.sequences)
    # Prompt and response are decoded together: word pieces join differently at a boundary.
    texts = []
    for ids_T, mask_T in zip(sequences.tokens_BT, sequences.response_BT, strict=True):
        response = model.tokenizer.without_end(ids_T[mask_T])
        whole, prompt = model.tokenizer.text(ids + response), model.tokenizer.text(ids)
        texts.append(
            whole[len(prompt) :] if whole.startswith(prompt) else model.tokenizer.text(response)
        )
    return texts
