"""The trainable tree that a job starts from."""

from __future__ import annotations

import jax

from perl_jax.adapters import lora
from perl_jax.adapters.lora import Adapter, LoRAConfig
from perl_jax.errors import UserError, require
from perl_jax.hub.artefacts import Record
from perl_jax.hub.model import Model, merge_program, weights_program
from perl_jax.training.configs import JobConfig


def fresh_role(model: Model, config: JobConfig, key: jax.Array) -> Adapter:
    """The trainable tree a job starts from: a LoRA adapter equal to the base, or all its
    weights.
    """
    if config.tuning == "full":
        _require_dense(config)
        return weights_program(model.lm)(model.base)
    fresh = model.lm.init_adapter(key, config.lora, model.base)
    if config.stack_on is None:
        return fresh
    frozen, record = model.load_role(config.stack_on)
    require(
        record.tuning == "lora",
        f"{config.stack_on} is fully tuned; only an adapter can lie under another.",
    )
    return lora.stack(frozen, fresh, model.lm.config.layers)


def starting_role(model: Model, config: JobConfig, folder: str | None, key: jax.Array) -> Adapter:
    """A role that goes on from a policy artefact, in the job's tuning.

    Adapters go on as they are (rank and targets are the artefact's); full tuning from an adapter
    begins with a derived merged copy. An adapter cannot go on from fully tuned weights: those are
    another base, and have to be given as one.
    """
    if folder is None:
        return fresh_role(model, config, key)
    adapter, record = model.load_role(folder, "policy")
    if config.tuning == record.tuning:
        check_adapter(folder, record, config.lora)
        return adapter
    if config.tuning == "lora":
        raise UserError(
            f"{folder} is fully tuned; an adapter needs a frozen base: use --tuning full, or "
            "start from an adapter."
        )
    _require_dense(config)
    return weights_program(model.lm)(merge_program(model.lm)(model.base, adapter))


def check_adapter(folder: str, record: Record, given: LoRAConfig) -> None:
    """Raises UserError when a setting in `--lora` differs from the adapter that the run continues
    from.

    A config cannot tell its defaults from values that were given; one that is the default is taken
    as not given.
    """
    if record.lora is None:
        return
    defaults, decided = vars(LoRAConfig()), vars(record.lora)
    for name, wanted in vars(given).items():
        found = decided[name]
        require(
            wanted in (found, defaults[name]),
            f"lora.{name} is {wanted!r}; {folder}, which this run goes on from, has {found!r}: "
            "leave it out, or begin a fresh adapter with --stack-on.",
        )


def _require_dense(config: JobConfig) -> None:
    require(
        config.quantise.kind == "none",
        "Full tuning trains the base's weights; quantise.kind must be none.",
    )
