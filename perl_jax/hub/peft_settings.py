"""Checks the settings of PEFT's adapter_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perl_jax.errors import require

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


def check_settings(values: Mapping[str, Any]) -> None:
    """Raises UserError for settings under which PEFT computes something that an `Adapter` cannot.

    Args:
        values: The object of adapter_config.json.
    """
    where = "adapter_config.json"
    require(
        values.get("peft_type") == "LORA",
        f"{where} has peft_type {values.get('peft_type')!r}; only 'LORA' is supported.",
    )
    for field, allowed in _ONLY_VALUE.items():
        found = values.get(field, allowed)
        require(
            not found or found == allowed,
            f"{where} has {field} {found!r}; only {allowed!r} is supported.",
        )
    unknown = sorted(
        name
        for name, value in values.items()
        if name not in _KNOWN and name not in _ONLY_VALUE and value
    )
    require(
        not unknown,
        f"{where} sets {', '.join(unknown)}, which is not supported and could change the outputs.",
    )
    begun = values.get("init_lora_weights", True)
    changed = isinstance(begun, str) and begun.lower().startswith(_BASE_CHANGING)
    require(
        not changed,
        f"{where} has init_lora_weights {begun!r}, which changes the base's weights; save it with "
        "PEFT's path_initial_model_for_weight_conversion.",
    )
    saved = set(values.get("modules_to_save") or ()) - {"score", "classifier"}
    require(not saved, f"{where} has modules_to_save {sorted(saved)}; only 'score' is supported.")
