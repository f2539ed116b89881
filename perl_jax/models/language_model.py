"""Pure functions of a model: logits, hidden states, log-probabilities, scores and values.

Every function takes (base, adapter, tokens, valid). `adapter=None` is the base model itself; the
`weights` of a fully tuned adapter replace the base's. No object of this module holds arrays.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from perl_jax.adapters import combine, initial_values
from perl_jax.adapters.lora import LINEAR, Adapter, LoRAConfig
from perl_jax.adapters.quantise import is_quantised
from perl_jax.models import attention
from perl_jax.models.attention_paths import attend_whole
from perl_jax.models.config import ModelConfig
from perl_jax.models.decoder import Block, Embedder
from perl_jax.models.layer_kinds import LayerKinds
from perl_jax.models.layer_stack import Layer, LayerStack, within_a_layer
from perl_jax.models.linear import AdapterSpec
from perl_jax.models.logprobs import following_logprobs, logprobs_from_hidden
from perl_jax.models.network import network
from perl_jax.models.packing import Packing, gather, select_tokens, token_values
from perl_jax.models.placement import Placement
from perl_jax.runtime import precision, sharding, trees
from perl_jax.runtime.platforms import platform_of
from perl_jax.types import Array, Tree


def last_valid(valid_BT: Array) -> jax.Array:
    """Returns the column [B] of each row's last real token; 0 on rows without one."""
    columns = jnp.arange(valid_BT.shape[1])
    return jnp.max(jnp.where(valid_BT.astype(bool), columns[None, :], 0), axis=1)


# ((keys, values) of a layer, [B, T, N, K] each, the layer's window) -> what is kept of the keys and
# values, a tree.
Keep = Callable[[tuple[jax.Array, jax.Array], int | None], Tree]
# Largest number of bytes of float32 logits per device that exist at a time when log-probabilities
# are computed.
LOGIT_BYTES = 2**28
# The same on a CPU with a frozen output projection, where a smaller size is as fast.
CPU_LOGIT_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A decoder as a set of pure functions. It is hashable: pass it to jit as a static argument.

    Attributes:
        config: Shape and options of the decoder.
        mesh: Mesh of the arguments; activations and gathered weights get sharding constraints for
            it. None: a single device, or no constraints.
    """

    config: ModelConfig
    mesh: Mesh | None = None

    # Shapes, logical axes, shardings, initial values.

    def abstract_base(self) -> Tree:
        """Returns shapes and dtypes of the base's leaves, as a tree of `jax.ShapeDtypeStruct`.

        It is {layers: leaves stacked over L, outer: embedding, final norm, output projection}.
        """
        return network(self.config, AdapterSpec()).base

    def base_axes(self) -> Tree:
        """Returns the tree of the base with a tuple of logical axis names for each leaf."""
        return network(self.config, AdapterSpec()).base_axes

    def abstract_lora(self, config: LoRAConfig) -> Tree:
        """Returns shapes and dtypes of an adapter's LoRA leaves: `jax.ShapeDtypeStruct`s.

        They are the tree {layers: leaves stacked over the adapted layers}.
        """
        return network(self.config, AdapterSpec(config)).lora

    def lora_axes(self, config: LoRAConfig) -> Tree:
        """Returns the tree of LoRA leaves with a tuple of logical axis names for each leaf."""
        return network(self.config, AdapterSpec(config)).lora_axes

    @property
    def split_heads(self) -> bool:
        """Whether heads are split along the mesh's tensor axis: if it divides the key/value heads.

        Query heads then stay on the devices of the keys that they read. True without a mesh.
        """
        return self.mesh is None or self.config.kv_heads % self.mesh.shape["tensor"] == 0

    @functools.cache  # noqa: B019  models are few, and live as long as the process
    def base_shardings(self) -> dict[str, NamedSharding]:
        """Returns the sharding of every base leaf, keyed by path; the model must have a mesh."""
        return sharding.leaf_shardings(
            self.base_axes(), self.abstract_base(), self.mesh, self._pieces
        )

    @functools.cache  # noqa: B019  as above
    def lora_shardings(self) -> dict[str, NamedSharding]:
        """Returns the sharding of every possible LoRA leaf, keyed by path; there must be a mesh.

        For adapters that are split like the weights that they belong to (`mesh.adapters=sharded`).
        """
        every = LoRAConfig(targets=",".join(LINEAR), dora=True)
        return sharding.leaf_shardings(
            self.lora_axes(every), self.abstract_lora(every), self.mesh, self._pieces
        )

    @property
    def _pieces(self) -> dict[str, int]:
        """Number of parts, keyed by logical axis, that heads and kv_heads can be cut into.

        If key/value heads do not divide over devices, query heads stay whole too: a group of heads
        attends on one device.
        """
        return dict.fromkeys(("heads", "kv_heads"), self.config.kv_heads)

    def abstract_under(self, ranks: Mapping[str, int]) -> Tree:
        """Returns shapes and dtypes of frozen LoRA pairs beneath the adapter (`Adapter.under`).

        The leaves of the tree are `MODULE/under_a` [L, width, R] and `MODULE/under_b`
        [L, R, features], float32.

        Args:
            ranks: Rank of each projection that has a pair, keyed by its name (q, k, ...).
        """
        out: dict = {}
        number = self.config.layers
        for name, kernel in trees.named_leaves(self.abstract_base()).items():
            module, _, leaf = name.rpartition("/")
            rank = ranks.get(module.rpartition("/")[2])
            if leaf == "kernel" and rank is not None:
                _, width, features = kernel.shape
                trees.insert(
                    out,
                    f"{module}/under_a",
                    jax.ShapeDtypeStruct((number, width, rank), jnp.float32),
                )
                trees.insert(
                    out,
                    f"{module}/under_b",
                    jax.ShapeDtypeStruct((number, rank, features), jnp.float32),
                )
        return out

    def init_base(self, key: jax.Array) -> Tree:
        """Returns random base weights as before pre-training.

        Entries of a matrix are normal with variance 1 / (number of inputs), those of the embedding
        with variance 1 / D. Norms multiply by 1, and biases are 0.
        """
        outer_key, layer_key = jax.random.split(key)
        layers = jax.vmap(
            lambda k: nnx.to_pure_dict(
                nnx.state(Block(self.config, AdapterSpec(), nnx.Rngs(params=k)), nnx.Param)
            )
        )
        outer = nnx.to_pure_dict(
            nnx.state(Embedder(self.config, nnx.Rngs(params=outer_key)), nnx.Param)
        )
        return {"layers": layers(jax.random.split(layer_key, self.config.layers)), "outer": outer}

    def init_adapter(self, key: jax.Array, config: LoRAConfig, base: Tree | None = None) -> Adapter:
        """Returns a fresh adapter without a head, whose outputs are the base's.

        They are exactly equal for the inits b-zero and a-zero, and equal up to rounding for PiSSA
        and DoRA.

        Args:
            key: Random key of the initial values.
            config: Config of the adapter.
            base: The base's weights, which DoRA and PiSSA start from; otherwise unused.

        Raises ValueError if DoRA or PiSSA gets no base.
        """
        abstract = self.abstract_lora(config)
        kernels = {}
        if config.dora or config.init == "pissa":
            if base is None:
                raise ValueError("DoRA and PiSSA start from the base's weights: give `base`")
            modules = {name.rsplit("/", 1)[0] for name in trees.named_leaves(abstract)}
            leaves = trees.named_leaves(base, is_leaf=is_quantised)
            kernels = {module: leaves[module + "/kernel"] for module in modules}
        layers = config.adapted_layers(self.config.layers)
        adapter = Adapter(
            lora=initial_values.init_lora(key, abstract, config, kernels, layers), config=config
        )
        if config.init != "pissa":
            return adapter
        return dataclasses.replace(
            adapter, under=combine.frozen_pairs(adapter, self.config.layers, -1.0)
        )

    # Forward passes over whole sequences.

    def hidden(
        self,
        base: Tree,
        adapter: Adapter | None,
        tokens_BT: Array,
        valid_BT: Array,
        dropout_key: Array | None = None,
        *,
        packing: Packing | None = None,
    ) -> jax.Array:
        """Returns hidden_BTD after the final norm; with packing, hidden_WUD of packed tokens.

        Args:
            base: The frozen base.
            adapter: The adapter; None: the base itself.
            tokens_BT: Token ids.
            valid_BT: True on real tokens.
            dropout_key: Random key of dropout; None: no dropout.
            packing: How the batch is packed; None: it is padded.
        """
        return self._forward(base, adapter, tokens_BT, valid_BT, dropout_key, packing)

    def logits(
        self,
        base: Tree,
        adapter: Adapter | None,
        tokens_BT: Array,
        valid_BT: Array,
        dropout_key: Array | None = None,
    ) -> jax.Array:
        """Returns logits_BTV, float32; position t predicts token t + 1.

        Args:
            base: The frozen base.
            adapter: The adapter; None: the base itself.
            tokens_BT: Token ids.
            valid_BT: True on real tokens.
            dropout_key: Random key of dropout; None: no dropout.
        """
        hidden_BTD = self.hidden(base, adapter, tokens_BT, valid_BT, dropout_key)
        return self.logits_of(base, adapter, hidden_BTD, self.placement())

    def logprobs(
        self,
        base: Tree,
        adapter: Adapter | None,
        tokens_BT: Array,
        valid_BT: Array,
        temperature: float = 1.0,
        dropout_key: Array | None = None,
        *,
        start: int = 0,
        packing: Packing | None = None,
        wanted_BT: Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns logp_BT and entropy_BT: the log-probability of token t given the tokens before t,
        and the entropy in nats of its distribution.

        Column 0 is 0. In a padded batch, padding gets arbitrary values. With packing, all tokens
        outside `wanted_BT` are 0. The entropy is a metric and has no gradient.

        Logits exist for a few columns at a time: at most LOGIT_BYTES per device (CPU_LOGIT_BYTES on
        a CPU with a frozen output projection). If the output projection is trained, the backward
        pass computes them again.

        Args:
            base: The frozen base.
            adapter: The adapter; None: the base itself.
            tokens_BT: Token ids.
            valid_BT: True on real tokens.
            temperature: Divides the logits.
            dropout_key: Random key of dropout; None: no dropout.
            start: First column that is computed; earlier columns are 0.
            packing: How the batch is packed. None: it is padded.
            wanted_BT: Needed with packing, else unused: the tokens that are computed; others are 0.
        """
        placement = self.placement()
        hidden = self.hidden(base, adapter, tokens_BT, valid_BT, dropout_key, packing=packing)
        outer = self.embedder(base, adapter)
        weight_DV = outer.output_matrix(placement)
        head = lambda hidden_BCD: outer.logits(hidden_BCD, weight_DV, placement)
        devices = 1 if self.mesh is None else self.mesh.size
        frozen = adapter is None or adapter.weights is None
        size = CPU_LOGIT_BYTES if frozen and platform_of(self.mesh) == "cpu" else LOGIT_BYTES
        columns = lambda rows: max(1, size * devices // (4 * rows * self.config.vocab_size))
        if packing is None:
            return logprobs_from_hidden(
                head,
                hidden,
                tokens_BT,
                temperature,
                start=start,
                columns=columns(tokens_BT.shape[0]),
                frozen=frozen,
            )
        length = tokens_BT.shape[1]
        # Column 0 has no prediction.
        wanted_BT = jnp.asarray(wanted_BT, bool) & (jnp.arange(length) >= max(start, 1))[None, :]
        number = min(
            packing.token_WU.shape[1], tokens_BT.shape[0] // packing.parts * (length - start)
        )
        taken_WY, back = select_tokens(packing, wanted_BT, number)
        hidden_WYD, token_WY = (
            packing.read_tokens(hidden, taken_WY - 1),
            token_values(packing, tokens_BT, taken_WY),
        )
        logp_WY, entropy_WY = following_logprobs(
            head, hidden_WYD, token_WY, temperature, columns(packing.parts), frozen
        )
        return back(logp_WY), back(entropy_WY)

    def values(
        self,
        base: Tree,
        adapter: Adapter,
        tokens_BT: Array,
        valid_BT: Array,
        dropout_key: Array | None = None,
        *,
        packing: Packing | None = None,
    ) -> jax.Array:
        """Returns the scalar head's output at every position, float32 [B, T].

        Position t has seen tokens up to t; `logprobs.shift_right` gives values before each token.

        Args:
            base: The frozen base.
            adapter: An adapter with a scalar head.
            tokens_BT: Token ids.
            valid_BT: True on real tokens.
            dropout_key: Random key of dropout; None: no dropout.
            packing: How the batch is packed; None: it is padded.

        Raises ValueError if the adapter has no head.
        """
        value = _head(
            adapter, self.hidden(base, adapter, tokens_BT, valid_BT, dropout_key, packing=packing)
        )
        return value if packing is None else packing.to_sequences(value)

    def score(
        self,
        base: Tree,
        adapter: Adapter,
        tokens_BT: Array,
        valid_BT: Array,
        dropout_key: Array | None = None,
        *,
        packing: Packing | None = None,
    ) -> jax.Array:
        """Returns score_B, float32: the scalar head's output at each row's last real token.

        Args:
            base: The frozen base.
            adapter: An adapter with a scalar head.
            tokens_BT: Token ids.
            valid_BT: True on real tokens.
            dropout_key: Random key of dropout; None: no dropout.
            packing: How the batch is packed; None: it is padded.

        Raises ValueError if the adapter has no head.
        """
        last_B1 = last_valid(valid_BT)[:, None]
        hidden_WRD = self._forward(
            base, adapter, tokens_BT, valid_BT, dropout_key, packing, only_BR=last_B1
        )
        return _head(adapter, hidden_WRD.reshape(tokens_BT.shape[0], -1))

    # Parts of a forward pass.

    def placement(self, stationary: bool = False) -> Placement:
        """Returns the sharding constraints of a pass over whole sequences or of a decoding step.

        Args:
            stationary: True for a decoding step.
        """
        return Placement(self.mesh, self.split_heads, stationary)

    def embedder(self, base: Tree, adapter: Adapter | None) -> Embedder:
        """Returns the embedder module with the base's weights, or in full tuning the adapter's."""
        return nnx.merge(
            network(self.config, AdapterSpec()).outer, _weights(base, adapter)["outer"]
        )

    def layers(self, base: Tree, adapter: Adapter | None, placement: Placement) -> LayerStack:
        """Returns the layers with their weights, ready to run.

        Args:
            base: The frozen base.
            adapter: The adapter; None: the base itself.
            placement: Sharding constraints of the pass.
        """
        shardings = (
            ({}, {}) if self.mesh is None else (self.base_shardings(), self.lora_shardings())
        )
        adapter = Adapter() if adapter is None else adapter
        inner = lambda tree: None if tree is None else tree["layers"]
        return LayerStack(
            config=self.config,
            placement=placement,
            weights=_weights(base, adapter)["layers"],
            lora=inner(adapter.lora),
            lora_config=None if adapter.lora is None else adapter.config,
            under=inner(adapter.under),
            trained=adapter.weights is not None,
            base_shardings=within_a_layer(shardings[0]),
            lora_shardings=within_a_layer(shardings[1]),
        )

    def logits_of(
        self, base: Tree, adapter: Adapter | None, hidden_BTD: Array, placement: Placement
    ) -> jax.Array:
        """Returns logits_BTV, float32.

        Args:
            base: The frozen base.
            adapter: The adapter; None: the base itself.
            hidden_BTD: Hidden states after the final norm.
            placement: Sharding constraints of the pass.
        """
        outer = self.embedder(base, adapter)
        return outer.logits(hidden_BTD, outer.output_matrix(placement), placement)

    def hidden_and_kept(
        self, base: Tree, adapter: Adapter | None, tokens_BT: Array, valid_BT: Array, keep: Keep
    ) -> tuple[jax.Array, dict[int | None, Tree]]:
        """Returns hidden_BTD after the final norm, and what is kept of keys and values.

        What is kept is a dict from each window to the entries of the layers with this window,
        stacked. There is no dropout and no packing.

        Args:
            base: The frozen base.
            adapter: The adapter; None: the base itself.
            tokens_BT: Token ids.
            valid_BT: True on real tokens.
            keep: ((keys, values) of a layer, [B, T, N, K] each, its window) -> the layer's entry.
        """
        _check_tokens(tokens_BT, valid_BT)
        placement, outer = self.placement(), self.embedder(base, adapter)
        kinds = LayerKinds.of(self.config, attention.positions(valid_BT))
        over = self._layer(kinds, placement, valid_BT, None)

        def layer(block, x, entries, window, cache):
            """Runs one layer; returns x, and what is kept of its keys and values."""
            x, kv = over(block, x, (None, entries), window, cache)
            return x, keep(kv, window)

        x_BTD, kept = self.layers(base, adapter, placement).run(
            layer, outer.embed(tokens_BT, placement), kinds.by_layer, windows=self.config.windows
        )
        return outer.final_norm(x_BTD), kept

    def _forward(
        self,
        base: Tree,
        adapter: Adapter | None,
        tokens_BT: Array,
        valid_BT: Array,
        dropout_key: Array | None,
        packing: Packing | None = None,
        only_BR: Array | None = None,
    ) -> jax.Array:
        """Returns hidden states after the final norm, [B, T, D] or with packing [W, U, D].

        Args:
            base: The frozen base.
            adapter: The adapter; None: the base itself.
            tokens_BT: Token ids.
            valid_BT: True on real tokens.
            dropout_key: Random key of dropout; None: no dropout.
            packing: How the batch is packed; None: it is padded.
            only_BR: Columns of each row whose hidden states are wanted. The last layer then
                computes only these, and the result is [B, R, D]; with packing, [W, b R, D]. None:
                all columns.
        """
        _check_tokens(tokens_BT, valid_BT)
        own = (lambda x_BT: x_BT) if packing is None else packing.packed
        tokens, positions = own(tokens_BT), own(attention.positions(valid_BT))
        kinds = LayerKinds.of(self.config, positions)
        placement, outer = self.placement(), self.embedder(base, adapter)
        keys = None if dropout_key is None else jax.random.split(dropout_key, self.config.layers)
        over = functools.partial(self._layer, kinds, placement, valid_BT, packing)
        without_kv = lambda layer: lambda *inputs: (layer(*inputs)[0], None)
        last = only_WR = None
        if only_BR is not None:
            only_WR = only_BR if packing is None else packing.packed_index(only_BR)
            # With full tuning the last layer stays in the stack: taking it out would copy the other
            # layers' weights and their gradients.
            if adapter is None or adapter.weights is None:
                last = without_kv(over(only_WR))
        x, _ = self.layers(base, adapter, placement).run(
            without_kv(over()),
            outer.embed(tokens, placement),
            (keys, kinds.by_layer),
            backward=True,
            last=last,
        )
        if only_WR is not None and last is None:
            x = gather(x, only_WR)
        return outer.final_norm(x)

    def _layer(
        self,
        kinds: LayerKinds,
        placement: Placement,
        valid_BT: Array,
        packing: Packing | None,
        only_WR: Array | None = None,
    ) -> Layer:
        """Returns the function of one layer over whole sequences; its output is (keys, values).

        Args:
            kinds: What differs between layers.
            placement: Sharding constraints of the pass.
            valid_BT: True on real tokens.
            packing: How the batch is packed; None: it is padded.
            only_WR: Indices in each (packed) row of the columns that are computed after attention;
                None: all.
        """
        read_BT = jnp.asarray(valid_BT, bool) if packing is None else packing.own_BT
        if only_WR is not None:
            width = valid_BT.shape[1] if packing is None else packing.token_WU.shape[1]
            only_WU = jnp.any(jnp.arange(width)[None, None, :] == only_WR[:, :, None], axis=1)
            read_BT = only_WU if packing is None else packing.spread(only_WU) & read_BT

        def layer(block, x, entries, kind, cache):
            """Runs one layer; returns x and (keys, values)."""
            key, by_layer = entries
            attend = attend_whole(
                self.config, self.mesh, kinds, by_layer, valid_BT, read_BT, packing
            )
            return block(x, kinds.rotary(by_layer), attend, key, placement, only_WR)

        return layer


def _check_tokens(tokens_BT: Array, valid_BT: Array) -> None:
    """Raises AssertionError unless tokens and their mask are both [B, T]."""
    chex.assert_rank([tokens_BT, valid_BT], 2)
    chex.assert_equal_shape([tokens_BT, valid_BT])


def _weights(base: Tree, adapter: Adapter | None) -> Tree:
    """Returns the weights that a pass reads: the base's, or in full tuning those of the adapter."""
    return base if adapter is None or adapter.weights is None else adapter.weights


def _head(adapter: Adapter | None, hidden: Array) -> jax.Array:
    """Returns the scalar head's output [...], float32, for hidden states [..., D].

    Raises ValueError if `adapter` is None or has no head.
    """
    if adapter is None or adapter.head is None:
        raise ValueError(
            "This role has no scalar head; a score or a value needs an adapter with one."
        )
    return (
        precision.matmul(hidden.astype(jnp.float32), adapter.head["kernel"]) + adapter.head["bias"]
    )
