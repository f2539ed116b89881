"""A base in 8 and 4 bits: memory, and how far its outputs move.

Claim     Weight-only int8 changes next to nothing, 4 bits a little; blocks hardly help a base so
          narrow.
Command   python experiments/benchmarks/quantised.py --model MODEL --text FILE [--block 64]
Hardware  2 CPU cores, 24 GiB, partly shared with other work (docs/log/models.md)
Time      1 minute
Numbers   coffee base, nats a token: float32 1.4494 (7.69 MiB), int8 1.4475 (3.08), int4 1.4831, in
          blocks 1.4696, nf4 1.4679, 1.4708 (2.31, 2.38)
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from perl_jax.adapters.quantise import QuantiseConfig
from perl_jax.errors import UserError
from perl_jax.hub.model import ModelOptions, load_model
from perl_jax.models.logprobs import next_token_logprobs
from perl_jax.runtime import trees


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--text", required=True, help="a text file; its first tokens are what is measured on"
    )
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    configs = [
        ("none", None),
        *((kind, block) for kind in ("int8", "int4", "nf4") for block in (None, arguments.block)),
    ]
    exact_BTV = None
    print(
        f"{'base':<16}{'MiB':>9}{'share':>8}{'mean |error|':>14}{'largest':>10}{'nats a token':>14}"
    )
    for kind, block in configs:
        try:
            model = load_model(
                ModelOptions(model=arguments.model, quantise=QuantiseConfig(kind, block))
            )
        except UserError as error:
            print(f"{kind}, block {block}: {error}")
            continue
        length = min(256, model.lm.config.max_positions)
        ids = model.tokenizer.text_ids(pathlib.Path(arguments.text).read_text(encoding="utf-8"))
        rows = max(1, min(arguments.tokens, len(ids)) // length)
        tokens_BT = jnp.asarray(ids[: rows * length], jnp.int32).reshape(rows, -1)
        logits_BTV = jax.jit(model.lm.logits)(
            model.base, None, tokens_BT, jnp.ones_like(tokens_BT, bool)
        )
        loss = -float(jnp.mean(next_token_logprobs(logits_BTV, tokens_BT)[:, 1:]))
        size = trees.size_bytes(model.base)
        if exact_BTV is None:
            exact_BTV, whole = np.asarray(logits_BTV), size
        error_BTV = np.abs(np.asarray(logits_BTV) - exact_BTV)
        name = kind if block is None else f"{kind}, block {block}"
        print(
            f"{name:<16}{size / 2**20:>9.2f}{size / whole:>8.1%}"
            f"{error_BTV.mean():>14.4f}{error_BTV.max():>10.3f}{loss:>14.4f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
