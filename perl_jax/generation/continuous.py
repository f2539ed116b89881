"""Continuous batching: a finished row leaves the batch and the next prompt takes its slot.

`sampling.sample` decodes a batch until its longest response ends; where lengths differ widely most
of its rows wait. Here a fixed number of slots decodes in compiled chunks, and the host looks
between chunks who has finished, keeps what they made and lets the next prompts in (Yu et al. 2022,
"Orca"). When no prompt is left, the rows that still go on move together into fewer slots.

Tokens are those of `sampling.sample` for the same key: a row's draws depend on the key and its
number alone, not on its slot or on who is beside it. Every process of a run takes the same
decisions, from numbers that all of them have.
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
from perl_jax.adapters import lora as lora_lib
from perl_jax.adapters.lora import Adapter
from perl_jax.generation.sampling import (
    Rollout,
    SamplingConfig,
    as_rollout,
    choose,
    is_stop,
    row_keys,
    row_keys_at,
    sampled_from,
)
from perl_jax.models import fused, stacks
from perl_jax.models.cache import KVCache, Part
from perl_jax.models.language_model import LanguageModel
from perl_jax.models.placement import Placement
from perl_jax.runtime import hosts, sharding
from perl_jax.runtime.platforms import decoding_options
from perl_jax.runtime.programs import LENGTHS, Program
from perl_jax.types import Array, Prompts, Tree

# Sizes of a batch whose prompts have run out: all slots, and so many halvings. Each is a program to
# compile.
HALVINGS = 4


@flax.struct.dataclass
class Slots:
    """The rows that are being decoded.

    cache: of one prompt a slot. token_B: each row's newest token, the next to be decoded. row_B:
    the number of the row of the rollout that is in the slot. length_B: tokens it has; done_B:
    ended, or nobody is there.
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
    """Prompts that are let in together, and the slots their samples take; a slot of -1: nobody."""

    tokens_AS: np.ndarray
    valid_AS: np.ndarray
    slot_AG: np.ndarray
    row_AG: np.ndarray


class ContinuousSampler:
    """Samples `samples` responses to each prompt through `slots` slots: (base, adapter, prompts,
    key data) -> Rollout.

    chunk: the most decoding steps between two looks at who has finished. quantised: whether the
    base's matrices are. Raises UserError where the slots do not hold the samples of one prompt, or
    do not divide over the mesh's rows.
    """

    # Tokens that a merged copy is taken to be read for: many, so that it pays wherever it may.
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
        place, options = functools.partial(_placed, lm), decoding_options(lm.mesh, quantised)
        self.merge = Program("merge", lora_lib.merge)
        self.fuse = Program("fuse", fused.fuse)
        self.part = Program("part", stacks.apart)
        # For each length of prompts, with an adapter and without: admissions of two sizes, batches
        # of all sizes, the steps between these.
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
        """Of all its programs."""
        return sum(
            program.compilations
            for program in (
                self.merge,
                self.fuse,
                self.part,
                self.vacant,
                self.admit,
                self.decode,
                self.fewer,
            )
        )

    def memory(self):
        """Of the largest of its programs."""
        found = [program.memory() for program in (self.admit, self.decode) if program.compilations]
        return max(found, key=lambda account: account.peak, default=None)

    def __call__(
        self, base: Tree, adapter: Adapter | None, prompts: Prompts, key: Array
    ) -> Rollout:
        tokens_PS, valid_PS = (
            np.asarray(jax.device_get(hosts.whole(x)))
            for x in (prompts.tokens_BP, prompts.valid_BP)
        )
        # What is not merged goes through no program: that would copy it.
        base, adapter = sampled_from(
            self.lm, base, adapter, self.config, self.TOKENS, self.merge, self.fuse, self.part
        )
        made = _Made(tokens_PS, valid_PS.astype(bool), self.samples, self.config)
        waiting = deque(int(p) for p in np.flatnonzero(made.valid_PS.any(axis=1)))
        state, slots = self.vacant(base, adapter, tokens_PS[:1]), self.slots
        inside_B, steps = np.full(slots, -1), 0
        while waiting or (inside_B >= 0).any():
            for admission in self._admissions(made, waiting, inside_B):
                state = self.admit(base, adapter, state, *dataclasses.astuple(admission), key)
            active = int((inside_B >= 0).sum())
            # With prompts waiting, it is stopped for room for a call's worth of them; otherwise for
            # a halved batch.
            until = (
                slots - self._room(waiting)
                if waiting
                else active // 2
                if self._halves(slots, 1)
                else 0
            )
            state, done = self.decode(base, adapter, state, np.int32(min(until, active - 1)), key)
            done_B, length_B, taken = (np.asarray(jax.device_get(x)) for x in done)
            steps += int(taken)
            over_B = done_B & (inside_B >= 0)
            if over_B.any():
                made.keep(
                    inside_B,
                    over_B,
                    length_B,
                    *(
                        np.asarray(jax.device_get(hosts.whole(x)))
                        for x in (state.tokens_BC, state.logp_BC)
                    ),
                )
                inside_B[over_B] = -1
            active = int((inside_B >= 0).sum())
            # One halving after the other: from each size to every smaller one would be as many
            # programs as pairs.
            while not waiting and active and self._halves(slots, active):
                slots //= 2
                stays = np.argsort(inside_B < 0, kind="stable")[:slots].astype(np.int32)
                state, inside_B = self.fewer(state, stays), inside_B[stays]
        return made.rollout(steps, self.lm.mesh)

    @property
    def _some(self) -> int:
        """Prompts that are let in together while others are decoded: one at a time would be read at
        the cost of several.
        """
        return max(1, self.slots // self.samples // 8)

    def _room(self, waiting: deque[int]) -> int:
        """Free slots that are worth a call."""
        return min(len(waiting), self._some) * self.samples

    def _halves(self, slots: int, active: int) -> bool:
        """Whether half of the slots would hold so many rows and is a size that batches have."""
        return slots % (2 * self.parts) == 0 and slots // 2 >= max(active, self.slots >> HALVINGS)

    def _admissions(
        self, made: _Made, waiting: deque[int], inside_B: np.ndarray
    ) -> list[Admission]:
        """Takes prompts from the queue while there are slots for a call's worth of them, in calls
        of two sizes: all slots, or an eighth.
        """
        out = []
        free = deque(np.flatnonzero(inside_B < 0).tolist())
        while waiting and len(free) >= self._room(waiting):
            number = self.slots // self.samples if len(free) == len(inside_B) else self._some
            slot_AG, row_AG = (
                np.full((number, self.samples), -1, np.int32),
                np.zeros((number, self.samples), np.int32),
            )
            prompts = np.zeros(number, np.int64)
            for place in range(number):
                if waiting and len(free) >= self.samples:
                    prompts[place] = waiting.popleft()
                    slot_AG[place] = [free.popleft() for _ in range(self.samples)]
                    row_AG[place] = prompts[place] * self.samples + np.arange(self.samples)
                    inside_B[slot_AG[place]] = row_AG[place]
            out.append(Admission(made.tokens_PS[prompts], made.valid_PS[prompts], slot_AG, row_AG))
        return out


class _Made:
    """What has been sampled so far, on the host, by the rollout's row."""

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

    def keep(
        self,
        inside_B: np.ndarray,
        over_B: np.ndarray,
        length_B: np.ndarray,
        tokens_BC: np.ndarray,
        logp_BC: np.ndarray,
    ) -> None:
        """Takes over the rows that have ended."""
        for slot in np.flatnonzero(over_B):
            row, length = inside_B[slot], length_B[slot]
            self.tokens_BC[row, :length], self.logp_BC[row, :length] = (
                tokens_BC[slot, :length],
                logp_BC[slot, :length],
            )
            self.length_B[row] = length

    def rollout(self, steps: int, mesh: jax.sharding.Mesh | None) -> Rollout:
        """Every row, as `sampling.sample` gives it; on a mesh placed like a batch."""
        part = (lambda rows: rows) if mesh is None else sharding.row_share(mesh).part
        wide = lambda x_PS: part(np.repeat(x_PS, self.samples, axis=0))
        made = [part(x) for x in (self.tokens_BC, self.logp_BC, self.length_B)]
        rollout = as_rollout(
            wide(self.tokens_PS).astype(np.int32),
            wide(self.valid_PS),
            *made,
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
    """Slots without anybody, for prompts of so many columns; nothing of the arguments but their
    shapes is read.
    """

    def read() -> KVCache:
        tokens_BS = jnp.zeros((slots, prompt_1S.shape[1]), jnp.int32)
        return lm.prefill(
            base, adapter, tokens_BS, tokens_BS == 0, config.max_new_tokens, kind=config.cache
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


def rearranged(
    state: Slots, layers: Callable[[Array], jax.Array], rows: Callable[[Array], jax.Array]
) -> Slots:
    """The state with `layers` of every array [L, slots, ...] and `rows` of every other [slots,
    ...].
    """
    cache = state.cache
    layers = rows if cache.row_axis == 0 else layers

    def changed(part: Part) -> Part:
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


def _placed(lm: LanguageModel, state: Slots) -> Slots:
    """The state where it lives: rows over the mesh's rows, keys and values beside the heads that
    read them.
    """
    placed = rearranged(
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
    """Reads prompts and puts each one's keys and values into the slots of its samples, with the
    first token of each.
    """
    logits_AV, read = lm.prefill(base, adapter, tokens_AS, valid_AS, 1, kind=config.cache)
    samples, slots = slot_AG.shape[1], state.done_B.shape[0]
    # Nobody's slot lies behind the last one, where nothing is written.
    slot_X, row_X = jnp.where(slot_AG < 0, slots, slot_AG).reshape(-1), row_AG.reshape(-1)
    wide = lambda x, axis=0: jnp.repeat(x, samples, axis=axis)
    rows = lambda whole, new: whole.at[slot_X].set(new, mode="drop")
    axis = state.cache.row_axis
    own = (slice(None),) * axis + (slot_X,)
    stacks = lambda whole, new: jax.tree.map(
        lambda x, y: x.at[own].set(wide(y, axis), mode="drop"), whole, new
    )
    fresh = lambda array, value: rows(
        array, jnp.full((slot_X.shape[0], *array.shape[1:]), value, array.dtype)
    )

    def admitted(part: Part, new: Part) -> Part:
        return part.replace(
            prompt_k=stacks(part.prompt_k, new.prompt_k),
            prompt_v=stacks(part.prompt_v, new.prompt_v),
            prompt_visible_PS=rows(part.prompt_visible_PS, wide(new.prompt_visible_PS)),
            prompt_position_PS=rows(part.prompt_position_PS, wide(new.prompt_position_PS)),
            # What the slot's last row decoded is nobody's any more.
            own_visible_BC=fresh(part.own_visible_BC, False),
        )

    cache = state.cache.replace(
        parts=tuple(map(admitted, state.cache.parts, read.parts)),
        position_B=rows(state.cache.position_B, wide(read.position_B)),
    )
    first_X = row_keys_at(row_keys(jax.random.wrap_key_data(key), row_X), jnp.int32(0))
    token_X, logp_X = choose(first_X, wide(logits_AV), config)
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
    """At most `chunk` steps, fewer once no more than `until` rows go on; (done_B, length_B, steps)
    for the host.
    """
    key_B = row_keys(jax.random.wrap_key_data(key), state.row_B)
    each_B = jnp.arange(state.done_B.shape[0])

    def goes_on(carry: tuple[Array, Slots]) -> Array:
        step, state = carry
        return (step < chunk) & (jnp.sum(~state.done_B) > until)

    def advance(carry: tuple[Array, Slots]) -> tuple[Array, Slots]:
        step, state = carry
        logits_BV, cache = lm.decode(base, adapter, state.token_B, state.cache, config.cache)
        token_B, logp_B = choose(row_keys_at(key_B, state.length_B), logits_BV, config)
        # A row that is done writes behind the last column, where nothing is kept.
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
    """Only some of the slots, in the given order."""
    return place(rearranged(state, lambda x: x[:, stays_Y], lambda x: x[stays_Y]))
