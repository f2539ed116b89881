"""The trainable tree that a job starts from."""

from __future__ import annotations

import os

import jax

from perl_jax.adapters import combine
from perl_jax.adapters.lora import Adapter, LoRAConfig
from perl_jax.errors import UserError, require
from perl_jax.hub.model import Model, merge_program, weights_program
from perl_jax.runtime import files
from perl_jax.training.configs import TrainingConfig


def fresh_role(
    model: Model,
    config: TrainingConfig,
    key: jax.Array,
    frozen: Adapter | files.PathLike | None = None,
) -> Adapter:
    """Returns a fresh trainable role: a LoRA adapter that does not change the outputs, or all
    weights.

    Args:
        model: The base.
        config: Settings; `tuning` and `lora` are read.
        key: The key of the adapter's initial values; not read in full tuning.
        frozen: An adapter, or the folder of one, that stays unchanged beneath the fresh one; not
            read in full tuning. None: there is none.

    Raises:
        UserError: In full tuning of a quantised base, or for a fully tuned `frozen`.
    """
    if config.tuning == "full":
        _require_dense(model)
        return weights_program(model.lm)(model.base)
    fresh = model.lm.init_adapter(key, config.lora, model.base)
    below = load_frozen(model, frozen)
    return fresh if below is None else combine.stack(below, fresh, model.lm.config.layers)


def load_frozen(model: Model, folder: Adapter | files.PathLike | None) -> Adapter | None:
    """Returns the adapter that stays unchanged beneath a fresh one.

    Args:
        model: The base.
        folder: The folder of an artefact. An adapter, or None, is returned as it is.

    Raises:
        UserError: If the folder holds fully tuned weights.
    """
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
    policy: Adapter | files.PathLike | None,
    key: jax.Array,
    frozen: Adapter | files.PathLike | None = None,
) -> Adapter:
    """Returns the role that training continues from, in the job's tuning.

    An adapter continues with its own rank and targets. Full tuning from an adapter begins with a
    merged copy of the base. An adapter cannot continue from fully tuned weights: these are another
    base, and must be given as one.

    Args:
        model: The base.
        config: Settings of the job.
        policy: A policy, or the folder of a policy artefact. None: `fresh_role`.
        key: The key of a fresh role's initial values.
        frozen: An adapter, or the folder of one, that stays unchanged beneath a fresh one. None:
            there is none.

    Raises:
        UserError: For a policy that does not fit the tuning or the settings of the adapter.
    """
    if policy is None:
        return fresh_role(model, config, key, frozen)
    name = "The policy"
    if isinstance(policy, (str, os.PathLike)):
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
    """Raises UserError if the config sets a field of `lora` to another value than the adapter has.

    A config cannot tell a default from a value that was set: a field at its default counts as not
    set.

    Args:
        name: What messages call the adapter.
        decided: The settings that the adapter was made with; None: fully tuned weights, nothing is
            checked.
        given: The config's section `lora`.
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
