"""Initial values of adapters and scalar heads, before training."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from perl_jax.adapters.lora import LoRAConfig, target_of
from perl_jax.adapters.quantise import dense
from perl_jax.errors import require
from perl_jax.runtime import trees
from perl_jax.types import Tree


def init_lora(
    key: jax.Array,
    abstract: Tree,
    config: LoRAConfig,
    kernels: Mapping[str, Tree],
    adapted_layers: Sequence[int] = (),
) -> Tree:
    """Returns the initial LoRA leaves of an adapter, as a tree like `abstract`.

    With b-zero and a-zero, one of A and B is zero and the other uniform in +-1/sqrt(its input
    width). That is Kaiming-uniform with a = sqrt(5), the usual choice in LoRA code (the papers do
    not state one).

    Args:
        key: Random key. Each leaf's draw depends on the key and the leaf's path only.
        abstract: Shapes and dtypes of the leaves, a nested dict by module path.
        config: The adapter's config.
        kernels: The base's kernels by module path, stacked over all layers, dense or quantised.
            DoRA and PiSSA read them, one layer at a time; may be empty for others.
        adapted_layers: Indices of the adapted layers; DoRA and PiSSA read these layers of
            `kernels`.

    Raises UserError if PiSSA's rank exceeds a side of a kernel.
    """

    pairs = (
        {
            module: _pissa(config, module, kernel, adapted_layers)
            for module, kernel in kernels.items()
        }
        if config.init == "pissa"
        else {}
    )

    def leaf(name: str, spec: jax.ShapeDtypeStruct) -> jax.Array:
        """Returns the initial values of the leaf at path `name`."""
        module, part = name.rsplit("/", 1)
        if module in pairs:
            return pairs[module][part]
        if part == "magnitude":
            return _over_layers(_column_norms, kernels[module], adapted_layers)
        if part == {"b-zero": "lora_b", "a-zero": "lora_a"}[config.init]:
            return jnp.zeros(spec.shape, spec.dtype)
        bound = 1.0 / math.sqrt(spec.shape[-2])
        # The key depends on the leaf's path, so adding a target does not change other draws.
        path_key = jax.random.fold_in(
            key, sum(ord(c) * 31**i for i, c in enumerate(name)) % (2**31)
        )
        return jax.random.uniform(path_key, spec.shape, spec.dtype, -bound, bound)

    return trees.map_named(leaf, abstract)


def _over_layers(
    function: Callable[[jax.Array], Tree], kernel_LDF: Tree, layers: Sequence[int]
) -> Tree:
    """Returns function(kernel_DF) of the listed layers of a stacked kernel, stacked again.

    Each layer runs as a program of its own. In one program with a loop, the compiler may convert
    the whole stack to float32 at once.

    Args:
        function: float32 kernel_DF -> a tree of arrays.
        kernel_LDF: Kernels of all layers, dense or quantised.
        layers: Indices of the layers.
    """
    found = [
        trees.block_on_cpu(apply_to_layer(function, kernel_LDF, jnp.int32(index)))
        for index in layers
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


@functools.partial(jax.jit, static_argnums=0)
def apply_to_layer(
    function: Callable[[jax.Array], Tree], kernel_LDF: Tree, index: jax.Array
) -> Tree:
    """Returns function(kernel_DF) for one layer of a stacked kernel.

    Only that layer is made dense and float32.

    Args:
        function: float32 kernel_DF -> a tree of arrays (static).
        kernel_LDF: Kernels of all layers, dense or quantised.
        index: Index of the layer, a scalar.
    """
    kernel_DF = jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), kernel_LDF
    )
    return function(dense(kernel_DF).astype(jnp.float32))


def initial_value_function(config: LoRAConfig, module: str) -> Callable[[jax.Array], Tree] | None:
    """Returns the function from a layer's float32 kernel to the initial values that depend on it.

    PiSSA: {lora_a, lora_b}; DoRA: the magnitudes [F]. None: no initial value depends on the kernel.

    Args:
        config: The adapter's config.
        module: Path of the module, `layers/attention/q`.
    """
    target = target_of(f"{module}/")
    if config.init == "pissa":
        return _pissa_function(config, target)
    return _column_norms if config.dora else None


def _pissa_function(config: LoRAConfig, target: str) -> Callable[[jax.Array], Tree]:
    """Returns the function from a layer's float32 kernel to PiSSA's {lora_a, lora_b}.

    Args:
        config: The adapter's config.
        target: Name of the projection, such as "q".
    """
    return functools.partial(
        singular_pair, rank=config.rank_of(target), scale=config.scale_of(target)
    )


def _column_norms(kernel_DF: jax.Array) -> jax.Array:
    """Returns the norm of each output's weights, [F]."""
    return jnp.linalg.norm(kernel_DF, axis=-2)


def singular_pair(kernel_DF: jax.Array, rank: int, scale: float) -> dict[str, jax.Array]:
    """Returns PiSSA's initial {lora_a: A, lora_b: B}; s A B is the kernel's largest part.

        A = U sqrt(S) [D, R],  B = sqrt(S) V^T / s [R, F]

    U S V^T is the kernel's singular value decomposition, cut to its R largest singular values.
    Source: Meng et al. 2024 (arXiv 2404.02948), equations 2 and 3; the division by s makes up for
    the adapter's scale.

    Args:
        kernel_DF: The kernel, float32.
        rank: R, at most the smaller side of the kernel.
        scale: s, the adapter's scale.
    """
    u, s, vt = jnp.linalg.svd(kernel_DF, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return {"lora_a": u[:, :rank] * root[None, :], "lora_b": root[:, None] * vt[:rank, :] / scale}


def _pissa(
    config: LoRAConfig, module: str, kernel_LDF: Tree, adapted_layers: Sequence[int]
) -> dict[str, jax.Array]:
    """Returns PiSSA's initial {lora_a, lora_b} of one module, stacked over the adapted layers.

    s A B is not taken out of the base's kernels: `LanguageModel.init_adapter` adds a frozen pair
    that subtracts it.

    Raises UserError if the rank exceeds a side of the kernel.

    Args:
        config: The adapter's config.
        module: Path of the module, `layers/attention/q`.
        kernel_LDF: Kernels of all layers, dense or quantised.
        adapted_layers: Indices of the adapted layers.
    """
    *_, target = module.split("/")
    rank, most = config.rank_of(target), min(jax.eval_shape(dense, kernel_LDF).shape[-2:])
    require(
        rank <= most,
        f"The lora.rank of {target} is {rank}; with lora.init pissa it can be {most} at most.",
    )
    return _over_layers(_pissa_function(config, target), kernel_LDF, adapted_layers)


def init_head(key: jax.Array | None, width: int) -> Tree:
    """Returns a scalar head {kernel [D], bias []}: kernel normal with variance 1/(D+1), bias 0.

    Source: Stiennon et al. 2020 (arXiv 2009.01325), appendix C.

    Args:
        key: Random key. None: a zero kernel, so that a value model predicts 0 at the start.
        width: D, the width of the model.
    """
    kernel = jnp.zeros((width,), jnp.float32)
    if key is not None:
        kernel = jax.random.normal(key, (width,), jnp.float32) / math.sqrt(width + 1)
    return {"kernel": kernel, "bias": jnp.zeros((), jnp.float32)}
