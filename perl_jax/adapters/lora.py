"""Low-rank adapters: their configuration, weights, initial values, sums and merging.

LoRA (Hu et al. 2021, arXiv 2106.09685, eq. 3):  h = x W + s (x A) B,  s = alpha / R. A [in, R]
starts random and B [R, out] starts at zero, so a fresh adapter gives exactly the base's outputs.

Each variant is a field of `LoRAConfig`:
    rank-stabilised  s = alpha / sqrt(R) (Kalajdzievski 2023, arXiv 2312.03732)
    DoRA             h = m / ||W + s A B||_out * x (W + s A B) with a trained magnitude m; the norm
                     is a constant in the gradient (Liu et al. 2024, arXiv 2402.09353, eq. 5 and
                     section 4.3)
    PiSSA            s A B starts as the part of W with the largest singular values, and a frozen
                     pair subtracts the same (Meng et al. 2024, arXiv 2404.02948). So the outputs
                     start as the base's, and the base itself is not changed.
    A zero           A starts at zero and B random: exactly the base's outputs too, and more stable
                     at large learning rates
LoRA+ (a larger learning rate for B) is a setting of the optimizer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from perl_jax import errors
from perl_jax.adapters.quantise import dense, is_quantised
from perl_jax.errors import require
from perl_jax.runtime import precision, trees
from perl_jax.types import Tree

TUNINGS = ("lora", "full")
ATTENTION = ("q", "k", "v", "o")
FEED_FORWARD = ("gate", "up", "down")
LINEAR = ATTENTION + FEED_FORWARD
TARGET_GROUPS: Mapping[str, tuple[str, ...]] = {"attention": ATTENTION, "all-linear": LINEAR}
INITS = ("b-zero", "a-zero", "pissa")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which projections have an adapter, and its rank, scale and variant.

    Attributes:
        rank: R, the inner width of an adapter.
        alpha: The adapter's output is scaled by alpha / rank.
        targets: attention (q, k, v, o: the paper's choice), all-linear (attention and feed-forward
            projections), or a comma-separated list of projection names such as q,v.
        ranks: Ranks of single targets that replace rank, such as q=4,down=32.
        alphas: Alphas of single targets that replace alpha, such as q=8.
        layers: Adapt these layers only, such as 8-15 or 0,2,4-7. Layers below the lowest one have
            no backward pass. None: all layers.
        rank_stabilised: Scale by alpha / sqrt(rank).
        dora: Train the magnitude of each output separately from its direction (DoRA).
        init: b-zero (A random), a-zero (B random), or pissa (from the weight's singular values).
        dropout: Dropout rate on the adapter's input, in training only.
        dtype: Dtype of the adapter's weights.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = "attention"
    ranks: str = ""
    alphas: str = ""
    layers: str | None = None
    rank_stabilised: bool = False
    dora: bool = False
    init: Literal["b-zero", "a-zero", "pissa"] = "b-zero"
    dropout: float = 0.0
    dtype: Literal["float32"] = "float32"

    def __post_init__(self) -> None:
        errors.positive("lora.rank", self.rank)
        require(
            isinstance(self.rank, int), f"lora.rank is {self.rank!r}; it must be a whole number."
        )
        errors.positive("lora.alpha", self.alpha)
        require(0 <= self.dropout < 1, f"lora.dropout is {self.dropout!r}; it must lie in [0, 1).")
        errors.one_of("lora.dtype", self.dtype, ("float32",))
        errors.one_of("lora.init", self.init, INITS)
        unknown = [name for name in self.projections if name not in LINEAR]
        require(
            not unknown and len(self.projections) > 0,
            f"lora.targets is {self.targets!r}; it must be attention, all-linear, or names out of "
            f"{', '.join(LINEAR)}.",
        )
        for target in self.projections:
            rank = _pattern("ranks", self.ranks).get(target, self.rank)
            errors.whole(f"lora.ranks of {target}", int(rank) if rank == int(rank) else rank)
            errors.positive(f"lora.alphas of {target}", self.alpha_of(target))
        for field, pattern in (("ranks", self.ranks), ("alphas", self.alphas)):
            outside = sorted(set(_pattern(field, pattern)) - set(self.projections))
            require(
                not outside,
                f"lora.{field} names {', '.join(outside)}; the targets are "
                f"{', '.join(self.projections)}.",
            )
        _layer_numbers(self.layers)
        require(
            not (self.dora and self.init == "pissa"),
            "lora.dora and lora.init pissa cannot be combined.",
        )

    def check_read(self) -> None:
        """Raises UserError if `rank` or `alpha` is set although no target uses it.

        No target does if `ranks` or `alphas` names every target.
        """
        for field, patterns in (("rank", "ranks"), ("alpha", "alphas")):
            value, named = getattr(self, field), _pattern(patterns, getattr(self, patterns))
            read = value == errors.default_of(LoRAConfig, field) or set(self.projections) - set(
                named
            )
            require(
                bool(read),
                f"lora.{field} is {value!r}, which no target has: lora.{patterns} names them all; "
                "leave it out.",
            )

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the adapted projections."""
        if self.targets in TARGET_GROUPS:
            return TARGET_GROUPS[self.targets]
        return tuple(name.strip() for name in self.targets.split(","))

    def rank_of(self, target: str) -> int:
        """Returns the rank R of one target."""
        return int(_pattern("ranks", self.ranks).get(target, self.rank))

    def alpha_of(self, target: str) -> float:
        """Returns the alpha of one target."""
        return _pattern("alphas", self.alphas).get(target, self.alpha)

    def scale_of(self, target: str) -> float:
        """Returns a target's scale s: alpha / rank, or alpha / sqrt(rank) if rank-stabilised."""
        rank = self.rank_of(target)
        return self.alpha_of(target) / (math.sqrt(rank) if self.rank_stabilised else rank)

    @property
    def scaling_rule(self) -> str:
        """The formula of the scale, as written into an artefact's record."""
        return "alpha / sqrt(rank)" if self.rank_stabilised else "alpha / rank"

    def adapted_layers(self, layers: int) -> tuple[int, ...]:
        """Returns the indices of the adapted layers in a model of `layers` layers, in rising order.

        Raises UserError for an index that the model does not have.
        """
        if self.layers is None:
            return tuple(range(layers))
        numbers = _layer_numbers(self.layers)
        require(
            numbers[-1] < layers,
            f"lora.layers is {self.layers!r}; the model has layers 0 to {layers - 1}.",
        )
        return numbers

    def restricted(self, names: Sequence[str]) -> LoRAConfig:
        """Returns the config with only the targets that are in `names`; one of them must be."""
        kept = [target for target in self.projections if target in names]
        numbers = {"ranks": self.rank_of, "alphas": self.alpha_of}
        return dataclasses.replace(
            self,
            targets=",".join(kept),
            **{
                field: ",".join(f"{name}={of(name)}" for name in kept)
                for field, of in numbers.items()
            },
        )

    def stack_index(self, layer: int) -> int | None:
        """Returns a layer's index in the adapter's stacked leaves; None: it has no adapter."""
        numbers = _layer_numbers(self.layers)
        if self.layers is None:
            return layer
        return numbers.index(layer) if layer in numbers else None


def _pattern(field: str, text: str) -> dict[str, float]:
    """Parses `q=4,down=32` into {"q": 4.0, "down": 32.0}; raises UserError for other text."""
    out = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        good = math.isfinite(number) and name.strip() not in out
        require(good, f"lora.{field} is {text!r}; it must look like q=4,down=32.")
        out[name.strip()] = number
    return out


def _layer_numbers(text: str | None) -> tuple[int, ...]:
    """Parses `0,2,4-7` into (0, 2, 4, 5, 6, 7); None gives ()."""
    return errors.numbers("lora.layers", text, "8-15 or 0,2,4-7")


@flax.struct.dataclass
class Adapter:
    """The weights that turn the base into a role; they are what is trained and saved.

    Attributes:
        lora: LoRA leaves by module path, stacked over the adapted layers: a_LDR, b_LRF and, for
            DoRA, m_LF. None: no LoRA.
        head: Scalar head of a reward or value model: {kernel_D, bias}. None: no head.
        weights: Full tuning only: all weights of the model; they replace the base's.
        under: Frozen low-rank pairs that are added beneath `lora`: an earlier adapter that training
            continues on top of, or what PiSSA subtracts. They cover all layers and include their
            scale in B. They are never differentiated. None: no such pairs.
        config: Config of `lora` (static). None: no LoRA.
    """

    lora: Tree | None = None
    head: Tree | None = None
    weights: Tree | None = None
    under: Tree | None = None
    config: LoRAConfig | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def lora_config(self) -> LoRAConfig:
        """The config of `lora`; raises ValueError for a role without LoRA."""
        if self.config is None:
            raise ValueError("a role without LoRA has no LoRA config")
        return self.config


def trainable(adapter: Adapter) -> Adapter:
    """Returns the part that is differentiated and that optimizers update: all but `under`."""
    return dataclasses.replace(adapter, under=None)


def under_ranks(under: Tree | None) -> dict[str, int] | None:
    """Returns the rank of the frozen pairs of each projection, keyed by projection name."""
    if under is None:
        return None
    return {
        _target(name): leaf.shape[-1]
        for name, leaf in trees.named_leaves(under).items()
        if name.endswith("_a")
    }


def init_lora(
    key: jax.Array,
    abstract: Tree,
    config: LoRAConfig,
    kernels: Mapping[str, Tree],
    adapted_layers: Sequence[int] = (),
) -> Tree:
    """Returns the initial LoRA leaves of an adapter.

    With b-zero and a-zero, one of A and B is zero and the other uniform in +-1/sqrt(its input
    width). That is Kaiming-uniform with a = sqrt(5), the usual choice in LoRA code (the papers do
    not state one).

    Args:
        key: Random key. Each leaf's draw depends on the key and the leaf's path only.
        abstract: Shapes and dtypes of the leaves, a nested dict by module path.
        config: The adapter's config.
        kernels: The base's kernels by module path, stacked over all layers, dense or quantised.
            DoRA and PiSSA read them, one layer at a time.
        adapted_layers: Indices of the adapted layers; DoRA and PiSSA read these layers of
            `kernels`.
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
    """Returns function(kernel_DF) for layer `index` of a stacked kernel, which may be quantised.

    Only that layer is made dense and float32.
    """
    kernel_DF = jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), kernel_LDF
    )
    return function(dense(kernel_DF).astype(jnp.float32))


def initial_value_function(config: LoRAConfig, module: str) -> Callable[[jax.Array], Tree] | None:
    """Returns the function from a layer's float32 kernel to the initial values that depend on it.

    PiSSA: {lora_a, lora_b}; DoRA: the magnitudes. None: no initial value depends on the kernel.
    """
    target = _target(f"{module}/")
    if config.init == "pissa":
        return _pissa_function(config, target)
    return _column_norms if config.dora else None


def _pissa_function(config: LoRAConfig, target: str) -> Callable[[jax.Array], Tree]:
    """Returns the function from a layer's float32 kernel to PiSSA's {lora_a, lora_b}."""
    return functools.partial(
        singular_pair, rank=config.rank_of(target), scale=config.scale_of(target)
    )


def _column_norms(kernel_DF: jax.Array) -> jax.Array:
    """Returns the norm of each output's weights, [F]."""
    return jnp.linalg.norm(kernel_DF, axis=-2)


def singular_pair(kernel_DF: jax.Array, rank: int, scale: float) -> dict[str, jax.Array]:
    """Returns PiSSA's initial A = U sqrt(S) and B = sqrt(S) V^T / s (eq. 2 and 3 of its paper).

    U S V^T is the kernel's singular value decomposition, cut to its `rank` largest singular values;
    s is `scale`.
    """
    u, s, vt = jnp.linalg.svd(kernel_DF, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return {"lora_a": u[:, :rank] * root[None, :], "lora_b": root[:, None] * vt[:rank, :] / scale}


def _pissa(
    config: LoRAConfig, module: str, kernel_LDF: Tree, adapted_layers: Sequence[int]
) -> dict[str, jax.Array]:
    """Returns PiSSA's initial {lora_a, lora_b} of one module, stacked over the adapted layers.

    Raises UserError if the rank exceeds a side of the kernel.
    """
    *_, target = module.split("/")
    rank, most = config.rank_of(target), min(jax.eval_shape(dense, kernel_LDF).shape[-2:])
    require(
        rank <= most,
        f"The lora.rank of {target} is {rank}; with lora.init pissa it can be {most} at most.",
    )
    return _over_layers(_pissa_function(config, target), kernel_LDF, adapted_layers)


def _target(name: str) -> str:
    """Returns the projection of a leaf's path: `q` for `layers/attention/q/lora_a`."""
    return name.split("/")[-2]


def frozen_pairs(adapter: Adapter, layers: int, factor: float = 1.0) -> Tree:
    """Returns an adapter's LoRA leaves in the form of `Adapter.under`.

    The leaves cover all `layers` layers (zeros where there is no adapter), and B includes the scale
    times `factor`. Raises UserError for DoRA, because its output is not a sum of base and adapter.
    """
    config = adapter.lora_config
    require(not config.dora, "A DoRA adapter cannot lie under another adapter.")
    adapted = jnp.array(config.adapted_layers(layers))
    out: dict = {}
    for name, leaf in trees.named_leaves(adapter.lora).items():
        leaf = leaf if name.endswith("lora_a") else leaf * (factor * config.scale_of(_target(name)))
        whole = jnp.zeros((layers, *leaf.shape[1:]), leaf.dtype).at[adapted].set(leaf)
        trees.insert(out, name.replace("lora_", "under_"), whole)
    return out


def summed_pairs(adapter: Adapter, layers: int) -> Tree:
    """Returns the pairs of `lora` and `under` together, in the form of `Adapter.under`."""
    own = [] if adapter.lora is None else [frozen_pairs(adapter, layers)]
    return _concatenated(own + ([] if adapter.under is None else [adapter.under]))


def stack(frozen: Adapter, fresh: Adapter, layers: int) -> Adapter:
    """Returns an adapter that trains `fresh` on top of `frozen`.

    Its output is the sum of both and of the frozen pairs under either. Raises UserError for DoRA.
    """
    parts = [summed_pairs(frozen, layers)] + ([] if fresh.under is None else [fresh.under])
    require(not fresh.lora_config.dora, "A DoRA adapter cannot go on top of another adapter.")
    return dataclasses.replace(fresh, under=_concatenated(parts))


def _concatenated(parts: Sequence[Tree]) -> Tree:
    """Returns pairs whose sum is that of all parts: pairs concatenated along the rank."""
    out: dict = {}
    names = dict.fromkeys(name for part in parts for name in trees.named_leaves(part))
    for name in names:
        leaves = [found[name] for found in map(trees.named_leaves, parts) if name in found]
        trees.insert(out, name, jnp.concatenate(leaves, axis=-1 if name.endswith("_a") else -2))
    return out


def average(adapters: Sequence[Adapter], weights: Sequence[float], layers: int) -> Adapter:
    """Returns an adapter whose update is sum_i w_i s_i A_i B_i, and whose head is sum_i w_i head_i.

    For weight-averaged reward models (Rame et al. 2024, arXiv 2401.12187). The average is exact:
    the pairs are concatenated along the rank, so the new rank is the sum of ranks, and the scale is
    1. Averaging A and B separately would add cross terms A_i B_j.

    Args:
        adapters: LoRA adapters, all with a head or all without.
        weights: w_i, one per adapter.
        layers: Number of layers of the model.

    Raises UserError for DoRA, for full tuning, and if only some adapters have a head.
    """
    require(
        len(adapters) == len(weights) > 0,
        f"An average needs one weight for each adapter; there are {len(weights)} weights and "
        f"{len(adapters)} adapters.",
    )
    require(
        all(a.lora is not None for a in adapters),
        "An average needs LoRA adapters; a fully tuned role has none.",
    )
    heads = [a.head for a in adapters]
    require(
        len({h is None for h in heads}) == 1,
        "Adapters with and without a scalar head cannot be averaged.",
    )
    parts = []
    for adapter, weight in zip(adapters, weights, strict=True):
        parts.append(frozen_pairs(adapter, layers, weight))
        if adapter.under is not None:
            scaled = trees.map_named(
                lambda name, leaf: leaf * weight if name.endswith("_b") else leaf, adapter.under
            )
            parts.append(scaled)
    lora: dict = {}
    for name, leaf in trees.named_leaves(_concatenated(parts)).items():
        trees.insert(lora, name.replace("under_", "lora_"), leaf)
    ranks = {
        _target(name): leaf.shape[-1]
        for name, leaf in trees.named_leaves(lora).items()
        if name.endswith("_a")
    }
    largest = max(ranks.values())
    each = ",".join(f"{name}={rank}" for name, rank in ranks.items() if rank != largest)
    config = LoRAConfig(
        rank=largest,
        alpha=float(largest),
        targets=",".join(n for n in LINEAR if n in ranks),
        ranks=each,
        alphas=each,
    )
    head = (
        None
        if heads[0] is None
        else jax.tree.map(
            lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *heads
        )
    )
    return Adapter(lora=lora, head=head, config=config)


def init_head(key: jax.Array | None, width: int) -> Tree:
    """Returns a scalar head: kernel_D ~ N(0, 1/sqrt(D+1)), bias 0.

    Source: Stiennon et al. 2020, appendix C.

    Args:
        key: Random key. None: a zero kernel, so that a value model predicts 0 at the start.
        width: D, the width of the model.
    """
    kernel = jnp.zeros((width,), jnp.float32)
    if key is not None:
        kernel = jax.random.normal(key, (width,), jnp.float32) / math.sqrt(width + 1)
    return {"kernel": kernel, "bias": jnp.zeros((), jnp.float32)}


def output_norms(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Returns ||W + s A B|| of each output, float32 [..., F], without forming the [D, F] sum.

    The square is ||W||^2 + 2 s sum_r (A^T W)_r B_r + s^2 B^T (A^T A) B, an F-vector each.
    """
    kernel = kernel.astype(jnp.float32)
    cross = jnp.sum(precision.einsum("...dr,...df->...rf", a, kernel) * b, axis=-2)
    gram = precision.einsum("...dr,...dq->...rq", a, a)
    square = jnp.sum(b * precision.einsum("...rq,...qf->...rf", gram, b), axis=-2)
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=-2) + 2 * scale * cross + scale**2 * square)


def merge(base: Tree, adapter: Adapter) -> Tree:
    """Returns a copy of the base with the adapter in its kernels: W + s A B (DoRA: rescaled).

    The sum is formed in float32 and rounded to the base's dtype. For a fully tuned role the result
    is its own weights, and without low-rank leaves it is the base itself. The arguments are not
    changed. Do not merge into a merged copy: repeated merging in bfloat16 accumulates rounding
    errors. Raises UserError for a quantised base, whose levels cannot hold the sum.
    """
    if adapter.weights is not None:
        return adapter.weights
    if adapter.lora is None and adapter.under is None:
        return base
    require(
        not any(is_quantised(leaf) for leaf in jax.tree.leaves(base, is_leaf=is_quantised)),
        "An adapter cannot be merged into a quantised base; load the base without --quantise.kind.",
    )
    changed = adapted_modules(adapter)

    def merged(name: str, weight: jax.Array) -> jax.Array:
        """Returns the base's leaf at path `name`, with the adapter in it."""
        module = name.removesuffix("/kernel")
        if module not in changed:
            return weight
        layers = [
            merged_kernel(adapter, module, index, kernel)
            for index, kernel in enumerate(weight.astype(jnp.float32))
        ]
        return jnp.stack(layers).astype(weight.dtype)

    return trees.map_named(merged, base)


def adapted_modules(adapter: Adapter) -> set[str]:
    """Returns the paths of the modules whose kernel an adapter changes: `layers/attention/q`."""
    parts = [part for part in (adapter.lora, adapter.under) if part is not None]
    return {name.rpartition("/")[0] for part in parts for name in trees.named_leaves(part)}


def merged_kernel(adapter: Adapter, module: str, layer: int, kernel_DF: jax.Array) -> jax.Array:
    """Returns one layer's kernel with the adapter in it, float32 [D, F].

    Args:
        adapter: The adapter.
        module: Path of the module, `layers/attention/q`.
        layer: Index of the layer.
        kernel_DF: The layer's kernel, float32.
    """
    if adapter.under is not None:
        under = trees.named_leaves(adapter.under)
        if f"{module}/under_a" in under:
            kernel_DF = kernel_DF + precision.matmul(
                under[f"{module}/under_a"][layer], under[f"{module}/under_b"][layer]
            )
    lora = {} if adapter.lora is None else trees.named_leaves(adapter.lora)
    if f"{module}/lora_a" not in lora:
        return kernel_DF
    *_, target = module.split("/")
    config = adapter.lora_config
    index = config.stack_index(layer)
    if index is None:
        return kernel_DF
    moved_DF = kernel_DF + config.scale_of(target) * precision.matmul(
        lora[f"{module}/lora_a"][index], lora[f"{module}/lora_b"][index]
    )
    if not config.dora:
        return moved_DF
    return (
        moved_DF * (lora[f"{module}/magnitude"][index] / jnp.linalg.norm(moved_DF, axis=0))[None, :]
    )
