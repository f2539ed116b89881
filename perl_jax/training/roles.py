"""The trainable tree that a job starts from."""

from __future__ import annotations

import pathlib

import jax

from perl_jax.adapters import combine
from perl_jax.adapters.lora import Adapter, LoRAConfig
from perl_jax.errors import UserError, require
from perl_jax.hub.model import Model, merge_program, weights_program
from perl_jax.training.configs import TrainingConfig


def fresh_role(
    model: Model,
    config: TrainingConfig,
    key: jax.Array,
    frozen: Adapter | str | pathlib.Path | None = None,
) -> Adapter:
    """Returns a fresh trainable tree: a LoRA adapter that leaves the base as it is, or all weights.

    frozen: an adapter, or the folder of one, that stays as it is beneath the fresh one.
    """
    if config.tuning == "full":
        _require_dense(model)
        return weights_program(model.lm)(model.base)
    fresh = model.lm.init_adapter(key, config.lora, model.base)
    below = load_frozen(model, frozen)
    return fresh if below is None else combine.stack(below, fresh, model.lm.config.layers)


def load_frozen(model: Model, folder: Adapter | str | pathlib.Path | None) -> Adapter | None:
    """Reads the adapter to train a fresh one upon. Raises UserError for fully tuned weights."""
    if folder is None or isinstance(folder, Adapter):
        return folder
    adapter, record = model.load_role(folder)
    require(
        record.tuning == "lora",
        f"{folder} is fully tuned; only an adapter can lie under another.",
    )
    return adapter


def starting_role(
    model: Model,
    config: TrainingConfig,
    policy: Adapter | str | pathlib.Path | None,
    key: jax.Array,
    frozen: Adapter | str | pathlib.Path | None = None,
) -> Adapter:
    """Returns the role that training goes on from, in the job's tuning.

    An adapter goes on as it is, with its own rank and targets. Full tuning from an adapter begins
    with a merged copy of the base. An adapter cannot go on from fully tuned weights: these are
    another base, and have to be given as one.

    Args:
        policy: A policy, or the folder of a policy artefact. None: `fresh_role`.
        key: Of the fresh role's initial values.
        frozen: Beneath a fresh adapter.

    Raises:
        UserError: For a policy that does not fit the tuning or the settings of the adapter.
    """
    if policy is None:
        return fresh_role(model, config, key, frozen)
    name = "The policy"
    if isinstance(policy, (str, pathlib.Path)):
        name = str(policy)
        policy = model.load_role(policy, "policy")[0]
    tuning = "lora" if policy.weights is None else "full"
    if config.tuning == tuning:
        check_adapter(name, policy.config, config.lora)
        return policy
    if config.tuning == "lora":
        raise UserError(
            f"{name} is fully tuned; an adapter needs a frozen base: use --tuning full, or "
            "start from an adapter."
        )
    _require_dense(model)
    return weights_program(model.lm)(merge_program(model.lm)(model.base, policy))


def check_adapter(name: str, decided: LoRAConfig | None, given: LoRAConfig) -> None:
    """Raises UserError for a setting in `lora` that differs from those of the adapter `name`.

    A config cannot tell a default from a value that was given: a setting that is the default
    counts as not given.
    """
    if decided is None:
        return
    defaults, settings = vars(LoRAConfig()), vars(decided)
    for field, wanted in vars(given).items():
        found = settings[field]
        require(
            wanted in (found, defaults[field]),
            f"lora.{field} is {wanted!r}; {name}, which this run goes on from, has {found!r}: "
            "leave it out, or begin a fresh adapter with --stack-on.",
        )


def _require_dense(model: Model) -> None:
    """Raises UserError for a quantised base, whose weights cannot be trained."""
    require(
        model.quantise.kind == "none",
        "Full tuning trains the base's weights; quantise.kind must be none.",
    )
