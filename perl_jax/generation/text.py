"""Text generation: a model, with or without an adapter, continues prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from perl_jax import errors
from perl_jax.adapters.lora import Adapter
from perl_jax.data.tokenise import fill
from perl_jax.errors import require
from perl_jax.generation.config import GREEDY
from perl_jax.generation.programs import batch_sampler, require_finite, sampling_config
from perl_jax.hub.model import Model, TemplateOptions, load_model
from perl_jax.runtime.hosts import to_host
from perl_jax.runtime.seeds import random_key
from perl_jax.types import Prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(TemplateOptions):
    """Continue a prompt.

    Attributes:
        prompt: The text to continue.
        adapter: Folder of a policy's adapter; None: the base model.
        max_new_tokens: Largest number of tokens of a continuation.
        temperature: Divides the logits; 0: greedy.
        top_k: Sample from the k most likely tokens only; None: off.
        top_p: Sample from the fewest tokens with this probability in total; None: off.
        samples: Number of continuations.
        seed: Seed of sampling.
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


def generate(
    model: Model,
    adapter: Adapter | None,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.7,
    top_k: int | None = None,
    top_p: float | None = None,
    samples: int = 1,
    seed: int = 0,
) -> list[str]:
    """Returns sampled continuations: `samples` of the first prompt, then those of the next.

    Args:
        model: The base (`load_model`).
        adapter: A policy; None: the base itself.
        prompts: Texts to continue; a chat template makes each one a user turn.
        max_new_tokens: Largest number of tokens of a continuation.
        temperature: Divides the logits; 0: greedy.
        top_k: Sample from the k most likely tokens only; None: from all.
        top_p: Sample from the fewest tokens with this probability in total; None: from all.
        samples: Number of continuations of each prompt.
        seed: Seed of sampling.

    Raises:
        UserError: For a prompt without tokens, a prompt that is too long for max_new_tokens more
            tokens, or an adapter that is no policy.
    """
    require(
        adapter is None or adapter.head is None,
        "The adapter has a scalar head, so it is a reward or value model; generate needs a policy.",
    )
    require(
        not isinstance(prompts, str), "prompts is one text; give a list of texts, such as [text]."
    )
    tokenizer, positions = model.tokenizer, model.lm.config.max_positions
    rows = [tokenizer.prompt_ids(prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, rows, strict=True):
        require(
            bool(ids),
            f"The prompt {prompt!r} has no tokens, and {model.name} has no bos token to begin "
            "with; give a text to continue.",
        )
        require(
            len(ids) + max_new_tokens <= positions,
            f"The prompt has {len(ids)} tokens and max_new_tokens is {max_new_tokens}; "
            f"{model.name} has {positions} positions.",
        )
    if not rows:
        return []
    # Prompts are padded on the left, so that all end in the same column.
    tokens_PS, valid_PS = fill(
        [(ids,) for ids in rows], max(map(len, rows)), tokenizer.pad_id, left=True
    )
    sampler = sampling_config(model, max_new_tokens, temperature, top_k=top_k, top_p=top_p)
    batch = Prompts(tokens_PS, valid_PS, np.arange(len(rows), dtype=np.int32))
    rollout = batch_sampler(model, sampler, samples)(
        model.base, adapter, batch, jax.random.key_data(random_key(seed))
    )
    require_finite(model, rollout)
    sequences = to_host(rollout.sequences)
    texts = []
    for row, (ids_T, mask_T) in enumerate(
        zip(sequences.tokens_BT, sequences.response_BT, strict=True)
    ):
        ids, response = rows[row // samples], tokenizer.without_end(ids_T[mask_T])
        # Prompt and response are decoded together: word pieces join differently at a boundary.
        whole, prompt = tokenizer.text(ids + response), tokenizer.text(ids)
        texts.append(whole[len(prompt) :] if whole.startswith(prompt) else tokenizer.text(response))
    return texts


def run_generate(config: GenerateConfig) -> list[str]:
    """Loads the model and returns continuations of the config's prompt: command `generate`."""
    model = load_model(config)
    adapter = None if config.adapter is None else model.load_role(config.adapter, "policy")[0]
    return generate(
        model,
        adapter,
        [config.prompt],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        samples=config.samples,
        seed=config.seed,
    )
