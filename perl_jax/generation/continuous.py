"""Continuous batching: a finished row leaves its slot of the batch to the next prompt.

`sampling.sample` decodes a batch until its longest response ends. If lengths differ widely, most
rows wait. Here a fixed number of slots is decoded in compiled chunks of steps. Between chunks the
host stores the finished responses and fills free slots with the next prompts (Yu et al. 2022,
"Orca"). When no prompt is left, the remaining rows move together into fewer slots.

For the same key the tokens equal those of `sampling.sample`: a row's draws depend on the key and
the row's number only, not on its slot or on the other rows. Every process of a run takes the same
decisions, because all of them see the same numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from perl_jax import errors
from perl_jax.adapters import lora
from perl_jax.adapters.lora import Adapter
from perl_jax.generation import fused
from perl_jax.generation.cache import KVCache, WindowCache
from perl_jax.generation.config import SamplingConfig
from perl_jax.generation.decoding import decode, prefill
from perl_jax.generation.prepare import prepare_for_decoding
from perl_jax.generation.sampling import (
    Rollout,
    is_stop,
    make_rollout,
    row_keys,
    sample_tokens,
    token_keys,
)
from perl_jax.models.language_model import LanguageModel
from perl_jax.models.placement import Placement
from perl_jax.runtime import hosts, sharding
from perl_jax.runtime.platforms import decoding_options
from perl_jax.runtime.programs import LENGTHS, Program
from perl_jax.types import Array, Prompts, Tree

# How often the number of slots may be halved when no prompts wait; each size compiles once more.
HALVINGS = 4


@flax.struct.dataclass
class Slots:
    """State of the slots on the device. B is the number of slots.

    Attributes:
        cache: Keys and values; each slot has its own prompt.
        token_B: Newest token of each row, the next to be decoded.
        row_B: Number of the row of the rollout that is in the slot.
        length_B: Number of tokens sampled so far.
        done_B: Whether the row has ended, or the slot is empty.
        tokens_BC: Sampled tokens.
        logp_BC: Log-probabilities of the sampled tokens.
    """

    cache: KVCache
    token_B: Array
    row_B: Array
    length_B: Array
    done_B: Array
    tokens_BC: Array
    logp_BC: Array


@dataclasses.dataclass(frozen=True)
class Admission:
    """A prompts that enter together, and the slots of their G samples each.

    Attributes:
        tokens_AS: Token ids of the prompts.
        valid_AS: True on real tokens.
        slot_AG: Slot of each sample; -1: no sample, the entry is filler.
        row_AG: Number of each sample's row in the rollout.
    """

    tokens_AS: np.ndarray
    valid_AS: np.ndarray
    slot_AG: np.ndarray
    row_AG: np.ndarray


class ContinuousSampler:
    """Samples responses with continuous batching: (base, adapter, prompts, key data) -> Rollout.

    Args:
        lm: The model's functions.
        config: How tokens are sampled.
        samples: Responses per prompt.
        slots: Number of slots.
        chunk: Largest number of decoding steps between two looks of the host at finished rows.
        quantised: Whether the base's matrices are quantised.

    Raises UserError if the number of slots is not a multiple of the samples per prompt, or of the
    parts that the mesh splits rows into.
    """

    # Assumed number of sampled tokens when merging is weighed against applying the adapter: so many
    # that merging pays wherever it is allowed.
    TOKENS = 2**30

    def __init__(
        self,
        lm: LanguageModel,
        config: SamplingConfig,
        samples: int,
        slots: int,
        chunk: int = 16,
        *,
        quantised: bool = False,
    ) -> None:
        errors.whole("slots", slots)
        parts = 1 if lm.mesh is None else lm.mesh.shape["data"] * lm.mesh.shape["fsdp"]
        errors.require(
            slots % samples == 0,
            f"slots is {slots}; it must be a multiple of the {samples} samples of a prompt.",
        )
        errors.require(
            slots % parts == 0,
            f"slots is {slots}; it must be a multiple of the mesh's data x fsdp = {parts} parts.",
        )
        self.lm, self.config, self.samples, self.slots, self.parts, self.chunk = (
            lm,
            config,
            samples,
            slots,
            parts,
            chunk,
        )
        place, options = functools.partial(_constrained, lm), decoding_options(lm.mesh, quantised)
        self.merge = Program("merge", lora.merge)
        self.fuse = Program("fuse", fused.fuse)
        # Bounds on compilations: for each prompt length, with and without an adapter, there are two
        # sizes of admissions, HALVINGS + 1 sizes of batches, and the halvings between them.
        lengths = 2 * LENGTHS
        self.vacant = Program(
            "vacant", functools.partial(_vacant, lm, config, slots, place), limit=lengths
        )
        self.admit = Program(
            "admit", functools.partial(_admit, lm, config, place), donate=(2,), limit=2 * lengths
        )
        self.decode = Program(
            "decode",
            functools.partial(_decode, lm, config, place, chunk),
            donate=(2,),
            limit=(HALVINGS + 1) * lengths,
            compiler_options=options,
        )
        self.fewer = Program("fewer", functools.partial(_fewer, place), limit=HALVINGS * LENGTHS)

    @property
    def compilations(self) -> int:
        """Number of compilations of all its programs."""
        return sum(
            program.compilations
            for program in (
                self.merge,
                self.fuse,
                self.vacant,
                self.admit,
                self.decode,
                self.fewer,
            )
        )

    def memory(self):
        """Returns the memory of the program with the largest peak; None before the first call."""
        found = [program.memory() for program in (self.admit, self.decode) if program.compilations]
        return max(found, key=lambda account: account.peak, default=None)

    def __call__(
        self, base: Tree, adapter: Adapter | None, prompts: Prompts, key: Array
    ) -> Rollout:
        """Returns one response to each prompt, in the order of the prompts."""
        tokens_PS, valid_PS = (
            np.asarray(jax.device_get(hosts.fetch(x)))
            for x in (prompts.tokens_BP, prompts.valid_BP)
        )
        # Weights that are not merged are not passed through a program, which would copy them.
        base, adapter = prepare_for_decoding(
            self.lm, base, adapter, self.config, self.TOKENS, self.merge, self.fuse
        )
        responses = _Responses(tokens_PS, valid_PS.astype(bool), self.samples, self.config)
        waiting = deque(int(p) for p in np.flatnonzero(responses.valid_PS.any(axis=1)))
        state, slots = self.vacant(base, adapter, tokens_PS[:1]), self.slots
        slot_row_B, steps = np.full(slots, -1), 0
        while waiting or (slot_row_B >= 0).any():
            for admission in self._admissions(responses, waiting, slot_row_B):
                state = self.admit(base, adapter, state, *dataclasses.astuple(admission), key)
            active = int((slot_row_B >= 0).sum())
            # Decoding stops early once enough slots are free for the waiting prompts; if none wait,
            # once the batch can be halved.
            until = (
                slots - self._slots_to_fill(waiting)
                if waiting
                else active // 2
                if self._can_halve(slots, 1)
                else 0
            )
            state, done = self.decode(base, adapter, state, np.int32(min(until, active - 1)), key)
            done_B, length_B, taken = (np.asarray(jax.device_get(x)) for x in done)
            steps += int(taken)
            ended_B = done_B & (slot_row_B >= 0)
            if ended_B.any():
                responses.store(
                    slot_row_B,
                    ended_B,
                    length_B,
                    *(
                        np.asarray(jax.device_get(hosts.fetch(x)))
                        for x in (state.tokens_BC, state.logp_BC)
                    ),
                )
                slot_row_B[ended_B] = -1
            active = int((slot_row_B >= 0).sum())
            # One halving at a time: a program for every pair of sizes would be many more.
            while not waiting and active and self._can_halve(slots, active):
                slots //= 2
                stays = np.argsort(slot_row_B < 0, kind="stable")[:slots].astype(np.int32)
                state, slot_row_B = self.fewer(state, stays), slot_row_B[stays]
        return responses.rollout(steps, self.lm.mesh)

    @property
    def _prompts_per_call(self) -> int:
        """Number of prompts that enter together while other rows are decoded.

        Reading one prompt takes about as long as reading several, so prompts wait for each other.
        """
        return max(1, self.slots // self.samples // 8)

    def _slots_to_fill(self, waiting: deque[int]) -> int:
        """Returns the number of free slots from which on a call that reads prompts pays."""
        return min(len(waiting), self._prompts_per_call) * self.samples

    def _can_halve(self, slots: int, active: int) -> bool:
        """Returns whether half of the slots can hold `active` rows and is an allowed batch size."""
        return slots % (2 * self.parts) == 0 and slots // 2 >= max(active, self.slots >> HALVINGS)

    def _admissions(
        self, responses: _Responses, waiting: deque[int], slot_row_B: np.ndarray
    ) -> list[Admission]:
        """Takes prompts from the queue while enough slots are free, and assigns them.

        An admission has one of two sizes, so that it compiles twice: all slots, or an eighth of
        them. Updates `waiting` and `inside_B`, the row in each slot (-1: none).
        """
        out = []
        free = deque(np.flatnonzero(slot_row_B < 0).tolist())
        while waiting and len(free) >= self._slots_to_fill(waiting):
            all_free = len(free) == len(slot_row_B)
            number = self.slots // self.samples if all_free else self._prompts_per_call
            slot_AG, row_AG = (
                np.full((number, self.samples), -1, np.int32),
                np.zeros((number, self.samples), np.int32),
            )
            prompts = np.zeros(number, np.int64)
            for entry in range(number):
                if waiting and len(free) >= self.samples:
                    prompts[entry] = waiting.popleft()
                    slot_AG[entry] = [free.popleft() for _ in range(self.samples)]
                    row_AG[entry] = prompts[entry] * self.samples + np.arange(self.samples)
                    slot_row_B[slot_AG[entry]] = row_AG[entry]
            out.append(
                Admission(
                    responses.tokens_PS[prompts], responses.valid_PS[prompts], slot_AG, row_AG
                )
            )
        return out


class _Responses:
    """Responses sampled so far, on the host, in the row order of the rollout."""

    def __init__(
        self, tokens_PS: np.ndarray, valid_PS: np.ndarray, samples: int, config: SamplingConfig
    ) -> None:
        self.tokens_PS, self.valid_PS, self.samples, self.config = (
            tokens_PS,
            valid_PS,
            samples,
            config,
        )
        rows = len(tokens_PS) * samples
        self.tokens_BC = np.full((rows, config.max_new_tokens), config.pad_id, np.int32)
        self.logp_BC = np.zeros((rows, config.max_new_tokens), np.float32)
        self.length_B = np.zeros(rows, np.int32)

    def store(
        self,
        slot_row_B: np.ndarray,
        ended_B: np.ndarray,
        length_B: np.ndarray,
        tokens_BC: np.ndarray,
        logp_BC: np.ndarray,
    ) -> None:
        """Copies the rows that have ended from their slots.

        Args:
            inside_B: Row in each slot.
            over_B: Slots whose row has ended.
            length_B: Number of tokens in each slot.
            tokens_BC: Tokens in each slot.
            logp_BC: Their log-probabilities.
        """
        for slot in np.flatnonzero(ended_B):
            row, length = slot_row_B[slot], length_B[slot]
            self.tokens_BC[row, :length], self.logp_BC[row, :length] = (
                tokens_BC[slot, :length],
                logp_BC[slot, :length],
            )
            self.length_B[row] = length

    def rollout(self, steps: int, mesh: jax.sharding.Mesh | None) -> Rollout:
        """Returns all rows as `sampling.sample` would; on a mesh they are sharded like a batch."""
        part = (lambda rows: rows) if mesh is None else sharding.row_share(mesh).part
        wide = lambda x_PS: part(np.repeat(x_PS, self.samples, axis=0))
        responses = [part(x) for x in (self.tokens_BC, self.logp_BC, self.length_B)]
        rollout = make_rollout(
            wide(self.tokens_PS).astype(np.int32),
            wide(self.valid_PS),
            *responses,
            jnp.int32(steps),
            self.config,
        )
        if mesh is None:
            return rollout
        rows = sharding.put_batch((rollout.sequences, rollout.logp_BT, rollout.finished_B), mesh)
        return Rollout(*rows, rollout.steps)


def _vacant(
    lm: LanguageModel,
    config: SamplingConfig,
    slots: int,
    place,
    base: Tree,
    adapter: Adapter | None,
    prompt_1S: Array,
) -> Slots:
    """Returns empty slots for prompts of the given number of columns.

    Only the shapes of base, adapter and prompt are used.
    """

    def read() -> KVCache:
        """Returns the cache that `prefill` would give; only its shapes are used."""
        tokens_BS = jnp.zeros((slots, prompt_1S.shape[1]), jnp.int32)
        return prefill(
            lm, base, adapter, tokens_BS, tokens_BS == 0, config.max_new_tokens, kind=config.cache
        )[1]

    cache = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), jax.eval_shape(read))
    number_B, made_BC = (
        jnp.zeros(slots, jnp.int32),
        jnp.zeros((slots, config.max_new_tokens), jnp.int32),
    )
    return place(
        Slots(
            cache,
            number_B,
            number_B,
            number_B,
            jnp.ones(slots, bool),
            made_BC,
            made_BC.astype(jnp.float32),
        )
    )


def map_rows(
    state: Slots, layers: Callable[[Array], jax.Array], rows: Callable[[Array], jax.Array]
) -> Slots:
    """Returns the state with `layers` applied to arrays [L, slots, ...] and `rows` to others."""
    cache = state.cache

    def changed(part: WindowCache) -> WindowCache:
        """Returns a part of the cache with its layers and rows mapped."""
        return part.replace(
            **{
                name: jax.tree.map(layers, leaves)
                for name, leaves in zip(
                    ("prompt_k", "prompt_v", "own_k", "own_v"), part.by_layer, strict=True
                )
            },
            prompt_visible_PS=rows(part.prompt_visible_PS),
            prompt_position_PS=rows(part.prompt_position_PS),
            own_visible_BC=rows(part.own_visible_BC),
            own_position_BC=rows(part.own_position_BC),
        )

    return Slots(
        cache=cache.replace(
            parts=tuple(map(changed, cache.parts)), position_B=rows(cache.position_B)
        ),
        token_B=rows(state.token_B),
        row_B=rows(state.row_B),
        length_B=rows(state.length_B),
        done_B=rows(state.done_B),
        tokens_BC=rows(state.tokens_BC),
        logp_BC=rows(state.logp_BC),
    )


def _constrained(lm: LanguageModel, state: Slots) -> Slots:
    """Returns the state with sharding constraints.

    Rows are split like the mesh's rows; keys and values lie beside the heads that read them.
    """
    placed = map_rows(
        state,
        Placement(lm.mesh, lm.split_heads).cache,
        lambda x: sharding.constrain(x, lm.mesh, sharding.BATCH_AXES, *[None] * (x.ndim - 1)),
    )
    return placed.replace(
        cache=placed.cache.replace(step=sharding.constrain(state.cache.step, lm.mesh))
    )


def _admit(
    lm: LanguageModel,
    config: SamplingConfig,
    place,
    base: Tree,
    adapter: Adapter | None,
    state: Slots,
    tokens_AS: Array,
    valid_AS: Array,
    slot_AG: Array,
    row_AG: Array,
    key: Array,
) -> Slots:
    """Reads prompts into the slots of their samples, and samples each one's first token."""
    logits_AV, read = prefill(lm, base, adapter, tokens_AS, valid_AS, 1, kind=config.cache)
    samples, slots = slot_AG.shape[1], state.done_B.shape[0]
    # Filler gets a slot after the last one, where mode="drop" writes nothing.
    slot_X, row_X = jnp.where(slot_AG < 0, slots, slot_AG).reshape(-1), row_AG.reshape(-1)
    wide = lambda x, axis=0: jnp.repeat(x, samples, axis=axis)
    rows = lambda whole, new: whole.at[slot_X].set(new, mode="drop")
    layers = lambda whole, new: jax.tree.map(
        lambda x, y: x.at[:, slot_X].set(wide(y, 1), mode="drop"), whole, new
    )
    fresh = lambda array, value: rows(
        array, jnp.full((slot_X.shape[0], *array.shape[1:]), value, array.dtype)
    )

    def admitted(part: WindowCache, new: WindowCache) -> WindowCache:
        """Returns a part of the cache with the new prompts in their slots."""
        return part.replace(
            prompt_k=layers(part.prompt_k, new.prompt_k),
            prompt_v=layers(part.prompt_v, new.prompt_v),
            prompt_visible_PS=rows(part.prompt_visible_PS, wide(new.prompt_visible_PS)),
            prompt_position_PS=rows(part.prompt_position_PS, wide(new.prompt_position_PS)),
            # Forget what the slot's previous row decoded.
            own_visible_BC=fresh(part.own_visible_BC, False),
        )

    cache = state.cache.replace(
        parts=tuple(map(admitted, state.cache.parts, read.parts)),
        position_B=rows(state.cache.position_B, wide(read.position_B)),
    )
    first_X = token_keys(row_keys(jax.random.wrap_key_data(key), row_X), jnp.int32(0))
    token_X, logp_X = sample_tokens(first_X, wide(logits_AV), config)
    put = lambda array_BC, value_X: array_BC.at[slot_X, 0].set(value_X, mode="drop")
    return place(
        state.replace(
            cache=cache,
            token_B=rows(state.token_B, token_X),
            row_B=rows(state.row_B, row_X),
            length_B=fresh(state.length_B, 1),
            done_B=rows(
                state.done_B, is_stop(token_X, config.stop_ids) | (config.max_new_tokens == 1)
            ),
            tokens_BC=put(state.tokens_BC, token_X),
            logp_BC=put(state.logp_BC, logp_X),
        )
    )


def _decode(
    lm: LanguageModel,
    config: SamplingConfig,
    place,
    chunk: int,
    base: Tree,
    adapter: Adapter | None,
    state: Slots,
    until: Array,
    key: Array,
) -> tuple[Slots, tuple[Array, Array, Array]]:
    """Decodes at most `chunk` steps, fewer once no more than `until` rows are active.

    Returns the new state, and (done_B, length_B, number of steps) for the host.
    """
    key_B = row_keys(jax.random.wrap_key_data(key), state.row_B)
    each_B = jnp.arange(state.done_B.shape[0])

    def goes_on(carry: tuple[Array, Slots]) -> Array:
        """Whether another step is decoded."""
        step, state = carry
        return (step < chunk) & (jnp.sum(~state.done_B) > until)

    def advance(carry: tuple[Array, Slots]) -> tuple[Array, Slots]:
        """Decodes one token of every active row."""
        step, state = carry
        logits_BV, cache = decode(lm, base, adapter, state.token_B, state.cache, config.cache)
        token_B, logp_B = sample_tokens(token_keys(key_B, state.length_B), logits_BV, config)
        # A row that has ended writes after the last column, where mode="drop" writes nothing.
        column_B = jnp.where(state.done_B, config.max_new_tokens, state.length_B)
        put = lambda array_BC, value_B: array_BC.at[each_B, column_B].set(value_B, mode="drop")
        length_B = state.length_B + ~state.done_B
        done_B = (
            state.done_B | is_stop(token_B, config.stop_ids) | (length_B >= config.max_new_tokens)
        )
        made = {"tokens_BC": put(state.tokens_BC, token_B), "logp_BC": put(state.logp_BC, logp_B)}
        return step + 1, place(
            state.replace(cache=cache, token_B=token_B, length_B=length_B, done_B=done_B, **made)
        )

    steps, state = jax.lax.while_loop(goes_on, advance, (jnp.int32(0), state))
    known = lambda x: sharding.constrain(x, lm.mesh, *[None] * x.ndim)
    return place(state), (known(state.done_B), known(state.length_B), steps)


def _fewer(place, state: Slots, stays_Y: Array) -> Slots:
    """Returns the state with only the slots `stays_Y`, in that order."""
    return place(map_rows(state, lambda x: x[:, stays_Y], lambda x: x[stays_Y]))
