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

import jax
import jax.numpy as jnp
import numpy as np

from perl_jax import errors
from perl_jax.adapters import combine
from perl_jax.adapters.lora import Adapter
from perl_jax.generation import fused
from perl_jax.generation.config import SamplingConfig
from perl_jax.generation.prepare import prepare_for_decoding
from perl_jax.generation.sampling import Rollout, make_rollout
from perl_jax.generation.slots import (
    admit_prompts,
    constrained_slots,
    decode_chunk,
    keep_slots,
    vacant_slots,
)
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import hosts, sharding
from perl_jax.runtime.platforms import decoding_options
from perl_jax.runtime.programs import LENGTHS, Program
from perl_jax.types import Array, Prompts, Tree

# How often the number of slots may be halved when no prompts wait; each size compiles once more.
HALVINGS = 4


@dataclasses.dataclass(frozen=True)
class Admission:
    """New prompts that enter together: A prompts, and the slots of their G samples each.

    Attributes:
        tokens_AS: Token ids of the prompts.
        valid_AS: True on real tokens.
        slot_AG: Slot of each sample; -1: no sample, the entry is filler.
        row_AG: Index in the rollout of each sample's row.
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
        samples: Number of responses per prompt.
        slots: Number of responses that are decoded at the same time.
        chunk: Largest number of decoding steps before the host checks which rows have ended.
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
        constrain, options = (
            functools.partial(constrained_slots, lm),
            decoding_options(lm.mesh, quantised),
        )
        self.merge = Program("merge", combine.merge)
        self.fuse = Program("fuse", fused.fuse)
        # Bounds on compilations: for each prompt length, with and without an adapter, there are two
        # sizes of admissions, HALVINGS + 1 sizes of batches, and the halvings between them.
        lengths = 2 * LENGTHS
        self.vacant = Program(
            "vacant", functools.partial(vacant_slots, lm, config, slots, constrain), limit=lengths
        )
        self.admit = Program(
            "admit",
            functools.partial(admit_prompts, lm, config, constrain),
            donate=(2,),
            limit=2 * lengths,
        )
        self.decode = Program(
            "decode",
            functools.partial(decode_chunk, lm, config, constrain, chunk),
            donate=(2,),
            limit=(HALVINGS + 1) * lengths,
            compiler_options=options,
        )
        self.fewer = Program(
            "fewer", functools.partial(keep_slots, constrain), limit=HALVINGS * LENGTHS
        )

    @property
    def compilations(self) -> int:
        """Number of compilations of all programs of the sampler, so far."""
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
        """Returns the `programs.Memory` of the compiled program with the largest peak.

        Only the programs that read prompts and decode count. None before the first call.
        """
        programs = [program for program in (self.admit, self.decode) if program.compilations]
        found = [account for program in programs if (account := program.memory()) is not None]
        return max(found, key=lambda account: account.peak, default=None)

    def __call__(
        self, base: Tree, adapter: Adapter | None, prompts: Prompts, key: Array
    ) -> Rollout:
        """Returns the rollout of the sampler's number of responses to each prompt.

        It equals the rollout of `sampling.sample`. The rows are in the order of the prompts, and a
        prompt's samples are consecutive. Prompts without real tokens get no response.

        Args:
            base: The frozen base.
            adapter: The policy; None: the base itself.
            prompts: The batch of prompts.
            key: Key data of the random key (`jax.random.key_data`).
        """
        tokens_PS, valid_PS = (
            np.asarray(jax.device_get(hosts.fetch(x)))
            for x in (prompts.tokens_BP, prompts.valid_BP)
        )
        # Only weights that change pass through a program (merge, fuse), which copies its outputs.
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
        """Number of prompts that enter together while other rows are decoded; at least 1.

        It is the number that fills an eighth of the slots. Reading one prompt takes about as long
        as reading several, so prompts wait for each other.
        """
        return max(1, self.slots // self.samples // 8)

    def _slots_to_fill(self, waiting: deque[int]) -> int:
        """Returns how many slots must be free before waiting prompts are read.

        Args:
            waiting: Indices of the prompts that wait.
        """
        return min(len(waiting), self._prompts_per_call) * self.samples

    def _can_halve(self, slots: int, active: int) -> bool:
        """Returns whether `active` rows can go on in half of `slots` slots.

        Half must hold the rows, divide over the parts that the mesh splits rows into, and not be
        below the original number of slots / 2^HALVINGS.
        """
        return slots % (2 * self.parts) == 0 and slots // 2 >= max(active, self.slots >> HALVINGS)

    def _admissions(
        self, responses: _Responses, waiting: deque[int], slot_row_B: np.ndarray
    ) -> list[Admission]:
        """Returns admissions of waiting prompts, made while enough slots are free.

        An admission has one of two sizes, so that it compiles twice: the prompts of all slots, or
        those of an eighth of the slots. Updates `waiting` and `slot_row_B` in place.

        Args:
            responses: Holds the prompts.
            waiting: Indices of the prompts that wait; admitted prompts are removed.
            slot_row_B: Index in the rollout of the row in each slot; -1: the slot is free.
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
    """Responses sampled so far, on the host, in the row order of the rollout.

    Args:
        tokens_PS: Token ids of the prompts.
        valid_PS: True on real tokens.
        samples: Number of responses per prompt.
        config: How tokens are sampled.
    """

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
        """Copies the responses that have ended from their slots into this object's arrays.

        Args:
            slot_row_B: Index in the rollout of the row in each slot.
            ended_B: True on slots whose row has ended.
            length_B: Number of sampled tokens in each slot.
            tokens_BC: Sampled tokens in each slot.
            logp_BC: Log-probabilities of the sampled tokens.
        """
        for slot in np.flatnonzero(ended_B):
            row, length = slot_row_B[slot], length_B[slot]
            self.tokens_BC[row, :length], self.logp_BC[row, :length] = (
                tokens_BC[slot, :length],
                logp_BC[slot, :length],
            )
            self.length_B[row] = length

    def rollout(self, steps: int, mesh: jax.sharding.Mesh | None) -> Rollout:
        """Returns the rollout of all rows, as `sampling.sample` would.

        Args:
            steps: Number of decoding steps.
            mesh: The rollout is sharded over it like a batch; None: the rollout stays on one
                device.
        """
        part = (lambda rows: rows) if mesh is None else sharding.row_share(mesh).part
        wide = lambda x_PS: part(np.repeat(x_PS, self.samples, axis=0))
        rollout = make_rollout(
            wide(self.tokens_PS).astype(np.int32),
            wide(self.valid_PS),
            part(self.tokens_BC),
            part(self.logp_BC),
            part(self.length_B),
            jnp.int32(steps),
            self.config,
        )
        if mesh is None:
            return rollout
        sequences, logp_BT, finished_B = sharding.put_batch(
            (rollout.sequences, rollout.logp_BT, rollout.finished_B), mesh
        )
        return Rollout(sequences, logp_BT, finished_B, rollout.steps)
