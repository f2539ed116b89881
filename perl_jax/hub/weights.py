"""A Hugging Face folder's safetensors <-> a base tree.

Only safetensors are read (no pickle), and nothing in the folder is executed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from perl_jax import errors
from perl_jax.errors import UserError
from perl_jax.hub import families
from perl_jax.models.config import ModelConfig
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import files as files_lib
from perl_jax.runtime import trees
from perl_jax.types import Tree

# Weights are read from disk in pieces of at most so many bytes (one row at least).
_PIECE_BYTES = 2**24
_STRIP = 128
# Rows of each tensor that `sampled_content` reads, at least, where there are as many.
_SAMPLED_ROWS = 16
# First index of a part and the one after its last, in one dimension.
Bounds = tuple[int, int]
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
    errors.require(
        not path.is_absolute() and not model.startswith("."),
        f"There is no model folder {path}; --model takes a folder with config.json and "
        "safetensors, or a hub name.",
    )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = model.partition("@")
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja"]
    try:
        return pathlib.Path(
            snapshot_download(name, revision=revision or None, allow_patterns=patterns)
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{model} is neither a local folder nor a model the hub can give: {reason}"
        ) from error


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies, from its file's header."""

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
    """The base tree of a folder's safetensors, one file or several with an index.

    shardings: of each leaf by its name; None: the default device. ignore: tensors that may be there
    beside the base's. finish(name, leaf): what to keep of a leaf (its quantised form, say), called
    before the next one is read. Leaves take `config.param_dtype`.
    Every file's header is checked before anything is read: missing, extra, wrongly shaped and
    unreadable tensors are one error. Weights then go piece by piece from disk to their place, and
    each process reads only its devices' parts: beyond what the devices hold, the host holds a few
    pieces.
    """
    files = {name: stored for name, stored in stored_tensors(folder).items() if name not in ignore}
    abstract = LanguageModel(config).abstract_base()
    _check(folder, config, files, trees.named_leaves(abstract))
    default = SingleDeviceSharding(jax.local_devices()[0])
    place = lambda name: default if shardings is None else shardings[name]
    finish = finish or (lambda name, leaf: leaf)
    return trees.map_named(
        lambda name, spec: finish(name, _load_leaf(files, name, config, spec, place(name))),
        abstract,
    )


def _check(
    folder: pathlib.Path,
    config: ModelConfig,
    files: Mapping[str, Stored],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    """One UserError for everything in which the files do not fit the config."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, spec in abstract.items():
        shape = spec.shape[1:] if name.startswith("layers/") else spec.shape
        expected |= dict.fromkeys(
            families.tensor_names(name, config), shape[::-1] if families.transposed(name) else shape
        )
    ignored = {"lm_head.weight"} if config.tied_embeddings else set()
    ignored |= {name for name in files if name.endswith("rotary_emb.inv_freq")}
    problems = [f"missing {name}" for name in sorted(set(expected) - set(files))]
    problems += [f"unexpected {name}" for name in sorted(set(files) - set(expected) - ignored)]
    for name in sorted(set(expected) & set(files)):
        if files[name].shape != expected[name]:
            problems.append(
                f"{name} has shape {files[name].shape}, config.json asks for {expected[name]}"
            )
        if files[name].dtype not in STORED:
            problems.append(
                f"{name} is stored as {files[name].dtype}, not as one of {', '.join(STORED)}"
            )
    errors.require(
        not problems, f"The weights in {folder} do not fit its config.json: {'; '.join(problems)}."
    )


def _load_leaf(
    files: Mapping[str, Stored],
    name: str,
    config: ModelConfig,
    spec: jax.ShapeDtypeStruct,
    sharding: Sharding,
) -> jax.Array:
    """One leaf at its place, filled piece by piece; devices that hold the same part share the
    reading.
    """
    tensors, turn, layered = (
        families.tensor_names(name, config),
        families.transposed(name),
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
                files[tensors[layer]], bounds[1:] if layered else bounds, turn
            ):
                start = (layer - bounds[0][0], *offset) if layered else offset
                # Waiting here keeps the next piece from being read before this one is let go.
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
    """A device's part of a leaf with one piece in it, from index `start` on; the part is
    donated.
    """
    return jax.lax.dynamic_update_slice(whole, piece.astype(whole.dtype), start)


def _pieces(
    stored: Stored, bounds: Sequence[Bounds], turn: bool
) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
    """Part of a tensor in pieces, turned where asked, each with its offset in the part.

    bounds: of the part in the tensor as it is used. The file is opened anew for each piece: pages
    of an open file stay mapped and would count as this process's memory.
    """
    (first, last), *others = bounds[::-1] if turn else bounds
    rest = [slice(*bound) for bound in others]
    step = _piece_rows(
        [stop - start for start, stop in others], jnp.dtype(STORED[stored.dtype]).itemsize
    )
    for start in range(first, last, step):
        with safe_open(stored.path, framework="numpy") as handle:
            piece = handle.get_slice(stored.name)[(slice(start, min(start + step, last)), *rest)]
        offset = start - first
        yield (_turned(piece), (0, offset)) if turn else (piece, (offset,) + (0,) * len(rest))


def _piece_rows(rest: Sequence[int], itemsize: int) -> int:
    """Rows of a piece; rest: the other dimensions of a row."""
    return max(1, _PIECE_BYTES // max(1, math.prod(rest) * itemsize))


def piece_shape(part: Sequence[int], turn: bool, itemsize: int) -> tuple[int, ...]:
    """The shape of the largest piece that a device's part of a tensor is filled with. part: as it
    is used; itemsize: as it is stored, in bytes.
    """
    rows, *rest = part[::-1] if turn else part
    step = min(rows, _piece_rows(rest, itemsize))
    return (*rest, step) if turn else (step, *rest)


def _turned(piece_FD: np.ndarray) -> np.ndarray:
    """The transpose, copied in strips that fit a processor's cache: three times as fast as at
    once.
    """
    # As plain integers: NumPy moves bfloat16, a type of its own to it, element by element.
    plain_FD = piece_FD.view(np.dtype(f"u{piece_FD.itemsize}"))
    turned_DF = np.empty(plain_FD.shape[::-1], plain_FD.dtype)
    for start in range(0, len(plain_FD), _STRIP):
        turned_DF[:, start : start + _STRIP] = plain_FD[start : start + _STRIP].T
    return turned_DF.view(piece_FD.dtype)


def read_tensor(stored: Stored) -> np.ndarray:
    """A whole tensor as it is stored."""
    with safe_open(stored.path, framework="numpy") as handle:
        return handle.get_tensor(stored.name)


def sampled_content(folder: pathlib.Path) -> dict[str, list]:
    """Of each tensor its dtype, shape and a digest of some of its rows, read from the files: tells
    bases apart in seconds.
    """
    found = {}
    by_path: dict[pathlib.Path, list[Stored]] = {}
    for stored in stored_tensors(folder).values():
        by_path.setdefault(stored.path, []).append(stored)
    for path, tensors in by_path.items():
        # Not through the memory that safetensors maps: a first touch of each page there costs more
        # than a hundred reads.
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            for stored in tensors:
                begin, end = header[stored.name]["data_offsets"]
                # A vector is read whole: a norm's scales are few.
                rows = stored.shape[0] if len(stored.shape) > 1 else 1
                size, digest = (end - begin) // max(rows, 1), hashlib.blake2b(digest_size=8)
                for row in range(0, rows, max(1, rows // _SAMPLED_ROWS)):
                    file.seek(8 + length + begin + row * size)
                    digest.update(file.read(size))
                found[stored.name] = [stored.dtype, list(stored.shape), digest.hexdigest()]
    return found


def stored_tensors(folder: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of a folder's safetensors, from the headers alone."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    # As in transformers, a single file comes before an index that an earlier save may have left.
    if index.exists() and not single.exists():
        found = files_lib.read_json(index).get("weight_map")
        errors.require(bool(found), f"{index} has no weight_map.")
        paths = [folder / file for file in sorted(set(found.values()))]
    else:
        paths = [single]
    return {name: stored for path in paths for name, stored in read_header(path).items()}


def read_header(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of one safetensors file; UserError when it is absent or not whole."""
    errors.require(
        path.exists(), f"There is no file {path}; weights are read from safetensors only."
    )
    found = {}
    try:
        with safe_open(path, framework="numpy") as handle:
            for name in handle.keys():  # noqa: SIM118  the handle cannot be iterated over
                part = handle.get_slice(name)
                found[name] = Stored(path, name, tuple(part.get_shape()), part.get_dtype())
    except SafetensorError as error:
        raise UserError(f"{path} is not a complete safetensors file: {error}.") from error
    return found


def save_base(
    folder: pathlib.Path, config: ModelConfig, base: Tree, token_ids: Mapping[str, int | None]
) -> None:
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
