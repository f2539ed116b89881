"""Converts adapters to and from PEFT's files, adapter_config.json and adapter_model.safetensors.

PEFT stores A as [r, in] and B as [out, r], DoRA's magnitudes as [out], and the scalar head of a
sequence classifier as `score.weight` [1, width] without a bias.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from perl_jax.adapters.combine import average
from perl_jax.adapters.lora import LINEAR, Adapter, LoRAConfig
from perl_jax.errors import is_number, listed, require
from perl_jax.hub import naming, weights
from perl_jax.hub.peft_settings import check_settings
from perl_jax.models.config import ModelConfig
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import files, trees

# The file in which `perl-jax export` records a head's offset and role.
OFFSET_FILE = "perl_jax_reward.json"
_PREFIX = "base_model.model."
_HEAD = _PREFIX + "score.weight"
_PARTS = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}


@dataclasses.dataclass(frozen=True)
class _Linear:
    """A projection.

    Attributes:
        path: Its path in a base tree: layers/attention/q.
        module: Its path in a layer of the checkpoint: self_attn.q_proj.
        shape: The kernel's shape in one layer, (in, out).
    """

    path: str
    module: str
    shape: tuple[int, int]


def _linears(config: ModelConfig) -> dict[str, _Linear]:
    """Returns all projections of a layer by name (`q`, `k`, ...), in the order of `LINEAR`."""
    names, out = naming.module_names(config), {}
    for name, leaf in trees.named_leaves(LanguageModel(config).abstract_base()).items():
        path = name.removesuffix("/kernel")
        if path != name:
            out[path.rpartition("/")[2]] = _Linear(
                path, names[path.removeprefix("layers/")], leaf.shape[1:]
            )
    return {name: out[name] for name in LINEAR}


def to_peft(
    adapter: Adapter, config: ModelConfig, base_name: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns (the object of adapter_config.json, tensors by name) of a LoRA role.

    A head becomes `score.weight`, without its bias. Frozen pairs beneath the adapter (PiSSA,
    stacked adapters) are joined with the trained pair into one pair of the summed rank, so that
    PEFT needs no changed base.

    Args:
        adapter: The role.
        config: The base model's configuration.
        base_name: The base's folder or hub name, which PEFT loads.

    Raises:
        UserError: The role is fully tuned.
    """
    require(
        adapter.lora is not None,
        "A fully tuned role has no adapter; export it with --format merged.",
    )
    if adapter.under is not None:
        adapter = average([adapter], [1.0], config.layers)
    lora = adapter.lora_config
    modules = {name: linear.module for name, linear in _linears(config).items()}
    tensors = {}
    for name, leaf in trees.named_leaves(adapter.lora).items():
        _, _, projection, part = name.split("/")
        for index, array in zip(lora.adapted_layers(config.layers), np.asarray(leaf), strict=True):
            path = f"{_PREFIX}model.layers.{index}.{modules[projection]}.{_PARTS[part]}"
            tensors[path] = np.ascontiguousarray(array.T)
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if adapter.head is None else "SEQ_CLS",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "rank_pattern": {
            modules[p]: lora.rank_of(p) for p in lora.projections if lora.rank_of(p) != lora.rank
        },
        "alpha_pattern": {
            modules[p]: lora.alpha_of(p) for p in lora.projections if lora.alpha_of(p) != lora.alpha
        },
        "target_modules": [modules[p].rpartition(".")[2] for p in lora.projections],
        "use_rslora": lora.rank_stabilised,
        "use_dora": lora.dora,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    if lora.layers is not None:
        values["layers_to_transform"] = list(lora.adapted_layers(config.layers))
    if adapter.head is not None:
        values["modules_to_save"] = ["score"]
        tensors[_HEAD] = np.asarray(adapter.head["kernel"], np.float32)[None, :]
    return values, tensors


def read_peft(folder: pathlib.Path, config: ModelConfig) -> tuple[Adapter, float]:
    """Returns (the role in a PEFT folder, the constant to add to its scores).

    Args:
        folder: The folder with adapter_config.json and adapter_model.safetensors.
        config: The base model's configuration.

    Raises:
        UserError: A setting or a tensor is not supported or does not fit the base, or a file is
            damaged.
    """
    values = files.read_object(folder / "adapter_config.json")
    check_settings(values)
    stored = weights.read_header(folder / "adapter_model.safetensors")
    tensors = {name: weights.read_tensor(tensor) for name, tensor in stored.items()}
    return from_peft(values, tensors, config), head_facts(folder)["offset"]


def head_facts(folder: pathlib.Path) -> dict[str, Any]:
    """Returns {"offset": constant to add to the logit, "role": reward or value} of an exported
    head.

    Reads `OFFSET_FILE`, which `perl-jax export` writes. A folder without it is taken for a reward
    model with offset 0. Raises UserError if the file contains anything else.
    """
    path = folder / OFFSET_FILE
    found = files.read_json(path) if files.exists(path) else {"offset": 0.0, "role": "reward"}
    good = (
        isinstance(found, dict)
        and is_number(found.get("offset"))
        and found.get("role") in ("reward", "value")
    )
    require(good, f"{path} must hold an offset (a number) and a role (reward or value).")
    return found


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The tensors of one adapted module, as laid out in this package.

    Attributes:
        a: A, [in, r].
        b: B, [r, out].
        magnitude: DoRA's magnitudes [out], or None.
        scale: The factor of A B.
    """

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    scale: float


def from_peft(
    values: Mapping[str, Any], tensors: Mapping[str, np.ndarray], config: ModelConfig
) -> Adapter:
    """Returns the role that PEFT's files describe, in float32.

    Ranks and scales that are equal in all layers go into the LoRAConfig. If they differ between
    layers, the matrices are padded with zeros to the largest rank, and the scales are multiplied
    into B.

    Args:
        values: The object of adapter_config.json.
        tensors: The tensors of adapter_model.safetensors by name.
        config: The base model's configuration.

    Raises:
        UserError: A setting or a tensor is not supported, or does not fit the base; the message
            names each.
    """
    check_settings(values)
    pairs, head = _pairs(values, tensors, config)
    projections = [p for p in LINEAR if any(target == p for _, target in pairs)]
    layers = sorted({index for index, _ in pairs})
    dora = bool(values.get("use_dora"))
    require(
        not dora or len(pairs) == len(projections) * len(layers),
        "This DoRA adapter adapts different modules in different layers, which is not supported.",
    )
    even = len(pairs) == len(projections) * len(layers)
    for projection in projections:
        found = [pair for (_, target), pair in pairs.items() if target == projection]
        even = even and len({(pair.a.shape[1], pair.scale) for pair in found}) == 1
    ranks = {
        p: max(pair.a.shape[1] for (_, target), pair in pairs.items() if target == p)
        for p in projections
    }
    if even:
        scales = {p: pairs[layers[0], p].scale for p in projections}
        stabilised = bool(values.get("use_rslora"))
        alphas = {
            p: scales[p] * (math.sqrt(ranks[p]) if stabilised else ranks[p]) for p in projections
        }
    else:
        scales, stabilised, alphas = (
            dict.fromkeys(projections, 1.0),
            False,
            {p: float(r) for p, r in ranks.items()},
        )
    lora = _lora_config(values, projections, ranks, alphas, stabilised, layers, config)
    tree: dict = {}
    linears = _linears(config)
    for projection in projections:
        stacked = [
            _padded(pairs.get((index, projection)), ranks[projection], scales[projection])
            for index in layers
        ]
        present = next(parts for parts in stacked if parts is not None)
        stacked = [
            parts if parts is not None else {k: np.zeros_like(v) for k, v in present.items()}
            for parts in stacked
        ]
        for part in stacked[0]:
            trees.insert(
                tree,
                f"{linears[projection].path}/{part}",
                jnp.asarray(np.stack([parts[part] for parts in stacked])),
            )
    return Adapter(lora=tree, head=head, config=lora)


def _pairs(
    values: Mapping[str, Any], tensors: Mapping[str, np.ndarray], config: ModelConfig
) -> tuple[dict[tuple[int, str], _Pair], dict | None]:
    """Returns (the adapted modules' pairs by (layer, projection), the head).

    The head is None if there is no `score.weight`.

    Args:
        values: The object of adapter_config.json.
        tensors: The tensors of adapter_model.safetensors by name.
        config: The base model's configuration.

    Raises:
        UserError: Tensors do not fit the base; the message names all of them.
    """
    linears = _linears(config)
    projections = {linear.module: name for name, linear in linears.items()}
    parts = {suffix: part for part, suffix in _PARTS.items()}
    found: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    head, unknown = None, []
    layers = set(map(str, range(config.layers)))
    for name, array in tensors.items():
        match = re.fullmatch(
            rf"{re.escape(_PREFIX)}model\.layers\.(\d+)\.([a-z_.]+?)"
            rf"\.({'|'.join(map(re.escape, parts))})",
            name,
        )
        if name == _HEAD and array.shape == (1, config.width):
            head = {
                "kernel": jnp.asarray(array[0], jnp.float32),
                "bias": jnp.zeros((), jnp.float32),
            }
        elif match and match[2] in projections and match[1] in layers:
            found.setdefault((int(match[1]), projections[match[2]]), {})[parts[match[3]]] = (
                np.asarray(array, np.float32).T
            )
        else:
            unknown.append(name)
    require(
        not unknown,
        "adapter_model.safetensors has tensors that have no place in this base: "
        f"{listed(sorted(unknown))}.",
    )
    require(bool(found), "adapter_model.safetensors holds no LoRA pair.")
    pairs, problems = {}, []
    for (index, projection), leaves in sorted(found.items()):
        wanted = {"lora_a", "lora_b"} | ({"magnitude"} if values.get("use_dora") else set())
        module, (width, features) = (
            f"layers.{index}.{linears[projection].module}",
            linears[projection].shape,
        )
        if set(leaves) != wanted:
            problems.append(
                f"{module} has {', '.join(sorted(leaves))} where {', '.join(sorted(wanted))} belong"
            )
            continue
        a, b, magnitude = leaves["lora_a"], leaves["lora_b"], leaves.get("magnitude")
        if (
            a.ndim != 2
            or b.ndim != 2
            or (a.shape[0], b.shape[1]) != (width, features)
            or a.shape[1] != b.shape[0]
        ):
            problems.append(
                f"{module} has A {a.shape} and B {b.shape} for a weight {(width, features)}"
            )
            continue
        if magnitude is not None and magnitude.shape != (features,):
            problems.append(f"{module} has magnitudes {magnitude.shape} for {features} outputs")
            continue
        alpha = _by_pattern(
            values.get("alpha_pattern"), f"model.{module}", values.get("lora_alpha") or 8
        )
        rank = a.shape[1]
        scale = alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)
        pairs[index, projection] = _Pair(a, b, magnitude, scale)
    require(not problems, f"The adapter does not fit this base: {listed(problems, 12, '; ')}.")
    return pairs, head


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches a module's name, or its end after a dot
    (PEFT's rule).

    Args:
        patterns: Values by regular expression; None for no patterns.
        module: The module's name in the checkpoint.
        default: Returned if no pattern matches.
    """
    for pattern, value in (patterns or {}).items():
        # `check_settings` has refused patterns that could take for ever.
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _lora_config(
    values: Mapping[str, Any],
    projections: list[str],
    ranks: dict[str, int],
    alphas: dict[str, float],
    stabilised: bool,
    layers: list[int],
    config: ModelConfig,
) -> LoRAConfig:
    """Returns the LoRAConfig with the given ranks and alphas of the projections.

    The most common rank and alpha become the fields `rank` and `alpha`; the others are listed as
    exceptions.

    Args:
        values: The object of adapter_config.json, for DoRA and dropout.
        projections: The adapted projections.
        ranks: The rank of each.
        alphas: The alpha of each.
        stabilised: Whether the scale is alpha / sqrt(rank) instead of alpha / rank.
        layers: The adapted layers, increasing.
        config: The base model's configuration.
    """
    # The other values are exceptions.
    rank = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
    alpha = max(sorted(set(alphas.values())), key=list(alphas.values()).count)
    others = lambda found, general: ",".join(
        f"{p}={value:g}" for p, value in found.items() if value != general
    )
    return LoRAConfig(
        rank=rank,
        alpha=float(alpha),
        targets=",".join(projections),
        ranks=others(ranks, rank),
        alphas=",".join(f"{p}={value!r}" for p, value in alphas.items() if value != alpha),
        layers=None if layers == list(range(config.layers)) else ",".join(map(str, layers)),
        rank_stabilised=stabilised,
        dora=bool(values.get("use_dora")),
        dropout=float(values.get("lora_dropout") or 0.0),
    )


def _padded(pair: _Pair | None, rank: int, scale: float) -> dict[str, np.ndarray] | None:
    """Returns {"lora_a": [in, rank], "lora_b": [rank, out]} of a pair, with `magnitude` [out] for
    DoRA.

    The matrices are padded with zeros, and B is multiplied by pair.scale / scale.

    Args:
        pair: The pair of one module; None gives None.
        rank: The rank to pad to.
        scale: The scale that all layers will share.
    """
    if pair is None:
        return None
    room = rank - pair.a.shape[1]
    out = {
        "lora_a": np.pad(pair.a, ((0, 0), (0, room))),
        "lora_b": np.pad(pair.b * np.float32(pair.scale / scale), ((0, room), (0, 0))),
    }
    return out if pair.magnitude is None else out | {"magnitude": pair.magnitude}
