"""Low-rank adapters: configuration, the tree that a role is, initialisation, algebra, merging.

LoRA (Hu et al. 2021, arXiv 2106.09685, eq. 3):  h = x W + s (x A) B,  s = alpha / R,
with A [in, R] random and B [R, out] zero, so that a fresh adapter is the base bit for bit.

Variants, each a field of `LoRAConfig`:
    rank-stabilised  s = alpha / sqrt(R) (Kalajdzievski 2023, arXiv 2312.03732)
    DoRA             h = m / ||W + s A B||_out * x (W + s A B), m trained, the norm a constant in
    the
                     gradient (Liu et al. 2024, arXiv 2402.09353, eq. 5 and section 4.3)
    PiSSA            A B starts as the largest singular part of W / s, which a frozen pair takes off
                     again (Meng et al. 2024, arXiv 2404.02948): the base stays the true base
    A zero           A zero and B random: the base bit for bit too, steadier for large rates
LoRA+ (a larger rate for B) is a setting of the optimizer.
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
    """Which projections get an adapter, how large it is, and of which kind.

    Attributes:
        rank: R, the inner width of an adapter.
        alpha: The adapter's output is scaled by alpha / rank.
        targets: attention (q, k, v, o: the paper's choice), all-linear (the feed-forward ones
            too), or a comma-separated list of projection names such as q,v.
        ranks: Other ranks of some targets, such as q=4,down=32.
        alphas: Other alphas of some targets, such as q=8.
        layers: Adapt these layers only, such as 8-15 or 0,2,4-7; nothing is computed backwards
            below the lowest. None: all.
        rank_stabilised: Scale by alpha / sqrt(rank).
        dora: Train each output's magnitude apart from its direction.
        init: b-zero (A random), a-zero (B random), or pissa (from the weight's singular values).
        dropout: On the adapter's input, in training only.
        dtype: Of the adapter's weights.
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
            errors.whole(f"lora.ranks of {target}", self.rank_of(target))
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
        """UserError for a rank or an alpha that no target has, because `ranks` or `alphas` names
        every target.
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
        """The adapted projections' names."""
        if self.targets in TARGET_GROUPS:
            return TARGET_GROUPS[self.targets]
        return tuple(name.strip() for name in self.targets.split(","))

    def rank_of(self, target: str) -> int:
        """A target's rank."""
        found = _pattern("ranks", self.ranks).get(target, self.rank)
        return int(found) if found == int(found) else found

    def alpha_of(self, target: str) -> float:
        """A target's alpha."""
        return _pattern("alphas", self.alphas).get(target, self.alpha)

    def scale_of(self, target: str) -> float:
        """s of a target: alpha / rank, or alpha / sqrt(rank)."""
        rank = self.rank_of(target)
        return self.alpha_of(target) / (math.sqrt(rank) if self.rank_stabilised else rank)

    @property
    def scaling_rule(self) -> str:
        """In words, for the artefact's record."""
        return "alpha / sqrt(rank)" if self.rank_stabilised else "alpha / rank"

    def adapted_layers(self, layers: int) -> tuple[int, ...]:
        """Indices of the adapted ones among so many layers; UserError when one is outside."""
        if self.layers is None:
            return tuple(range(layers))
        numbers = _layer_numbers(self.layers)
        require(
            numbers[-1] < layers,
            f"lora.layers is {self.layers!r}; the model has layers 0 to {layers - 1}.",
        )
        return numbers

    def restricted(self, names: Sequence[str]) -> LoRAConfig:
        """The same of those targets that are among the names; one of them must be."""
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

    def place_of(self, layer: int) -> int | None:
        """Where a layer's leaves lie in the adapter's stacks; None where it has none."""
        numbers = _layer_numbers(self.layers)
        if self.layers is None:
            return layer
        return numbers.index(layer) if layer in numbers else None


def _pattern(field: str, text: str) -> dict[str, float]:
    """`q=4,down=32` as numbers by name."""
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
    """`0,2,4-7` as sorted numbers."""
    return errors.numbers("lora.layers", text, "8-15 or 0,2,4-7")


@flax.struct.dataclass
class Adapter:
    """What makes a role out of the base: the tree that is trained, saved and passed around.

    lora: LoRA leaves by layer path, stacked over the adapted layers: a_LDR, b_LRF and, for DoRA,
      m_LF. None: no LoRA.
    head: {kernel_D, bias} of the scalar head of a reward or value model. None: no head.
    weights: full tuning only: a whole parameter tree that stands in for the base's.
    under: frozen pairs added beneath `lora`, over all layers, their scale already in B: an adapter
      that training goes on top of, or what PiSSA takes off. Never differentiated. None: none.
    config: the LoRAConfig of `lora` (static; None without LoRA).
    """

    lora: Tree | None = None
    head: Tree | None = None
    weights: Tree | None = None
    under: Tree | None = None
    config: LoRAConfig | None = flax.struct.field(pytree_node=False, default=None)


def trainable(adapter: Adapter) -> Adapter:
    """The part that is differentiated and that optimizers see: all but `under`."""
    return adapter.replace(under=None)


def under_ranks(under: Tree | None) -> dict[str, int] | None:
    """Ranks of a frozen part by projection."""
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
    chosen: Sequence[int] = (),
) -> Tree:
    """Fresh LoRA leaves of the given shapes.

    The random side is uniform in +-1/sqrt(its input width), which is Kaiming-uniform with a =
    sqrt(5), the field's convention (the papers do not state theirs); the other side is zero.
    kernels: the base's, by module path, stacked over all layers, dense or quantised; DoRA and PiSSA
    start from those of the layers `chosen`, and read one layer at a time.
    """

    pairs = (
        {module: _pissa(config, module, kernel, chosen) for module, kernel in kernels.items()}
        if config.init == "pissa"
        else {}
    )

    def leaf(name: str, spec: jax.ShapeDtypeStruct) -> jax.Array:
        module, part = name.rsplit("/", 1)
        if module in pairs:
            return pairs[module][part]
        if part == "magnitude":
            return _by_layer(layer_function(config, module), kernels[module], chosen)
        if part == {"b-zero": "lora_b", "a-zero": "lora_a"}[config.init]:
            return jnp.zeros(spec.shape, spec.dtype)
        bound = 1.0 / math.sqrt(spec.shape[-2])
        # Folding a stable number of the path in: one target more leaves the others' draws alone.
        path_key = jax.random.fold_in(
            key, sum(ord(c) * 31**i for i, c in enumerate(name)) % (2**31)
        )
        return jax.random.uniform(path_key, spec.shape, spec.dtype, -bound, bound)

    return trees.map_named(leaf, abstract)


def _by_layer(
    function: Callable[[jax.Array], Tree], kernel_LDF: Tree, chosen: Sequence[int]
) -> Tree:
    """Calls function(kernel_DF), in float32, for each chosen layer of a stacked kernel, and stacks
    the results.

    Each layer is a program of its own: in one program with a loop, the compiler may convert the
    whole stack to float32 first.
    """
    found = [trees.awaited(on_layer(function, kernel_LDF, jnp.int32(index))) for index in chosen]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


@functools.partial(jax.jit, static_argnums=0)
def on_layer(function: Callable[[jax.Array], Tree], kernel_LDF: Tree, index: jax.Array) -> Tree:
    """Returns function(kernel_DF) for one layer of a stacked kernel. That layer alone is made dense
    and float32; kernel_LDF may be quantised.
    """
    kernel_DF = jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), kernel_LDF
    )
    return function(dense(kernel_DF).astype(jnp.float32))


def layer_function(config: LoRAConfig, module: str) -> Callable[[jax.Array], Tree] | None:
    """What an adapter's first values are, as a function of one layer's float32 kernel: PiSSA's
    pair, DoRA's magnitudes; None: they read no weight.
    """
    target = _target(f"{module}/")
    if config.init == "pissa":
        return functools.partial(
            singular_pair, rank=config.rank_of(target), scale=config.scale_of(target)
        )
    return _column_norms if config.dora else None


def _column_norms(kernel_DF: jax.Array) -> jax.Array:
    return jnp.linalg.norm(kernel_DF, axis=-2)


def singular_pair(kernel_DF: jax.Array, rank: int, scale: float) -> dict[str, jax.Array]:
    """A = U sqrt(S), B = sqrt(S) V^T / s of the `rank` largest singular values (PiSSA, eq. 2 and
    3).
    """
    u, s, vt = jnp.linalg.svd(kernel_DF, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return {"lora_a": u[:, :rank] * root[None, :], "lora_b": root[:, None] * vt[:rank, :] / scale}


def _pissa(
    config: LoRAConfig, module: str, kernel_LDF: Tree, chosen: Sequence[int]
) -> dict[str, jax.Array]:
    *_, target = module.split("/")
    rank, most = config.rank_of(target), min(jax.eval_shape(dense, kernel_LDF).shape[-2:])
    require(
        rank <= most,
        f"The lora.rank of {target} is {rank}; with lora.init pissa it can be {most} at most.",
    )
    return _by_layer(layer_function(config, module), kernel_LDF, chosen)


def _target(name: str) -> str:
    return name.split("/")[-2]


def frozen_pairs(adapter: Adapter, layers: int, factor: float = 1.0) -> Tree:
    """An adapter's LoRA part in the form of `Adapter.under`: all layers, scale times `factor` in B.

    UserError for DoRA, whose output is no sum of the base's and its own.
    """
    config = adapter.config
    require(not config.dora, "An adapter with magnitudes (DoRA) cannot lie under another.")
    chosen = jnp.array(config.adapted_layers(layers))
    out: dict = {}
    for name, leaf in trees.named_leaves(adapter.lora).items():
        leaf = leaf if name.endswith("lora_a") else leaf * (factor * config.scale_of(_target(name)))
        whole = jnp.zeros((layers, *leaf.shape[1:]), leaf.dtype).at[chosen].set(leaf)
        trees.insert(out, name.replace("lora_", "under_"), whole)
    return out


def summed_pairs(adapter: Adapter, layers: int) -> Tree:
    """What an adapter adds, its LoRA part and what lies under it, in the form of
    `Adapter.under`.
    """
    own = [] if adapter.lora is None else [frozen_pairs(adapter, layers)]
    return _joined(own + ([] if adapter.under is None else [adapter.under]))


def stack(frozen: Adapter, fresh: Adapter, layers: int) -> Adapter:
    """`fresh` (trainable) on top of `frozen`: the sum of both, and of what lay under either."""
    parts = [summed_pairs(frozen, layers)] + ([] if fresh.under is None else [fresh.under])
    require(not fresh.config.dora, "An adapter with magnitudes (DoRA) cannot go on top of another.")
    return fresh.replace(under=_joined(parts))


def _joined(parts: Sequence[Tree]) -> Tree:
    """One set of frozen pairs that adds up to all: ranks side by side."""
    out: dict = {}
    names = dict.fromkeys(name for part in parts for name in trees.named_leaves(part))
    for name in names:
        leaves = [found[name] for found in map(trees.named_leaves, parts) if name in found]
        trees.insert(out, name, jnp.concatenate(leaves, axis=-1 if name.endswith("_a") else -2))
    return out


def average(adapters: Sequence[Adapter], weights: Sequence[float], layers: int) -> Adapter:
    """The adapter whose update is sum_i w_i (s_i A_i B_i), exactly, and whose head is sum_i w_i
    head_i.

    For weight-averaged reward models (Rame et al. 2024, arXiv 2401.12187). Averaging A and B apart
    would give cross terms A_i B_j; here the ranks stand side by side (rank = sum of ranks), with
    scale 1. UserError for DoRA, for full tuning, and when some have heads and others not.
    """
    require(len(adapters) == len(weights) > 0, "An average needs one weight for each adapter.")
    require(
        all(a.lora is not None for a in adapters),
        "An average of adapters needs LoRA adapters; a fully tuned role is none.",
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
    joined = _joined(parts)
    lora: dict = {}
    for name, leaf in trees.named_leaves(joined).items():
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
    """Scalar head: kernel_D ~ N(0, 1/sqrt(D+1)) (Stiennon et al. 2020, appendix C), bias 0.

    key=None gives a zero kernel: a value model that predicts 0 everywhere at the start.
    """
    kernel = jnp.zeros((width,), jnp.float32)
    if key is not None:
        kernel = jax.random.normal(key, (width,), jnp.float32) / math.sqrt(width + 1)
    return {"kernel": kernel, "bias": jnp.zeros((), jnp.float32)}


def output_norms(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """||W + s A B|| of each output, float32 [..., F], without forming the [D, F] sum.

    ||W||^2 + 2 s sum_r (A^T W)_r B_r + s^2 B^T (A^T A) B, each an F-vector.
    """
    kernel = kernel.astype(jnp.float32)
    cross = jnp.sum(precision.einsum("...dr,...df->...rf", a, kernel) * b, axis=-2)
    gram = precision.einsum("...dr,...dq->...rq", a, a)
    square = jnp.sum(b * precision.einsum("...rq,...qf->...rf", gram, b), axis=-2)
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=-2) + 2 * scale * cross + scale**2 * square)


def merge(base: Tree, adapter: Adapter) -> Tree:
    """A derived copy of the base with the adapter in it: W + s A B (DoRA: rescaled), in float32.

    Returns a new tree in the base's dtypes (a fully tuned role's own weights as they are); neither
    argument is changed, and nothing in the package writes a merged copy back (repeated merging in
    bfloat16 drifts). UserError for a quantised base, which has no place for the sum.
    """
    if adapter.weights is not None:
        return adapter.weights
    if adapter.lora is None and adapter.under is None:
        return base
    require(
        not any(is_quantised(leaf) for leaf in jax.tree.leaves(base, is_leaf=is_quantised)),
        "An adapter cannot be merged into a quantised base; load the base without --quantise.kind.",
    )
    changed = moved_modules(adapter)

    def merged(name: str, weight: jax.Array) -> jax.Array:
        module = name.removesuffix("/kernel")
        if module not in changed:
            return weight
        layers = [
            merged_kernel(adapter, module, index, kernel)
            for index, kernel in enumerate(weight.astype(jnp.float32))
        ]
        return jnp.stack(layers).astype(weight.dtype)

    return trees.map_named(merged, base)


def moved_modules(adapter: Adapter) -> set[str]:
    """Paths of the modules whose kernel an adapter changes: layers/attention/q."""
    parts = [part for part in (adapter.lora, adapter.under) if part is not None]
    return {name.rpartition("/")[0] for part in parts for name in trees.named_leaves(part)}


def merged_kernel(adapter: Adapter, module: str, layer: int, kernel_DF: jax.Array) -> jax.Array:
    """One layer's kernel (float32) with the adapter in it."""
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
    place = adapter.config.place_of(layer)
    if place is None:
        return kernel_DF
    moved_DF = kernel_DF + adapter.config.scale_of(target) * precision.matmul(
        lora[f"{module}/lora_a"][place], lora[f"{module}/lora_b"][place]
    )
    if not adapter.config.dora:
        return moved_DF
    return (
        moved_DF * (lora[f"{module}/magnitude"][place] / jnp.linalg.norm(moved_DF, axis=0))[None, :]
    )
