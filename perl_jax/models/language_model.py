"""Pure functions of a model: logits, hidden states, scores, values, and cached decoding.

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

from perl_jax.adapters import lora as lora_lib
from perl_jax.adapters.lora import LINEAR, Adapter, LoRAConfig
from perl_jax.adapters.quantise import is_quantised
from perl_jax.models import attention, kernels
from perl_jax.models.cache import (
    CacheKind,
    KVCache,
    WindowCache,
    attend_cached,
    cache_entry,
    last_tokens,
    own_columns,
    write_token,
)
from perl_jax.models.config import ModelConfig
from perl_jax.models.decoder import AdapterSpec, Attend, Block, Embedder, LoRAParam, UnderParam
from perl_jax.models.fused import GROUPS
from perl_jax.models.layer_kinds import LayerKinds, adapter_runs, periodic_scans
from perl_jax.models.logprobs import following_logprobs, logprobs_from_hidden
from perl_jax.models.packing import Packing, gather, select_tokens, token_values
from perl_jax.models.placement import Placement, save_all_but_weights
from perl_jax.models.stacks import (
    Unstacked,
    is_unstacked,
    map_stacks,
    select_layers,
    take_layer,
    unstacked_outputs,
)
from perl_jax.runtime import precision, sharding, trees
from perl_jax.runtime.platforms import platform_of
from perl_jax.types import Array, Tree


@dataclasses.dataclass(frozen=True)
class _Split:
    """The split network: static graph definitions, abstract leaves and logical axes."""

    block: nnx.GraphDef
    outer: nnx.GraphDef
    base: Tree
    lora: Tree
    base_axes: Tree
    lora_axes: Tree


@functools.lru_cache(maxsize=64)
def _split(config: ModelConfig, adapted: AdapterSpec) -> _Split:
    """Returns the split network of a config and its adapters; results are cached."""
    block = nnx.eval_shape(lambda: Block(config, adapted, nnx.Rngs(0)))
    outer = nnx.eval_shape(lambda: Embedder(config, nnx.Rngs(0)))
    block_graph, base, adapter, _ = nnx.split(block, nnx.Param, LoRAParam, UnderParam)
    outer_graph, around = nnx.split(outer, nnx.Param)
    stack = lambda number: lambda leaf: jax.ShapeDtypeStruct((number, *leaf.shape), leaf.dtype)
    number = 0 if adapted.lora is None else len(adapted.lora.adapted_layers(config.layers))
    return _Split(
        block=block_graph,
        outer=outer_graph,
        base={
            "layers": jax.tree.map(stack(config.layers), nnx.to_pure_dict(base)),
            "outer": nnx.to_pure_dict(around),
        },
        lora={"layers": jax.tree.map(stack(number), nnx.to_pure_dict(adapter))},
        base_axes={"layers": _axes(base, ("layers",)), "outer": _axes(around, ())},
        lora_axes={"layers": _axes(adapter, ("layers",))},
    )


def _axes(state: nnx.State, prefix: tuple[str, ...]) -> dict:
    """Returns the logical axis names of each leaf, as nested dicts of tuples, `prefix` first."""
    out: dict = {}
    for path, variable in nnx.to_flat_state(state):
        node = out
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = prefix + tuple(variable.get_metadata()["axes"])
    return out


def last_valid(valid_BT: Array) -> jax.Array:
    """Returns the column [B] of each row's last real token; 0 on rows without one."""
    columns = jnp.arange(valid_BT.shape[1])
    return jnp.max(jnp.where(valid_BT.astype(bool), columns[None, :], 0), axis=1)


# Attention implementations that take `valid_BT` and a window instead of a mask.
KERNELS = {"splash": kernels.splash, "cudnn": kernels.cudnn}
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
        """Returns shapes and dtypes of the base.

        They are {layers: leaves stacked over L, outer: embedding, final norm, output projection}.
        """
        return _split(self.config, AdapterSpec()).base

    def base_axes(self) -> Tree:
        """Returns the logical axes of every base leaf, tuples of names."""
        return _split(self.config, AdapterSpec()).base_axes

    def abstract_lora(self, config: LoRAConfig) -> Tree:
        """Returns shapes and dtypes of an adapter's LoRA leaves."""
        return _split(self.config, AdapterSpec(config)).lora

    def lora_axes(self, config: LoRAConfig) -> Tree:
        """Returns the logical axes of an adapter's LoRA leaves, derived from the weights' axes."""
        return _split(self.config, AdapterSpec(config)).lora_axes

    @property
    def split_heads(self) -> bool:
        """Whether the mesh's tensor axis can split heads: whole ones, queries beside keys."""
        return self.mesh is None or self.config.kv_heads % self.mesh.shape["tensor"] == 0

    @functools.cache  # noqa: B019  models are few, and live as long as the process
    def base_shardings(self) -> dict[str, NamedSharding]:
        """Returns the sharding of every base leaf, keyed by path name."""
        return sharding.leaf_shardings(
            self.base_axes(), self.abstract_base(), self.mesh, self._pieces
        )

    @functools.cache  # noqa: B019  as above
    def lora_shardings(self) -> dict[str, NamedSharding]:
        """Returns the sharding of every possible LoRA leaf, keyed by path name.

        For adapters that are split like the weights that they belong to (`mesh.adapters=sharded`).
        """
        every = LoRAConfig(targets=",".join(LINEAR), dora=True)
        return sharding.leaf_shardings(
            self.lora_axes(every), self.abstract_lora(every), self.mesh, self._pieces
        )

    @property
    def _pieces(self) -> dict[str, int]:
        """Number of parts that the axes heads and kv_heads can be cut into.

        If key/value heads do not divide over devices, query heads stay whole too: a group of heads
        attends on one device.
        """
        return dict.fromkeys(("heads", "kv_heads"), self.config.kv_heads)

    def abstract_under(self, ranks: Mapping[str, int]) -> Tree:
        """Returns shapes of frozen pairs (`Adapter.under`), given the rank of each projection."""
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
        """Returns random base weights, N(0, 1/sqrt(in)), as before pre-training."""
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

        They are exactly equal for the inits b-zero and a-zero. base: needed for DoRA and PiSSA,
        which start from its weights; ValueError if it is missing.
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
            lora=lora_lib.init_lora(key, abstract, config, kernels, layers), config=config
        )
        if config.init != "pissa":
            return adapter
        return adapter.replace(under=lora_lib.frozen_pairs(adapter, self.config.layers, -1.0))

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

        dropout_key: None means no dropout.
        """
        return self._forward(
            base, adapter, tokens_BT, valid_BT, dropout_key, keep_cache=False, packing=packing
        )[0]

    def logits(
        self,
        base: Tree,
        adapter: Adapter | None,
        tokens_BT: Array,
        valid_BT: Array,
        dropout_key: Array | None = None,
    ) -> jax.Array:
        """Returns logits_BTV, float32; position t predicts token t + 1."""
        hidden_BTD = self.hidden(base, adapter, tokens_BT, valid_BT, dropout_key)
        return self._logits(base, adapter, hidden_BTD, self._place())

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
        """Returns logp_BT and entropy_BT of every token (`perl_jax.models.logprobs`).

        Logits exist for a few columns at a time: at most LOGIT_BYTES per device (CPU_LOGIT_BYTES on
        a CPU with a frozen output projection). If the output projection is trained, the backward
        pass computes them again. The entropy is a metric and has no gradient.

        Args:
            base: The frozen base.
            adapter: The adapter; None: the base itself.
            tokens_BT: Token ids.
            valid_BT: True on real tokens.
            temperature: Divides the logits.
            dropout_key: None: no dropout.
            start: First column that is computed; earlier columns are 0.
            packing: How the batch is packed. None: it is padded.
            wanted_BT: With packing: the tokens that are computed; others are 0.
        """
        place = self._place()
        hidden = self.hidden(base, adapter, tokens_BT, valid_BT, dropout_key, packing=packing)
        outer = self._outer(base, adapter)
        weight_DV = outer.output_matrix(place)
        head = lambda hidden_BCD: outer.logits(hidden_BCD, weight_DV, place)
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
        place_WY, back = select_tokens(packing, wanted_BT, number)
        hidden_WYD, token_WY = (
            packing.read_tokens(hidden, place_WY - 1),
            token_values(packing, tokens_BT, place_WY),
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
        """Returns score_B: the scalar head's output at each row's last real token."""
        last_B1 = last_valid(valid_BT)[:, None]
        hidden_WRD, _ = self._forward(
            base,
            adapter,
            tokens_BT,
            valid_BT,
            dropout_key,
            keep_cache=False,
            packing=packing,
            only_BR=last_B1,
        )
        return _head(adapter, hidden_WRD.reshape(tokens_BT.shape[0], -1))

    # Cached decoding.

    def prefill(
        self,
        base: Tree,
        adapter: Adapter | None,
        tokens_PS: Array,
        valid_PS: Array,
        max_new_tokens: int,
        samples: int = 1,
        kind: CacheKind = "auto",
    ) -> tuple[jax.Array, KVCache]:
        """Reads prompts; returns logits_PV of each prompt's next token, and a cache for decoding.

        Args:
            base: The frozen base.
            adapter: The adapter; None: the base itself.
            tokens_PS: Token ids of the prompts.
            valid_PS: True on real tokens.
            max_new_tokens: Number of cache columns per row for decoded tokens; layers with a window
                have at most the window.
            samples: Rows per prompt.
            kind: Dtype of the cache; auto: the activations' dtype.
        """
        place = self._place()
        hidden_PSD, kv = self._forward(base, adapter, tokens_PS, valid_PS, None, keep_cache=True)
        last_P1D = jnp.take_along_axis(hidden_PSD, last_valid(valid_PS)[:, None, None], axis=1)
        rows = samples * tokens_PS.shape[0]

        def part(window: int | None, stacks: tuple) -> WindowCache:
            """Returns the cache of the layers with this window, given their (keys, values)."""
            prompt_k, prompt_v = (
                place.cache(
                    map_stacks(
                        lambda x_LPSNK: cache_entry(jnp.swapaxes(x_LPSNK, -3, -2), kind), stack
                    )
                )
                for stack in stacks
            )
            taken, own = last_tokens(valid_PS, window), own_columns(max_new_tokens, window)
            return WindowCache(
                prompt_k=prompt_k,
                prompt_v=prompt_v,
                own_k=place.cache(
                    map_stacks(
                        lambda part: part.vacant(rows, own, turned=is_unstacked(prompt_k)), prompt_k
                    )
                ),
                own_v=place.cache(map_stacks(lambda part: part.vacant(rows, own), prompt_v)),
                prompt_visible_PS=taken(jnp.asarray(valid_PS, bool)),
                prompt_position_PS=taken(attention.positions(valid_PS)),
                own_visible_BC=jnp.zeros((rows, own), bool),
                own_position_BC=jnp.zeros((rows, own), jnp.int32),
                window=window,
            )

        position_B = jnp.repeat(jnp.sum(valid_PS.astype(jnp.int32), axis=1), samples)
        cache = KVCache(tuple(part(*pair) for pair in kv.items()), position_B, jnp.int32(0))
        return self._next_logits(base, adapter, last_P1D), cache

    def decode(
        self,
        base: Tree,
        adapter: Adapter | None,
        token_B: Array,
        cache: KVCache,
        kind: CacheKind = "auto",
    ) -> tuple[jax.Array, KVCache]:
        """Appends one token to every row; returns logits_BV of the next token, and the cache."""
        outer, place = self._outer(base, adapter), self._place(stationary=True)
        kinds = LayerKinds.of(self.config, cache.position_B[:, None])
        visible = {
            part.window: (part.visible(cache.position_B), part.column(cache.step))
            for part in cache.parts
        }
        inlined = is_unstacked(cache.parts[0].own_k)

        def layer(block, x, leaves, window):
            """Runs one layer for the new token, with the layer's cache."""
            part, kind_of_layer = leaves
            visible_BS, column = visible[window]

            def attend(q, k, v):
                """Returns the attention output, and what the cache needs of this layer."""
                # An inlined layer writes the token into its cache before reading it, in place. In a
                # scan that would return the whole cache of every layer.
                prompt, own = part[:2], part[2:]
                own = (
                    tuple(
                        write_token(kept, new, column, kind)
                        for kept, new in zip(own, (k, v), strict=True)
                    )
                    if inlined
                    else own
                )
                heads = attend_cached(
                    q,
                    k,
                    v,
                    (*prompt, *own),
                    visible_BS,
                    self.config.attention_scale,
                    self.config.attention_cap,
                )
                return heads, own if inlined else (k, v)

            return block.decode(x, kinds.rotary(kind_of_layer), attend, place)

        caches = {part.window: part.by_layer for part in cache.parts}
        x_B1D, kept = self._by_window(
            layer,
            base,
            adapter,
            outer.embed(token_B[:, None], place),
            caches,
            kinds.by_layer,
            place,
        )

        def updated(part: WindowCache) -> WindowCache:
            """Returns a part of the cache with the new token in it."""
            place_of = (cache.position_B, cache.step)
            part = (
                part.advanced(*kept[part.window], *place_of)
                if inlined
                else part.appended(*kept[part.window], *place_of, kind)
            )
            return part.replace(own_k=place.cache(part.own_k), own_v=place.cache(part.own_v))

        after = KVCache(tuple(map(updated, cache.parts)), cache.position_B + 1, cache.step + 1)
        return self._next_logits(base, adapter, outer.final_norm(x_B1D)), after

    # Helpers.

    def _place(self, stationary: bool = False) -> Placement:
        """Returns the sharding constraints of a pass."""
        return Placement(self.mesh, self.split_heads, stationary)

    def _logits(
        self, base: Tree, adapter: Adapter | None, hidden_BTD: Array, place: Placement
    ) -> jax.Array:
        """Returns logits from hidden states after the final norm."""
        outer = self._outer(base, adapter)
        return outer.logits(hidden_BTD, outer.output_matrix(place), place)

    def _next_logits(self, base: Tree, adapter: Adapter | None, hidden_B1D: Array) -> jax.Array:
        """Returns logits_BV to sample from, given the last hidden states."""
        place = self._place()
        if is_unstacked(_weights(base, adapter)["layers"]) and self.config.tied_embeddings:
            return self._outer(base, adapter).logits_by_columns(hidden_B1D[:, 0])
        return place.next_logits(self._logits(base, adapter, hidden_B1D, place)[:, 0])

    def _outer(self, base: Tree, adapter: Adapter | None) -> Embedder:
        """Returns the embedder module with its weights."""
        return nnx.merge(_split(self.config, AdapterSpec()).outer, _weights(base, adapter)["outer"])

    def _forward(
        self,
        base,
        adapter,
        tokens_BT,
        valid_BT,
        dropout_key,
        keep_cache,
        packing=None,
        only_BR=None,
    ):
        """Returns hidden states after the final norm, and keys and values if `keep_cache`.

        Keys and values come as a dict from each window to (keys, values) of the layers with it,
        restricted to the last tokens that the window holds (`cache.last_tokens`). only_BR: columns
        of each row whose hidden states are wanted. The last layer then computes only these, and the
        result is [B, R, D]; with packing, [W, b R, D].
        """
        chex.assert_rank([tokens_BT, valid_BT], 2)
        chex.assert_equal_shape([tokens_BT, valid_BT])
        own = (lambda x_BT: x_BT) if packing is None else packing.packed
        tokens, positions = own(tokens_BT), own(attention.positions(valid_BT))
        kinds = LayerKinds.of(self.config, positions)
        place = self._place()
        keys = None if dropout_key is None else jax.random.split(dropout_key, self.config.layers)
        read_BT = jnp.asarray(valid_BT, bool) if packing is None else packing.own_BT

        def layer(block, x, leaves, read_BT=read_BT, only_WR=None):
            """Runs one layer over whole sequences; returns x, and (keys, values) to keep."""
            key, kind = leaves
            x, kv = block(
                x,
                kinds.rotary(kind),
                self._attend(kinds, kind, valid_BT, read_BT, packing),
                key,
                place,
                only_WR,
            )
            return x, kv if keep_cache else None

        outer = self._outer(base, adapter)
        if keep_cache:
            taken = {
                window: last_tokens(valid_BT, window)
                for window in dict.fromkeys(self.config.windows)
            }

            def kept(block, x, leaves, window):
                """Runs one layer; returns x, and the (keys, values) of the window's tokens."""
                x, kv = layer(block, x, leaves)
                return x, tuple(map(taken[window], kv))

            x, kv = self._by_window(
                kept,
                base,
                adapter,
                outer.embed(tokens, place),
                None,
                kinds.by_layer,
                place,
                backward=True,
            )
            return outer.final_norm(x), kv

        last = None
        if only_BR is not None:
            only_WR = only_BR if packing is None else packing.packed_index(only_BR)
            # With full tuning the last layer stays in the stack: taking it out would copy the other
            # layers' weights and their gradients.
            if adapter is None or adapter.weights is None:
                only_WU = jnp.any(
                    jnp.arange(tokens.shape[1])[None, None, :] == only_WR[:, :, None], axis=1
                )
                only_BT = only_WU if packing is None else packing.spread(only_WU) & read_BT
                last = functools.partial(layer, read_BT=only_BT, only_WR=only_WR)

        x, _ = self._scan(
            layer,
            base,
            adapter,
            outer.embed(tokens, place),
            (keys, kinds.by_layer),
            place,
            backward=True,
            last=last,
        )
        if only_BR is not None and last is None:
            x = gather(x, only_WR)
        return outer.final_norm(x), None

    def _attend(
        self,
        kinds: LayerKinds,
        kind: Tree | None,
        valid_BT: Array,
        read_BT: Array,
        packing: Packing | None,
    ) -> Attend:
        """Returns one layer's attention function over whole sequences.

        Its implementation is that of the config. read_BT: queries whose output is used.
        """
        whole = self.mesh is None or self.mesh.size == 1
        if packing is not None and not (whole and self.config.attention == "blocked"):
            return packing.unpacked(self._attend(kinds, kind, valid_BT, read_BT, None))
        config = self.config
        settings = {"scale": config.attention_scale, "cap": config.attention_cap}
        if config.attention not in KERNELS:
            positions_BT = attention.positions(valid_BT)
            mask_BTS = kinds.mask(kind, attention.causal_mask(valid_BT), positions_BT, positions_BT)
            if config.attention == "plain":
                return functools.partial(attention.attend, mask_BTS=mask_BTS, **settings)
            settings |= {"read_BT": read_BT, "wide": platform_of(self.mesh) != "cpu"}
            if whole:
                return functools.partial(
                    attention.attend_blocked, mask_BTS=mask_BTS, packing=packing, **settings
                )
            return functools.partial(kernels.blocked, mask_BTS=mask_BTS, mesh=self.mesh, **settings)
        over = functools.partial(
            KERNELS[config.attention], valid_BT=valid_BT, mesh=self.mesh, **settings
        )
        window = kernels.effective_window(
            config.window if config.windowed else None, valid_BT.shape[1]
        )
        if window is None or kinds.by_layer is None:
            return functools.partial(over, window=window)
        windowed = kind["window"] == config.window
        return lambda q, k, v: kernels.cond_on_window(
            windowed, lambda: over(q, k, v, window=window), lambda: over(q, k, v, window=None)
        )

    def _rematerialised(self, body: Callable, picked: bool) -> Callable:
        """Returns a layer function that keeps for the backward pass only what `remat` says.

        It never keeps gathered weights. picked: whether the layer takes its weights out of a stack.
        """
        if self.config.remat == "none":
            if not picked and (self.mesh is None or self.mesh.shape["fsdp"] == 1):
                return body
            return jax.checkpoint(body, prevent_cse=False, policy=save_all_but_weights)
        policies = jax.checkpoint_policies
        kept = {
            "dots": policies.dots_with_no_batch_dims_saveable,
            "full": policies.nothing_saveable,
        }[self.config.remat]
        return jax.checkpoint(body, prevent_cse=False, policy=kept)

    def _scan(
        self,
        layer: Callable,
        base: Tree,
        adapter: Adapter | None,
        x: jax.Array,
        per_layer: Tree,
        place: Placement,
        backward: bool = False,
        last: Callable | None = None,
    ):
        """Runs all layers; returns the final x and the layers' outputs, stacked.

        Layers with and without an adapter form runs, with one scan per run. Layers below the lowest
        adapted one have no backward pass, because nothing in them is trained.

        Args:
            layer: (block, x, entries of `per_layer`) -> (x, output).
            base: The frozen base.
            adapter: The adapter.
            x: Input of the first layer.
            per_layer: Leaves [L, ...], or None, that each layer gets its own entry of.
            place: Sharding constraints.
            backward: Whether there may be a backward pass; only then `unroll` inlines layers.
            last: Replaces `layer` for the last layer; its x may have another shape.
        """
        number = self.config.layers
        weights, under, adapted_layers, block_of = self._read(base, adapter, place)
        if is_unstacked(weights):
            return self._inlined(
                layer,
                block_of,
                (weights, under, per_layer),
                None if adapter is None else adapter.lora,
                adapted_layers,
                x,
                last,
            )
        outs = []
        for start, stop, adapted in adapter_runs(adapted_layers, number, last is not None):
            lora = None
            if adapted:
                first = adapted_layers.index(start)
                lora = jax.tree.map(
                    lambda leaf: leaf[first : first + stop - start], adapter.lora["layers"]
                )
            whole = stop - start == number
            through = layer if last is None or stop < number else last

            # Each layer picks its own weights: slicing a run out of the stack would copy the run.
            def body(x, inputs):
                """Runs one layer of the scan."""
                index, mine, leaves = inputs
                block_weights, block_under, leaves = (
                    leaves
                    if whole
                    else jax.tree.map(
                        functools.partial(_picked, index), (weights, under, per_layer)
                    )
                )
                return through(block_of(block_weights, mine, block_under), x, leaves)

            body = self._rematerialised(body, picked=not whole) if backward else body
            index_L = jnp.arange(start, stop)
            inputs = (index_L, lora, (weights, under, per_layer) if whole else None)
            if through is last:
                x, out = body(x, jax.tree.map(lambda leaf: leaf[0], inputs))
                outs.append(jax.tree.map(lambda leaf: leaf[None], out))
                continue
            x, out = jax.lax.scan(
                body, x, inputs, unroll=min(self.config.unroll, stop - start) if backward else 1
            )
            outs.append(out)
        return x, outs[0] if len(outs) == 1 else jax.tree.map(
            lambda *parts: jnp.concatenate(parts), *outs
        )

    def _read(
        self, base: Tree, adapter: Adapter | None, place: Placement
    ) -> tuple[Tree, Tree | None, tuple[int, ...], Callable]:
        """Returns (layer weights, frozen pairs, adapted layers, block_of).

        block_of(weights, LoRA leaves or None, frozen pairs or None) returns one layer's module,
        with its leaves sharded as `place` reads them.
        """
        weights = _weights(base, adapter)["layers"]
        adapted_layers = (
            ()
            if adapter is None or adapter.lora is None
            else adapter.config.adapted_layers(self.config.layers)
        )
        under = None if adapter is None or adapter.under is None else adapter.under["layers"]
        targets = () if under is None else tuple(lora_lib.under_ranks(under))
        # Trained weights are moved in the activations' dtype; frozen ones already have it.
        moved = None if adapter is None or adapter.weights is None else self.config.dtype
        attention = (weights.layers[0] if is_unstacked(weights) else weights)["attention"]
        fused = (
            tuple(name for name in GROUPS if "up" in attention[name])
            if "qkv" in attention
            else None
        )
        unstacked = is_unstacked(weights)
        base_places, lora_places = (
            ({}, {})
            if unstacked or self.mesh is None
            else map(_of_layers, (self.base_shardings(), self.lora_shardings()))
        )

        def block_of(block_weights: Tree, mine: Tree | None, block_under: Tree | None) -> Block:
            """Returns the module of one layer with its weights."""
            graph = _split(
                self.config, AdapterSpec(None if mine is None else adapter.config, targets, fused)
            ).block
            if not unstacked:
                block_weights, mine = (
                    place.weights(block_weights, base_places, moved),
                    place.weights(mine, lora_places),
                )
            return nnx.merge(
                graph, *(s for s in (block_weights, mine, block_under) if s is not None)
            )

        return weights, under, adapted_layers, block_of

    def _by_window(
        self,
        layer: Callable,
        base: Tree,
        adapter: Adapter | None,
        x: jax.Array,
        caches: Mapping[int | None, Tree] | None,
        per_layer: Tree,
        place: Placement,
        backward: bool = False,
    ) -> tuple[jax.Array, dict[int | None, Tree]]:
        """Runs all layers like `_scan`, with each layer's window as a static argument.

        Returns x, and a dict from each window to the stacked outputs of the layers with it. If
        layers differ in their window, they form scans of repeated layers
        (`layer_kinds.periodic_scans`), without a backward pass.

        Args:
            layer: (block, x, (cache entries of the layer, entries of `per_layer`), window) -> (x,
                output).
            base: The frozen base.
            adapter: The adapter.
            x: Input of the first layer.
            caches: For each window, leaves stacked over the layers with it. None: no cache.
            per_layer: Leaves [L, ...], or None.
            place: Sharding constraints.
            backward: Whether there may be a backward pass.
        """
        windows = self.config.windows
        numbers = {
            window: [index for index, other in enumerate(windows) if other == window]
            for window in windows
        }
        if is_unstacked(_weights(base, adapter)["layers"]):
            own = [
                None if caches is None else take_layer(caches[window], numbers[window].index(index))
                for index, window in enumerate(windows)
            ]
            through = lambda block, x, leaves: layer(block, x, leaves[:2], leaves[2])
            x, outs = self._scan(
                through,
                base,
                adapter,
                x,
                (Unstacked(tuple(own)), per_layer, Unstacked(windows)),
                place,
            )
            return x, {window: select_layers(outs, found) for window, found in numbers.items()}
        if len(numbers) == 1:
            through = lambda block, x, leaves: layer(block, x, leaves, windows[0])
            x, out = self._scan(
                through,
                base,
                adapter,
                x,
                (None if caches is None else caches[windows[0]], per_layer),
                place,
                backward=backward,
            )
            return x, {windows[0]: out}
        weights, under, adapted_layers, block_of = self._read(base, adapter, place)
        # Index of each layer among those with its window.
        order_L = jnp.array(
            [numbers[window].index(index) for index, window in enumerate(windows)], jnp.int32
        )
        outs: dict[int | None, list[Tree]] = {window: [] for window in numbers}
        scans = [
            (*scan, adapted)
            for first, last, adapted in adapter_runs(adapted_layers, self.config.layers)
            for scan in periodic_scans(windows, first, last)
        ]
        for start, stop, period, adapted in scans:
            lora, alike = None, windows[start : start + period]
            if adapted:
                first = adapted_layers.index(start)
                in_turns = lambda leaf: leaf[first : first + stop - start].reshape(
                    -1, period, *leaf.shape[1:]
                )
                lora = jax.tree.map(in_turns, adapter.lora["layers"])

            def turn(x, inputs):
                """Runs the consecutive layers of one repetition of the scan."""
                index, mine, made = *inputs, []
                for number, window in enumerate(alike):
                    block_weights, block_under, order, leaves = jax.tree.map(
                        functools.partial(_picked, index + number),
                        (weights, under, order_L, per_layer),
                    )
                    own = (
                        None
                        if caches is None
                        else jax.tree.map(functools.partial(_picked, order), caches[window])
                    )
                    block = block_of(
                        block_weights,
                        None if mine is None else take_layer(mine, number),
                        block_under,
                    )
                    x, out = layer(block, x, (own, leaves), window)
                    made.append(out)
                return x, made

            x, made = jax.lax.scan(turn, x, (jnp.arange(start, stop, period), lora))
            for window in dict.fromkeys(alike):
                mine = [out for out, other in zip(made, alike, strict=True) if other == window]
                outs[window].append(
                    jax.tree.map(
                        lambda *leaves: jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:]),
                        *mine,
                    )
                )
        return x, {
            window: jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)
            for window, found in outs.items()
        }

    def _inlined(
        self,
        layer: Callable,
        block_of: Callable,
        stacks: Tree,
        lora: Tree | None,
        adapted_layers: tuple[int, ...],
        x: jax.Array,
        last: Callable | None,
    ):
        """Runs unstacked layers one after the other, as `_scan` runs stacked ones.

        The outputs are unstacked too (`stacks.Unstacked`).
        """
        outs = []
        for index in range(self.config.layers):
            adapted = index in adapted_layers
            mine = take_layer(lora["layers"], adapted_layers.index(index)) if adapted else None
            block_weights, block_under, leaves = take_layer(stacks, index)
            block = block_of(block_weights, mine, block_under)
            x, out = (last if last is not None and index == self.config.layers - 1 else layer)(
                block, x, leaves
            )
            outs.append(out)
        return x, unstacked_outputs(outs)


def _picked(index: jax.Array, leaf_L: Array) -> jax.Array:
    """Returns entry `index` of a leaf that is stacked over layers."""
    return jax.lax.dynamic_index_in_dim(leaf_L, index, keepdims=False)


def _of_layers(places: Mapping[str, NamedSharding]) -> dict[str, NamedSharding]:
    """Returns the shardings of leaves of the layers, keyed by path name within a layer."""
    return {
        name.removeprefix("layers/"): place
        for name, place in places.items()
        if name.startswith("layers/")
    }


def _weights(base: Tree, adapter: Adapter | None) -> Tree:
    """Returns the weights to read: the base's, or in full tuning the adapter's."""
    return base if adapter is None or adapter.weights is None else adapter.weights


def _head(adapter: Adapter | None, hidden: Array) -> jax.Array:
    """Returns the scalar head's output for hidden states; raises ValueError if there is no head."""
    if adapter is None or adapter.head is None:
        raise ValueError(
            "This role has no scalar head; a score or a value needs an adapter with one."
        )
    return (
        precision.matmul(hidden.astype(jnp.float32), adapter.head["kernel"]) + adapter.head["bias"]
    )


def full_weights(base: Tree) -> Adapter:
    """Returns an adapter for full tuning: a trainable float32 copy of the whole base.

    It is float32 whatever the base's dtype, because bfloat16 would round small updates away.
    """
    return Adapter(
        weights=jax.tree.map(lambda leaf: jnp.array(leaf, dtype=jnp.float32, copy=True), base)
    )


def cast_frozen_role(adapter: Adapter, dtype: str) -> Adapter:
    """Returns a role that is read but not trained, with its full-tuning matrices in `dtype`.

    The results are the same in less memory, because matrices are cast to the activations' dtype
    where they are used. A role without full weights is returned unchanged.
    """
    if adapter.weights is None:
        return adapter
    cast = lambda name, leaf: (
        leaf.astype(dtype) if name.endswith(("kernel", "embedding", "lm_head")) else leaf
    )
    return adapter.replace(weights=trees.map_named(cast, adapter.weights))
