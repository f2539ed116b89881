"""Continuous batching against a loop that waits for the longest response of each batch.

Claim     Where the lengths of responses spread ten to one, sampling through slots makes more than
          twice the tokens a second of sampling batch by batch, and the very same tokens.
Command   python experiments/benchmarks/continuous.py
Hardware  2 CPU cores, 24 GiB, partly shared with other work (docs/log/speed_cpu.md)
Time      6 minutes
Numbers   400 tokens a second through 32 slots, 193 waiting, 2.07 times, and 198, 91, 2.17 on a
          slower host; lengths 2 to 122 from the 5th to the 95th percentile

The model is a Llama of 46 million random weights, so that its tokens are nearly uniform; a share
of the
vocabulary ends a response, which makes lengths geometric, cut at the room. Both ways have the same
prompts, keys and number of rows at a time, and take turns. What the machine allows is counted
and measured as in the contest
(`contest/ceiling.py`): every row always busy, so that weights come from memory as seldom as can
be. CONTEST_SIZE chooses the
model here, too.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import time
import types

import jax
import numpy as np

from perl_jax.adapters.lora import LoRAConfig
from perl_jax.generation import programs
from perl_jax.generation.config import RolloutConfig
from perl_jax.generation.sampling import Rollout
from perl_jax.hub.model import Model
from perl_jax.models.config import ModelConfig
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import sharding
from perl_jax.types import Prompts

sys.path.insert(0, str(pathlib.Path(__file__).parent / "contest"))
import ceiling
import ceiling_gpu
import work

MODEL = ModelConfig(
    vocab_size=work.SIZE.vocabulary,
    width=work.SIZE.width,
    ffn_width=work.SIZE.ffn,
    layers=work.SIZE.layers,
    heads=work.SIZE.heads,
    kv_heads=work.SIZE.kv_heads,
    head_dim=work.SIZE.head_dim,
    dtype=work.SIZE.dtype,
    param_dtype=work.SIZE.dtype,
)
PROMPT = 64


def made(rollouts: list[Rollout]) -> list[list[int]]:
    """The responses, row by row."""
    return [
        ids[mask].tolist()
        for r in rollouts
        for ids, mask in zip(
            np.array(r.sequences.tokens_BT), np.array(r.sequences.response_BT), strict=True
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=128, help="one response each")
    parser.add_argument(
        "--rows", type=int, default=32, help="decoded at a time; must divide the prompts"
    )
    parser.add_argument("--room", type=int, default=128, help="the longest response")
    parser.add_argument("--mean", type=float, default=32.0, help="mean length without the cut")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    lm = LanguageModel(
        MODEL, mesh=sharding.make_mesh(sharding.MeshConfig(data=1), devices=jax.devices()[:1])
    )
    base = jax.jit(lm.init_base)(jax.random.key(0))
    adapter = lm.init_adapter(jax.random.key(1), LoRAConfig())
    rng = np.random.default_rng(0)
    ids_PS = rng.integers(0, MODEL.vocab_size, (options.prompts, PROMPT), dtype=np.int32)
    # Both decode as the jobs do on this platform.
    tokenizer = types.SimpleNamespace(
        stop_ids=tuple(range(0, MODEL.vocab_size, round(options.mean))), pad_id=0
    )
    model = Model("random", lm, base, tokenizer, "-")
    waits, continuous = (
        programs.sample_program(model, options.room, 1.0, RolloutConfig(slots=slots))
        for slots in (None, options.rows)
    )
    keys = jax.random.split(jax.random.key(2), options.prompts // options.rows)
    given = lambda rows: Prompts(
        ids_PS[rows],
        np.ones((len(ids_PS[rows]), PROMPT), bool),
        np.zeros(len(ids_PS[rows]), np.int32),
    )

    def waiting() -> list[Rollout]:
        batches = [given(slice(i * options.rows, (i + 1) * options.rows)) for i in range(len(keys))]
        return [
            jax.block_until_ready(waits(base, adapter, b, jax.random.key_data(k)))
            for b, k in zip(batches, keys, strict=True)
        ]

    def through_slots() -> list[Rollout]:
        return [
            jax.block_until_ready(
                continuous(base, adapter, given(slice(None)), jax.random.key_data(keys[0]))
            )
        ]

    ways, speeds, responses, seen = (
        {"waiting": waiting, "slots": through_slots},
        {"waiting": [], "slots": []},
        {},
        [],
    )
    for round_number in range(options.rounds + 1):
        seen.append(ceiling_gpu.rates())
        for name, way in ways.items():
            began = time.perf_counter()
            responses[name] = made(way())
            # The first round compiles.
            if round_number:
                speeds[name].append(sum(map(len, responses[name])) / (time.perf_counter() - began))
    best = ceiling.best(seen)
    for name in ways:
        lengths = np.array(list(map(len, responses[name])))
        low, high = np.percentile(lengths, [5, 95])
        print(
            f"{name}: median {statistics.median(speeds[name]):.0f} tokens a second "
            f"({min(speeds[name]):.0f} to {max(speeds[name]):.0f}); "
            f"{lengths.sum()} tokens, lengths {low:.0f} to {high:.0f} (5 % to 95 %), longest "
            f"{lengths.max()}"
        )
        least = ceiling.sampling([(PROMPT, (length,)) for length in lengths.tolist()], options.rows)
        print(f"{ceiling.described(least)}; {ceiling.described_rates(best)}.")
        rate = lengths.sum() / statistics.median(speeds[name])
        print(f"At least {ceiling.shares(least, best, {name: rate})}.")
    same = responses["slots"][: options.rows] == responses["waiting"][: options.rows]
    print(
        "slots over waiting: "
        f"{statistics.median(speeds['slots']) / statistics.median(speeds['waiting']):.2f}; the "
        f"first batch's tokens are equal: {same}"
    )


if __name__ == "__main__":
    main()
