"""Checks the settings of PEFT's adapter_config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from perl_jax.errors import COUNT, MOST, UserError, listed, positive, require, shown, whole

# Settings under which PEFT computes something that an Adapter cannot: name -> the supported value.
_ONLY_VALUE = {
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "use_bdlora": None,
    "use_qalora": False,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
}
# Initialisations that change the base's weights: the saved pair belongs to the changed base.
_BASE_CHANGING = ("pissa", "olora", "loftq", "corda", "lora_ga")
# Settings that are read, or do not affect the outputs of a loaded adapter.
_KNOWN = {
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_dropout",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "auto_mapping",
    "exclude_modules",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "ensure_weight_tying",
    "runtime_config",
}


# A regular expression is matched against names of some 40 characters. It could take for ever with
# a repeated group, or with more repetitions than these.
_REPETITIONS, _LONGEST = 3, 500


def check_settings(values: Mapping[str, Any]) -> None:
    """Raises UserError for settings under which PEFT computes something that an `Adapter` cannot.

    Args:
        values: The object of adapter_config.json.
    """
    where = "adapter_config.json"
    require(
        values.get("peft_type") == "LORA",
        f"{where} has peft_type {shown(values.get('peft_type'))}; only 'LORA' is supported.",
    )
    for field, allowed in _ONLY_VALUE.items():
        found = values.get(field, allowed)
        require(
            not found or found == allowed,
            f"{where} has {field} {shown(found)}; only {allowed!r} is supported.",
        )
    _check_types(where, values)
    unknown = sorted(
        name
        for name, value in values.items()
        if name not in _KNOWN and name not in _ONLY_VALUE and value
    )
    require(
        not unknown,
        f"{where} sets {listed(unknown)}, which is not supported and could change the outputs.",
    )
    begun = values.get("init_lora_weights", True)
    changed = isinstance(begun, str) and begun.lower().startswith(_BASE_CHANGING)
    require(
        not changed,
        f"{where} has init_lora_weights {shown(begun)}, which changes the base's weights; save it "
        "with PEFT's path_initial_model_for_weight_conversion.",
    )
    saved = set(values.get("modules_to_save") or ()) - {"score", "classifier"}
    require(
        not saved, f"{where} has modules_to_save {shown(sorted(saved))}; only 'score' is supported."
    )


def _check_types(where: str, values: Mapping[str, Any]) -> None:
    """Raises UserError for a setting that is read and has another type than PEFT writes, or is a
    number or a regular expression that PEFT could not use.

    Args:
        where: The file, for messages.
        values: The settings; nulls pass.
    """
    given = {name: value for name, value in values.items() if value is not None}
    for name in ("use_rslora", "use_dora"):
        flag = given.get(name, False)
        require(
            isinstance(flag, bool), f"{where} has {name} {shown(flag)}; it must be true or false."
        )
    if "r" in given:
        whole(f"{where}: r", given["r"], most=MOST["rank"])
    if "lora_alpha" in given:
        positive(f"{where}: lora_alpha", given["lora_alpha"])
    dropout = given.get("lora_dropout", 0.0)
    good = isinstance(dropout, (int, float)) and 0 <= dropout < 1
    require(good, f"{where} has lora_dropout {shown(dropout)}; it must lie in [0, 1).")
    saved = given.get("modules_to_save", [])
    good = isinstance(saved, list) and all(isinstance(name, str) for name in saved)
    require(good, f"{where} has modules_to_save {shown(saved)}; it must be a list of names.")
    for name, most in (("rank_pattern", MOST["rank"]), ("alpha_pattern", COUNT)):
        patterns = given.get(name, {})
        require(
            isinstance(patterns, Mapping),
            f"{where} has {name} {shown(patterns)}; it must be an object of numbers.",
        )
        for pattern, value in patterns.items():
            _check_pattern(f"{where}: {name}", pattern)
            positive(f"{where}: {name} of {pattern[:80]}", value, most=most)


def _check_pattern(where: str, pattern: str) -> None:
    """Raises UserError for a regular expression that is none, or that could take for ever.

    Args:
        where: The setting, for messages.
        pattern: The regular expression, or the name of a module.
    """
    repeated_group = re.search(r"\)\s*[*+{]", pattern) is not None
    repetitions = len(re.findall(r"[*+{?]", pattern.replace("(?:", "(")))
    require(
        len(pattern) <= _LONGEST and not repeated_group and repetitions <= _REPETITIONS,
        f"{where} has {shown(pattern)}; a regular expression may have {_LONGEST} characters and "
        f"{_REPETITIONS} repetitions, none of a group.",
    )
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"{where} has {shown(pattern)}, which is not a regular expression: {error}."
        ) from error
