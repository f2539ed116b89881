"""A Hugging Face folder's safetensors <-> a base tree.

Only safetensors are read (no pickle), and nothing in the folder is executed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from perl_jax import config as config_lib
from perl_jax import trees
from perl_jax.config import UserError
from perl_jax.hf import families
from perl_jax.models.config import ModelConfig
from perl_jax.models.language_model import LanguageModel
from perl_jax.types import Tree

# Weights are read from disk in pieces of at most so many bytes.
_PIECE_BYTES = 2**26
# Dtypes that weights may be stored in.
STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def find_model(model: str) -> pathlib.Path:
    """The local folder of a model: a folder as it is, or a hub name fetched through the hub client.

    A hub name may pin a revision (branch, tag or commit): `owner/name@revision`. What was fetched
    before is found again without a network.
    """
    path = pathlib.Path(model).expanduser()
    if path.is_dir():
        return path
    config_lib.require(
        not path.is_absolute() and not model.startswith("."),
        f"There is no model folder {path}; --model takes a folder with config.json and safetensors, or a hub name.",
    )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = model.partition("@")
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja"]
    try:
        return pathlib.Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{model} is neither a local folder nor a model the hub can give: {reason}") from error


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies, from its file's header."""

    path: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def load_base(
    folder: pathlib.Path, config: ModelConfig, shardings: Mapping[str, Sharding] | None = None, ignore: Collection[str] = (),
    finish: Callable[[str, jax.Array], Tree] | None = None,
) -> Tree:  # fmt: skip
    """The base tree of a folder's safetensors, one file or several with an index.

    shardings: of each leaf by its name; None: the default device. ignore: tensors that may be there
    beside the base's. finish(name, leaf): what to keep of a leaf (its quantised form, say), called
    before the next one is read. Leaves take `config.param_dtype`.
    Every file's header is checked before anything is read: missing, extra, wrongly shaped and
    unreadable tensors are one error. Tensors then go one by one from disk to their place, and each
    process reads only its devices' parts: beyond what the devices hold, the host holds one tensor.
    """
    files = {name: stored for name, stored in stored_tensors(folder).items() if name not in ignore}
    abstract = LanguageModel(config).abstract_base()
    _check(folder, config, files, trees.named_leaves(abstract))
    default = SingleDeviceSharding(jax.local_devices()[0])
    place = lambda name: default if shardings is None else shardings[name]
    finish = finish or (lambda name, leaf: leaf)
    return trees.map_named(lambda name, spec: finish(name, _load_leaf(files, name, config, spec, place(name))), abstract)


def _check(folder: pathlib.Path, config: ModelConfig, files: Mapping[str, Stored], abstract: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """One UserError for everything in which the files do not fit the config."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, spec in abstract.items():
        shape = spec.shape[1:] if name.startswith("layers/") else spec.shape
        expected |= dict.fromkeys(families.tensor_names(name, config), shape[::-1] if families.transposed(name) else shape)
    ignored = {"lm_head.weight"} if config.tied_embeddings else set()
    ignored |= {name for name in files if name.endswith("rotary_emb.inv_freq")}
    problems = [f"missing {name}" for name in sorted(set(expected) - set(files))]
    problems += [f"unexpected {name}" for name in sorted(set(files) - set(expected) - ignored)]
    for name in sorted(set(expected) & set(files)):
        if files[name].shape != expected[name]:
            problems.append(f"{name} has shape {files[name].shape}, config.json asks for {expected[name]}")
        if files[name].dtype not in STORED:
            problems.append(f"{name} is stored as {files[name].dtype}, not as one of {', '.join(STORED)}")
    config_lib.require(not problems, f"The weights in {folder} do not fit its config.json: {'; '.join(problems)}.")


def _load_leaf(files: Mapping[str, Stored], name: str, config: ModelConfig, spec: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
    """One leaf at its place; a stacked one is filled layer by layer, in place.

    Tensors arrive as they are stored and are turned and cast by the devices: a transposed copy on
    the host takes several times as long.
    """
    tensors = families.tensor_names(name, config)
    turn = families.transposed(name)
    if not name.startswith("layers/"):
        whole = _read(files[tensors[0]], _turned(sharding) if turn else sharding)
        settle = lambda tensor: (tensor.T if turn else tensor).astype(spec.dtype)
        return whole if not turn and whole.dtype == spec.dtype else jax.jit(settle, donate_argnums=0, out_shardings=sharding)(whole)
    layer_sharding = _without_layers(sharding)
    stack = jax.jit(functools.partial(jnp.zeros, spec.shape, spec.dtype), out_shardings=sharding)()
    fill = jax.jit(functools.partial(_fill, turn), donate_argnums=0, out_shardings=sharding)
    for index, tensor in enumerate(tensors):
        # Waiting here keeps the next tensor from being read before this one is let go.
        stack = jax.block_until_ready(fill(stack, _read(files[tensor], _turned(layer_sharding) if turn else layer_sharding), index))
    return stack


def _fill(turn: bool, stack: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
    layer = (layer.T if turn else layer).astype(stack.dtype)
    return jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)


def _without_layers(sharding: Sharding) -> Sharding:
    """A stacked leaf's sharding without its first dimension, which no mesh axis splits."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


def _turned(sharding: Sharding) -> Sharding:
    """A matrix's sharding for its transpose."""
    if isinstance(sharding, NamedSharding):
        rows, columns = (*sharding.spec, None, None)[:2]
        return NamedSharding(sharding.mesh, PartitionSpec(columns, rows))
    return sharding


def _read(stored: Stored, sharding: Sharding) -> jax.Array:
    """A tensor as it is stored, over devices; each process reads its devices' parts."""
    return jax.make_array_from_callback(stored.shape, sharding, functools.partial(_read_part, stored))


def _read_part(stored: Stored, index: tuple[slice, ...]) -> np.ndarray:
    """One device's part of a tensor.

    Read in pieces, and the file opened anew for each: pages of an open file stay mapped and would
    count as this process's memory.
    """
    bounds = [part.indices(size)[:2] for part, size in zip(index, stored.shape, strict=True)]
    out = np.empty([stop - start for start, stop in bounds], jnp.dtype(STORED[stored.dtype]))
    row_bytes = max(1, math.prod(out.shape[1:]) * out.itemsize)
    step = max(1, _PIECE_BYTES // row_bytes)
    (first, last), rest = bounds[0], tuple(slice(*bound) for bound in bounds[1:])
    for start in range(first, last, step):
        stop = min(start + step, last)
        with safe_open(stored.path, framework="numpy") as handle:
            out[start - first : stop - first] = handle.get_slice(stored.name)[(slice(start, stop), *rest)]
    return out


def read_tensor(stored: Stored) -> np.ndarray:
    """A whole tensor as it is stored."""
    with safe_open(stored.path, framework="numpy") as handle:
        return handle.get_tensor(stored.name)


def stored_tensors(folder: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of a folder's safetensors, from the headers alone."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    # As in transformers, a single file comes before an index that an earlier save may have left.
    if index.exists() and not single.exists():
        found = config_lib.read_json(index).get("weight_map")
        config_lib.require(bool(found), f"{index} has no weight_map.")
        paths = [folder / file for file in sorted(set(found.values()))]
    else:
        paths = [single]
    return {name: stored for path in paths for name, stored in read_header(path).items()}


def read_header(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of one safetensors file; UserError when it is absent or not whole."""
    config_lib.require(path.exists(), f"There is no file {path}; weights are read from safetensors only.")
    found = {}
    try:
        with safe_open(path, framework="numpy") as handle:
            for name in handle.keys():
                part = handle.get_slice(name)
                found[name] = Stored(path, name, tuple(part.get_shape()), part.get_dtype())
    except SafetensorError as error:
        raise UserError(f"{path} is not a complete safetensors file: {error}.") from error
    return found


def save_base(folder: pathlib.Path, config: ModelConfig, base: Tree, token_ids: Mapping[str, int | None]) -> None:
    """Writes `config.json` and `model.safetensors` so that transformers loads the same model."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, leaf in trees.named_leaves(base).items():
        array = np.asarray(leaf).astype(jnp.dtype(config.param_dtype))
        parts = list(array) if name.startswith("layers/") else [array]
        for tensor, part in zip(families.tensor_names(name, config), parts, strict=True):
            tensors[tensor] = np.ascontiguousarray(part.T if families.transposed(name) else part)
    temporary = folder / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")
    text = json.dumps(families.llama_json(config, token_ids), indent=1) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
