"""Reads and writes a model's weights as safetensors in Hugging Face's format.

Only safetensors are read (no pickle), and nothing in the folder is executed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from perl_jax.errors import UserError, listed, require, shown
from perl_jax.hub import config_json, naming
from perl_jax.models.config import ModelConfig
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import copies, files, trees
from perl_jax.runtime.faults import reason
from perl_jax.types import Tree

# Weights are read from disk in pieces of at most so many bytes, but at least one row.
_PIECE_BYTES = 2**24
# Rows of a strip in `_transposed`.
_STRIP = 128
# The least number of rows that `sampled_content` reads of a tensor (if it has as many).
_SAMPLED_ROWS = 16
# (first index, last index + 1) of a part in one dimension.
Bounds = tuple[int, int]
# Dtypes that weights may be stored in: safetensors' name -> NumPy's.
STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def find_model(model: str) -> pathlib.Path:
    """Returns the local folder of a model: a folder as given, a copy of a folder in a bucket, or a
    hub name downloaded by the hub client.

    A model of the hub that was downloaded before is found without a network.

    Args:
        model: A folder on a disk or in a bucket, or a hub name, which may pin a revision (branch,
            tag or commit): `owner/name@revision`.

    Raises:
        UserError: There is no such model.
    """
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja"]
    if files.is_remote(model):
        return copies.local_copy(model, [*patterns, "*.txt"])
    path = files.local(model, "model")
    if files.is_folder(path):
        return path
    require(
        not path.is_absolute() and not model.startswith("."),
        f"There is no model folder {path}; --model takes a folder with config.json and "
        "safetensors, or a hub name.",
    )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = model.partition("@")
    try:
        found = snapshot_download(name, revision=revision or None, allow_patterns=patterns)
        return files.local(found, "model")
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and reason(error):
            raise UserError(
                f"{model} cannot be kept in the hub's cache: {error.filename or 'a file'} cannot "
                f"be used: {reason(error)}. HF_HOME names another folder for the cache."
            ) from error
        raise UserError(
            f"{model} is neither a local folder nor a model that the hub provides: "
            f"{_hub_reason(name, error)}"
        ) from error


# The environment variable with the hub's access token.
TOKEN = "HF_TOKEN"


def _hub_reason(name: str, error: Exception) -> str:
    """Returns why the hub gave no model, and what to do, as the end of a sentence.

    Args:
        name: The model's name.
        error: What the hub's client raised.
    """
    from huggingface_hub import errors

    token = f"{TOKEN} is set" if os.environ.get(TOKEN) else f"{TOKEN} is not set"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"it is gated. Accept its terms at https://huggingface.co/{name}, and set {TOKEN} to a "
            f"token of an account that did ({token})."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision (a branch, tag or commit after @)."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is none of this name, or it is private. Check the name, and for a private "
            f"model set {TOKEN} to a token that may read it ({token})."
        )
    if status in (401, 403):
        return (
            f"the hub refused access ({status}). Set {TOKEN} to a valid token of an account that "
            f"may read it ({token})."
        )
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return (
            "it was not downloaded before, and the hub cannot be reached from here (no network, or "
            "HF_HUB_OFFLINE is set)."
        )
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file.

    Attributes:
        path: The file.
        name: The tensor's name in the file.
        shape: Its stored shape.
        dtype: Its dtype as safetensors spells it (a key of `STORED`).
    """

    path: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def load_base(
    folder: pathlib.Path,
    config: ModelConfig,
    shardings: Mapping[str, Sharding] | None = None,
    ignore: Collection[str] = (),
    finish: Callable[[str, jax.Array], Tree] | None = None,
) -> Tree:
    """Returns the base weights of a folder, from one safetensors file or several with an index.

    The headers of all files are checked before anything is read: missing, extra, wrongly shaped and
    unreadable tensors are reported in one error. Weights then go from disk to the devices piece by
    piece, and each process reads only its own devices' parts. The host's memory contains only a few
    pieces at a time. Leaves have the dtype `config.param_dtype`.

    Args:
        folder: The model's folder.
        config: The model's configuration.
        shardings: The sharding of each leaf by name; None uses the default device.
        ignore: Names of tensors that may be in the files but are not part of the base.
        finish: Maps (name, leaf) to what takes the leaf's place in the result, such as its
            quantised form; called before the next leaf is read. None keeps leaves unchanged.

    Raises:
        UserError: The weights do not fit the configuration, or a file is damaged.
    """
    stored = {name: found for name, found in stored_tensors(folder).items() if name not in ignore}
    abstract = LanguageModel(config).abstract_base()
    _check(folder, config, stored, trees.named_leaves(abstract))
    default = SingleDeviceSharding(jax.local_devices()[0])
    place = lambda name: default if shardings is None else shardings[name]
    finish = finish or (lambda name, leaf: leaf)
    return trees.map_named(
        lambda name, spec: finish(name, _load_leaf(stored, name, config, spec, place(name))),
        abstract,
    )


def _check(
    folder: pathlib.Path,
    config: ModelConfig,
    stored: Mapping[str, Stored],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    """Raises one UserError that lists every tensor in which the files do not fit the config.

    Args:
        folder: The model's folder, for the message.
        config: The model's configuration.
        stored: The tensors of the files by name.
        abstract: The shape and dtype of each base leaf by name.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for name, spec in abstract.items():
        shape: tuple[int, ...] = spec.shape[1:] if name.startswith("layers/") else spec.shape
        stored_shape = shape[::-1] if naming.transposed(name) else shape
        expected |= dict.fromkeys(naming.tensor_names(name, config), stored_shape)
    ignored = {"lm_head.weight"} if config.tied_embeddings else set()
    ignored |= {name for name in stored if name.endswith("rotary_emb.inv_freq")}
    problems = [f"missing {name}" for name in sorted(set(expected) - set(stored))]
    problems += [f"unexpected {name}" for name in sorted(set(stored) - set(expected) - ignored)]
    for name in sorted(set(expected) & set(stored)):
        if stored[name].shape != expected[name]:
            problems.append(
                f"{name} has shape {stored[name].shape}, config.json asks for {expected[name]}"
            )
        if stored[name].dtype not in STORED:
            problems.append(
                f"{name} is stored as {stored[name].dtype}, not as one of {', '.join(STORED)}"
            )
    require(
        not problems,
        f"The weights in {folder} do not fit its config.json: {listed(problems, 12, '; ')}.",
    )


def _load_leaf(
    stored: Mapping[str, Stored],
    name: str,
    config: ModelConfig,
    spec: jax.ShapeDtypeStruct,
    sharding: Sharding,
) -> jax.Array:
    """Returns one leaf on its devices.

    Each device's shard is filled with pieces of the files' tensors, read one at a time. A shard
    that several devices hold is read once.

    Args:
        stored: The tensors of the files by name.
        name: The leaf's name.
        config: The model's configuration.
        spec: The leaf's shape and dtype.
        sharding: The leaf's sharding.
    """
    tensors, turn, layered = (
        naming.tensor_names(name, config),
        naming.transposed(name),
        name.startswith("layers/"),
    )
    parts: dict[tuple[Bounds, ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(spec.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, spec.shape, strict=True))
        parts.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in parts.items():
        shape = tuple(stop - start for start, stop in bounds)
        copies = [jnp.zeros(shape, spec.dtype, device=device) for device in devices]
        for layer in range(*bounds[0]) if layered else (0,):
            for piece, offset in _pieces(
                stored[tensors[layer]], bounds[1:] if layered else bounds, turn
            ):
                start = (layer - bounds[0][0], *offset) if layered else offset
                # Wait, so that this piece is freed before the next one is read.
                copies = [
                    jax.block_until_ready(
                        write_piece(copy, piece[None] if layered else piece, start)
                    )
                    for copy in copies
                ]
        shards += copies
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, shards)


@functools.partial(jax.jit, donate_argnums=0)
def write_piece(whole: jax.Array, piece: jax.Array, start: tuple[jax.Array, ...]) -> jax.Array:
    """Returns a device's shard of a leaf with a piece written into it, converted to the shard's
    dtype.

    The buffer of `whole` is donated: the caller must not use it again.

    Args:
        whole: The device's shard.
        piece: The piece, of as many dimensions.
        start: The index in `whole` of the piece's first element.
    """
    return jax.lax.dynamic_update_slice(whole, piece.astype(whole.dtype), start)


def _pieces(
    stored: Stored, bounds: Sequence[Bounds], turn: bool
) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
    """Yields (piece, offset of its first element in the part) until a part of a tensor is complete.

    Args:
        stored: The tensor.
        bounds: The part's bounds in the leaf (after transposition).
        turn: Whether the stored tensor is the transpose of the leaf; pieces are then transposed.
    """
    (first, last), *others = bounds[::-1] if turn else bounds
    rest = [slice(*bound) for bound in others]
    # The file is opened anew for each piece: pages of an open file stay mapped and would count as
    # memory of this process.
    step = _piece_rows(
        [stop - start for start, stop in others], jnp.dtype(STORED[stored.dtype]).itemsize
    )
    for start in range(first, last, step):
        with safe_open(stored.path, framework="numpy") as handle:
            piece = handle.get_slice(stored.name)[(slice(start, min(start + step, last)), *rest)]
        _require_finite(stored, piece)
        offset = start - first
        yield (_transposed(piece), (0, offset)) if turn else (piece, (offset,) + (0,) * len(rest))


def _piece_rows(rest: Sequence[int], itemsize: int) -> int:
    """Returns how many rows of a tensor one piece holds: as many as fit into `_PIECE_BYTES`, at
    least one.

    Args:
        rest: The dimensions of one row.
        itemsize: Bytes of an element.
    """
    return max(1, _PIECE_BYTES // max(1, math.prod(rest) * itemsize))


def piece_shape(part: Sequence[int], turn: bool, itemsize: int) -> tuple[int, ...]:
    """Returns the shape of the largest piece with which a shard's part of one tensor is filled.

    Args:
        part: The part's shape as used (after transposition).
        turn: Whether the stored tensor is the transpose of the one used.
        itemsize: Bytes of a stored element.
    """
    rows, *rest = part[::-1] if turn else part
    step = min(rows, _piece_rows(rest, itemsize))
    return (*rest, step) if turn else (step, *rest)


def _transposed(piece_FD: np.ndarray) -> np.ndarray:
    """Returns the transpose [D, F] of a piece [F, D] as a new array, copied in strips that fit the
    CPU's cache.
    """
    # Copying in strips is three times as fast as one copy. As plain integers, because NumPy copies
    # bfloat16, a custom dtype, element by element.
    plain_FD = piece_FD.view(np.dtype(f"u{piece_FD.itemsize}"))
    turned_DF = np.empty(plain_FD.shape[::-1], plain_FD.dtype)
    for start in range(0, len(plain_FD), _STRIP):
        turned_DF[:, start : start + _STRIP] = plain_FD[start : start + _STRIP].T
    return turned_DF.view(piece_FD.dtype)


def read_tensor(stored: Stored) -> np.ndarray:
    """Returns a whole tensor in its stored dtype and layout.

    Raises UserError if it is stored in a dtype that is not read (`STORED`), or holds NaN or
    infinity.
    """
    require(
        stored.dtype in STORED,
        f"{stored.path}: {stored.name[:200]} is stored as {stored.dtype}, not as one of "
        f"{', '.join(STORED)}.",
    )
    with safe_open(stored.path, framework="numpy") as handle:
        tensor = handle.get_tensor(stored.name)
    _require_finite(stored, tensor)
    return tensor


def _require_finite(stored: Stored, piece: np.ndarray) -> None:
    """Raises UserError if a piece of a tensor holds NaN or infinity.

    Args:
        stored: The tensor, for the message.
        piece: Some of its elements, in a dtype of `STORED`.
    """
    # As integers, because NumPy is slow with bfloat16: all bits of the exponent are 1.
    mask = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}[stored.dtype]
    bits = np.ascontiguousarray(piece).view(f"u{piece.itemsize}")
    require(
        not bool(((bits & mask) == mask).any()),
        f"{stored.path}: {stored.name} holds NaN or infinity; the file is damaged.",
    )


def sampled_content(folder: pathlib.Path) -> dict[str, list]:
    """Returns {tensor name: [dtype, shape, digest of about `_SAMPLED_ROWS` of its rows]} of a
    model's files.

    It identifies a base in seconds, but does not notice every change of the weights.

    Args:
        folder: The model's folder.
    """
    found = {}
    by_path: dict[pathlib.Path, list[Stored]] = {}
    for stored in stored_tensors(folder).values():
        by_path.setdefault(stored.path, []).append(stored)
    for path, tensors in by_path.items():
        # Read with plain calls. Through the memory map of safetensors the first access to a page
        # costs more than a hundred reads.
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            for stored in tensors:
                begin, end = header[stored.name]["data_offsets"]
                # A vector is read whole; it is small.
                rows = stored.shape[0] if len(stored.shape) > 1 else 1
                size, digest = (end - begin) // max(rows, 1), hashlib.blake2b(digest_size=8)
                for row in range(0, rows, max(1, rows // _SAMPLED_ROWS)):
                    file.seek(8 + length + begin + row * size)
                    digest.update(file.read(size))
                found[stored.name] = [stored.dtype, list(stored.shape), digest.hexdigest()]
    return found


def stored_tensors(folder: pathlib.Path) -> dict[str, Stored]:
    """Returns all tensors of a model's safetensors by name, from the headers alone; raises
    UserError if a file is missing or incomplete.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    # As in transformers, a single file takes precedence over an index left by an earlier save.
    if files.exists(index) and not files.exists(single):
        found: Any = files.read_object(index).get("weight_map")
        require(isinstance(found, dict) and len(found) > 0, f"{index} has no weight_map.")
        for file in found.values():
            require(
                isinstance(file, str)
                and pathlib.PurePath(file).name == file
                and 0 < len(file) < 256,
                f"{index} has {shown(file)} in its weight_map; each value must be the name of a "
                "file in the same folder.",
            )
        paths = [folder / file for file in sorted(set(found.values()))]
    else:
        paths = [single]
    return {name: stored for path in paths for name, stored in read_header(path).items()}


def read_header(path: pathlib.Path) -> dict[str, Stored]:
    """Returns the tensors of one safetensors file by name; raises UserError if it is missing, no
    regular file, or incomplete.
    """
    require(files.exists(path), f"There is no file {path}; weights are read from safetensors only.")
    files.require_regular(path)
    found = {}
    try:
        with safe_open(path, framework="numpy") as handle:
            names = handle.keys()  # the handle itself cannot be iterated over
            for name in names:
                part = handle.get_slice(name)
                found[name] = Stored(path, name, tuple(part.get_shape()), part.get_dtype())
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a complete safetensors file: {str(error)[:300]}."
        ) from error
    return found


def save_base(
    folder: pathlib.Path, config: ModelConfig, base: Tree, token_ids: Mapping[str, int | None]
) -> None:
    """Writes `config.json` and `model.safetensors`, from which transformers loads the same model as
    a Llama model.

    Args:
        folder: The folder, made if it does not exist; the two files are replaced.
        config: The model's configuration; weights are written in `param_dtype`.
        base: The base weights, not quantised.
        token_ids: The ids by name: bos, eos and pad, each None if there is none.

    Raises:
        ValueError: A Llama config cannot express a setting.
    """
    files.make_folder(folder)
    tensors = {}
    for name, leaf in trees.named_leaves(base).items():
        array = np.asarray(leaf).astype(jnp.dtype(config.param_dtype))
        parts = list(array) if name.startswith("layers/") else [array]
        for tensor, part in zip(naming.tensor_names(name, config), parts, strict=True):
            tensors[tensor] = np.ascontiguousarray(part.T if naming.transposed(name) else part)
    temporary = folder / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    files.move(temporary, folder / "model.safetensors")
    text = json.dumps(config_json.llama_json(config, token_ids), indent=1) + "\n"
    files.write_atomically(folder / "config.json", text)
