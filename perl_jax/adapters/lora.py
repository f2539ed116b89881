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
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import flax.struct

from perl_jax import errors
from perl_jax.errors import require
from perl_jax.runtime import trees
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
        errors.in_range(self, "lora")
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
            f"lora.targets is {errors.shown(self.targets)}; it must be attention, all-linear, or "
            f"names out of {', '.join(LINEAR)}.",
        )
        for target in self.projections:
            rank = _pattern("ranks", self.ranks).get(target, self.rank)
            errors.whole(
                f"lora.ranks of {target}",
                int(rank) if rank == int(rank) else rank,
                most=errors.MOST["rank"],
            )
            errors.positive(f"lora.alphas of {target}", self.alpha_of(target))
        for field, pattern in (("ranks", self.ranks), ("alphas", self.alphas)):
            outside = sorted(set(_pattern(field, pattern)) - set(self.projections))
            require(
                not outside,
                f"lora.{field} names {errors.listed(outside)}; the targets are "
                f"{', '.join(self.projections)}.",
            )
        _layer_numbers(self.layers)
        require(
            not (self.dora and self.init == "pissa"),
            "lora.dora and lora.init pissa cannot be combined.",
        )

    def check_read(self) -> None:
        """Raises UserError if `rank` or `alpha` is set although no target uses it.

        No target uses it if `ranks` or `alphas` names every target.
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
        """Names of the adapted projections, such as ("q", "v")."""
        if self.targets in TARGET_GROUPS:
            return TARGET_GROUPS[self.targets]
        return tuple(name.strip() for name in self.targets.split(","))

    def rank_of(self, target: str) -> int:
        """Returns the rank R of one target: its entry in `ranks`, else `rank`.

        Does not check that the target is adapted.
        """
        return int(_pattern("ranks", self.ranks).get(target, self.rank))

    def alpha_of(self, target: str) -> float:
        """Returns the alpha of one target: its entry in `alphas`, else `alpha`.

        Does not check that the target is adapted.
        """
        return _pattern("alphas", self.alphas).get(target, self.alpha)

    def scale_of(self, target: str) -> float:
        """Returns a target's scale s: alpha / rank, or alpha / sqrt(rank) if rank-stabilised."""
        rank = self.rank_of(target)
        return self.alpha_of(target) / (math.sqrt(rank) if self.rank_stabilised else rank)

    @property
    def scaling_rule(self) -> str:
        """The formula of the scale as text, for an artefact's record.

        "alpha / sqrt(rank)" if rank-stabilised, else "alpha / rank".
        """
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
            f"lora.layers is {errors.shown(self.layers)}; the model has layers 0 to {layers - 1}.",
        )
        return numbers

    def restricted(self, names: Sequence[str]) -> LoRAConfig:
        """Returns the config with only the targets that are in `names`.

        At least one target must be. Ranks and alphas stay as they are.
        """
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
        """Returns a layer's index in the adapter's stacked leaves; None: it is not adapted."""
        numbers = _layer_numbers(self.layers)
        if self.layers is None:
            return layer
        return numbers.index(layer) if layer in numbers else None


def _pattern(field: str, text: str) -> dict[str, float]:
    """Parses `q=4,down=32` into {"q": 4.0, "down": 32.0}.

    Raises UserError for other text, with the config's field name `field` in the message.
    """
    out = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        good = math.isfinite(number) and name.strip() not in out
        require(good, f"lora.{field} is {errors.shown(text)}; it must look like q=4,down=32.")
        out[name.strip()] = number
    return out


def _layer_numbers(text: str | None) -> tuple[int, ...]:
    """Parses `0,2,4-7` into (0, 2, 4, 5, 6, 7); None gives (). Raises UserError for other text."""
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
    """Returns the rank of the frozen pairs of each projection, keyed by its name (q, k, ...).

    None if there are no frozen pairs.
    """
    if under is None:
        return None
    return {
        target_of(name): leaf.shape[-1]
        for name, leaf in trees.named_leaves(under).items()
        if name.endswith("_a")
    }


def target_of(name: str) -> str:
    """Returns the projection of a leaf's path: `q` for `layers/attention/q/lora_a`."""
    return name.split("/")[-2]
