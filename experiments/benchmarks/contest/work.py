"""The work of the contest: a Llama, its tokenizer and rows of text, the same wherever they are
written.

    python experiments/benchmarks/contest/work.py FOLDER

    FOLDER/model                a Llama of random weights (`MODEL`), with its tokenizer
    FOLDER/pairs_equal.jsonl    prompt, chosen, rejected: both sides of every pair have 256 tokens,
    half of them the prompt FOLDER/pairs_ragged.jsonl   the same number of tokens a batch, in rows
    of 64 to 512 (`RAGGED`) FOLDER/prompts.jsonl        prompt: 64 tokens each

Rows that follow each other are a batch: 8 pairs, or 8 prompts. All batches of a file have the same
lengths; of ragged ones the order differs. A side's length is that of prompt + response + one eos,
which every contender adds.

One word is one token, and a prompt ends in a space: a text can be joined, decoded and encoded again
without changing its tokens, and neither eos nor padding can grow out of words, or words out of
them. A word that is not in the vocabulary, such as two that were joined, has no id and is an error.
All counts are checked as rows are written.

The environment variable CONTEST_SIZE is a name of `SIZES`, for the driver and, through it, for
every contender: 46m (the default) for a CPU, 1b and 8b for a GPU, tiny to see that all of it runs.
Embeddings are tied in each.

Needs numpy, safetensors and tokenizers, and ml_dtypes to write bfloat16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

SEED = 0
BATCHES = 4
PAIRS = 8
PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 8, 4, 64, 128
KL_WEIGHT = 0.05
RANK, ALPHA, TARGETS = 8, 16, ("q_proj", "k_proj", "v_proj", "o_proj")

# Tokens of chosen and rejected, pair by pair.
EQUAL = ((256, 256),) * PAIRS
RAGGED = (
    (64, 96),
    (128, 160),
    (192, 160),
    (208, 256),
    (288, 240),
    (272, 336),
    (400, 336),
    (448, 512),
)

JOBS = {
    "reward-equal": "pairs_equal.jsonl",
    "reward-ragged": "pairs_ragged.jsonl",
    "rl-model": "prompts.jsonl",
    "rl-function": "prompts.jsonl",
    "generate": "prompts.jsonl",
}
# What a step reports as its tokens: of rewards those of all rows, without padding; elsewhere those
# that were sampled.
TOKENS = {
    "reward-equal": sum(map(sum, EQUAL)),
    "reward-ragged": sum(map(sum, RAGGED)),
    "rl-model": PROMPTS * SAMPLES * NEW_TOKENS,
    "rl-function": PROMPTS * SAMPLES * NEW_TOKENS,
    "generate": PROMPTS * SAMPLES * NEW_TOKENS,
}

PAD, EOS = "<pad>", "<eos>"


@dataclasses.dataclass(frozen=True)
class Size:
    """A Llama's shape, the dtype of its weights and activations, and what it is run on: cpu or
    gpu.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    dtype: str
    device: str

    @property
    def platform(self) -> str:
        """The device by the name that JAX and torch have for it."""
        return {"cpu": "cpu", "gpu": "cuda"}[self.device]


SIZES = {
    "46m": Size(12, 512, 8, 4, 64, 1536, 16384, "float32", "cpu"),
    "tiny": Size(2, 64, 4, 2, 16, 128, 512, "bfloat16", "cpu"),
    # The shapes of Llama 3.2 1B and Llama 3.1 8B.
    "1b": Size(16, 2048, 32, 8, 64, 8192, 128256, "bfloat16", "gpu"),
    "8b": Size(32, 4096, 32, 8, 128, 14336, 128256, "bfloat16", "gpu"),
}
NAME = os.environ.get("CONTEST_SIZE", "46m")
if NAME not in SIZES:
    raise SystemExit(f"CONTEST_SIZE is {NAME!r}; it must be one of {', '.join(SIZES)}.")
SIZE = SIZES[NAME]
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": SIZE.layers,
    "hidden_size": SIZE.width,
    "num_attention_heads": SIZE.heads,
    "num_key_value_heads": SIZE.kv_heads,
    "head_dim": SIZE.head_dim,
    "intermediate_size": SIZE.ffn,
    "vocab_size": SIZE.vocabulary,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "dtype": SIZE.dtype,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
WORDS = MODEL["vocab_size"] - 2


def layer_shapes() -> dict[str, tuple[int, int]]:
    """(out, in) of a layer's matrices, by their names in the checkpoint."""
    width, ffn, heads = (
        MODEL["hidden_size"],
        MODEL["intermediate_size"],
        MODEL["num_attention_heads"],
    )
    queries, keys = heads * MODEL["head_dim"], MODEL["num_key_value_heads"] * MODEL["head_dim"]
    attention = {
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
    }
    feed_forward = {"gate_proj": (ffn, width), "up_proj": (ffn, width), "down_proj": (width, ffn)}
    named = {f"self_attn.{name}": shape for name, shape in attention.items()}
    return named | {f"mlp.{name}": shape for name, shape in feed_forward.items()}


def weights(random: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
    """What lies around the layers, then layer by layer. Norms are 1, matrices normal with deviation
    1 / sqrt(in), and so is the embedding, which is the head as well.
    """
    width, dtype = MODEL["hidden_size"], np.float32
    if SIZE.dtype == "bfloat16":
        from ml_dtypes import bfloat16 as dtype

    def matrix(shape: tuple[int, int]) -> np.ndarray:
        return (random.standard_normal(shape, np.float32) / np.float32(math.sqrt(shape[1]))).astype(
            dtype
        )

    norm = lambda: np.ones(width, dtype)
    yield {
        "model.embed_tokens.weight": matrix((MODEL["vocab_size"], width)),
        "model.norm.weight": norm(),
    }
    for layer in range(MODEL["num_hidden_layers"]):
        matrices = {
            f"model.layers.{layer}.{name}.weight": matrix(shape)
            for name, shape in layer_shapes().items()
        }
        yield matrices | {
            f"model.layers.{layer}.{name}.weight": norm()
            for name in ("input_layernorm", "post_attention_layernorm")
        }


def write_weights(folder: pathlib.Path) -> None:
    """One file where they are few, otherwise one for each part and an index."""
    parts = weights(np.random.default_rng(SEED))
    if SIZE.device == "cpu":
        save_file(
            {name: tensor for part in parts for name, tensor in part.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        return
    places: dict[str, str] = {}
    for number, part in enumerate(parts):
        file = f"model-{number:05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )


def word_tokenizer() -> Tokenizer:
    """<pad> is 0, <eos> 1 and w0, w1, ... from 2 on; no bos, and no token for what is unknown."""
    vocabulary = {PAD: MODEL["pad_token_id"], EOS: MODEL["eos_token_id"]} | {
        f"w{word}": word + 2 for word in range(WORDS)
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(PAD, special=True), AddedToken(EOS, special=True)])
    return tokenizer


def write_model(folder: pathlib.Path, tokenizer: Tokenizer, weights: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if weights:
        write_weights(folder)
    (folder / "config.json").write_text(json.dumps(MODEL, indent=1))
    ids = {"eos_token_id": MODEL["eos_token_id"], "pad_token_id": MODEL["pad_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(ids))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"model_max_length": MODEL["max_position_embeddings"]})
    )


def prompt_tokens(pair: tuple[int, int]) -> int:
    """Of the prompt that chosen and rejected share: half of their mean length."""
    return sum(pair) // 4


def text(random: np.random.Generator, tokens: int) -> str:
    return " ".join(f"w{word}" for word in random.integers(0, WORDS, tokens))


def pairs(
    random: np.random.Generator, lengths: Sequence[tuple[int, int]]
) -> Iterator[dict[str, str]]:
    """Comparisons of the given lengths, BATCHES times, each time in another order."""
    for _ in range(BATCHES):
        for pair in random.permutation(len(lengths)):
            prompt = prompt_tokens(lengths[pair])
            chosen, rejected = (text(random, length - prompt - 1) for length in lengths[pair])
            yield {"prompt": text(random, prompt) + " ", "chosen": chosen, "rejected": rejected}


def check_pairs(
    tokenizer: Tokenizer, rows: Sequence[dict[str, str]], lengths: Sequence[tuple[int, int]]
) -> None:
    for start in range(0, len(rows), PAIRS):
        found = []
        for row in rows[start : start + PAIRS]:
            sides = [
                encoded(tokenizer, row["prompt"] + row[side] + EOS)
                for side in ("chosen", "rejected")
            ]
            prompt = encoded(tokenizer, row["prompt"])
            # Joined text and separate texts must have the same ids: contenders differ in which they
            # encode.
            apart = [
                prompt + encoded(tokenizer, row[side]) + [MODEL["eos_token_id"]]
                for side in ("chosen", "rejected")
            ]
            if sides != apart:
                raise ValueError("A prompt and its response have other tokens together than apart.")
            found.append(tuple(map(len, sides)))
        if sorted(found) != sorted(lengths):
            raise ValueError(
                f"A batch has pairs of {sorted(found)} tokens, not of {sorted(lengths)}."
            )


def check_prompts(tokenizer: Tokenizer, rows: Sequence[dict[str, str]]) -> None:
    found = {len(encoded(tokenizer, row["prompt"])) for row in rows}
    if found != {PROMPT_TOKENS}:
        raise ValueError(f"Prompts have {sorted(found)} tokens, not {PROMPT_TOKENS}.")


def encoded(tokenizer: Tokenizer, words: str) -> list[int]:
    """Ids of a text; ValueError where decoding does not give the same words."""
    ids = tokenizer.encode(words, add_special_tokens=False).ids
    spaced = words.replace(EOS, f" {EOS}").split()
    if tokenizer.decode(ids, skip_special_tokens=False).split() != spaced:
        raise ValueError(f"Decoding does not give back the text that starts with {words[:40]!r}.")
    return ids


def write(folder: pathlib.Path, weights: bool = True) -> None:
    """Writes all of it, unless this very work is there already (`work.json` says which is, and is
    written last).

    weights: False leaves the model's own out, for who makes them elsewhere.

    Another work's model goes first: loaders would take its weights where its files have other
    names. A folder `model` without `work.json` beside it is somebody else's: SystemExit.
    """
    description = {
        "seed": SEED,
        "batches": BATCHES,
        "model": MODEL,
        "equal": EQUAL,
        "ragged": RAGGED,
        "prompts": (PROMPTS, PROMPT_TOKENS),
    }
    description |= {} if weights else {"weights": "none"}
    description, marker = json.dumps(description, indent=1), folder / "work.json"
    if marker.exists() and marker.read_text() == description:
        return
    model = folder / "model"
    if model.exists() and not marker.exists():
        raise SystemExit(f"{model} exists and is not the contest's; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text("being written")
    shutil.rmtree(model, ignore_errors=True)
    tokenizer, random = word_tokenizer(), np.random.default_rng(SEED + 1)
    write_model(model, tokenizer, weights)
    equal, ragged = list(pairs(random, EQUAL)), list(pairs(random, RAGGED))
    prompts = [{"prompt": text(random, PROMPT_TOKENS) + " "} for _ in range(BATCHES * PROMPTS)]
    check_pairs(tokenizer, equal, EQUAL)
    check_pairs(tokenizer, ragged, RAGGED)
    check_prompts(tokenizer, prompts)
    for name, rows in (("pairs_equal", equal), ("pairs_ragged", ragged), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    marker.write_text(description)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
