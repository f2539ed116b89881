"""Tiny models for tests: a decoder whose weights matter, batches with every padding, adapters that
act.

All widths differ from each other, so that the shape of an array tells which weight it belongs to.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from perl_jax.adapters.lora import Adapter, LoRAConfig
from perl_jax.hub import weights as hf_checkpoint
from perl_jax.models.config import ModelConfig
from perl_jax.models.language_model import LanguageModel
from perl_jax.objectives import supervised
from perl_jax.objectives.losses import bradley_terry
from perl_jax.runtime import trees
from perl_jax.training.state import init_state
from perl_jax.training.step import train_step
from perl_jax.types import Tokens, Tree

# Query width 4 * 6 = 24 and key/value width 2 * 6 = 12.
CONFIG = ModelConfig(
    vocab_size=61,
    width=32,
    ffn_width=44,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=6,
    max_positions=64,
)
LM = LanguageModel(CONFIG)
LORA = LoRAConfig(rank=5, alpha=10.0, targets="all-linear")
# Every kind of padding in one batch: (its side, number of real tokens).
ROWS = (
    ("none", 11),
    ("left", 7),
    ("right", 7),
    ("both", 7),
    ("left", 4),
    ("right", 4),
    ("left", 1),
    ("right", 1),
)
TOKEN_IDS = {"bos": 1, "eos": 2, "pad": 0}


def changed(**fields: Any) -> LanguageModel:
    """The tiny decoder with some settings changed."""
    return LanguageModel(dataclasses.replace(CONFIG, **fields))


@functools.cache
def make_base(lm: LanguageModel = LM, seed: int = 0) -> Tree:
    """Fresh weights, at 1 / sqrt(in) far from uniform attention, and norms that are not all 1.

    Drawn by NumPy: nothing is compiled, so a test module may call it while it is collected.
    """
    noise = np.random.default_rng(seed)

    def leaf(name: str, spec: jax.ShapeDtypeStruct) -> jax.Array:
        drawn = noise.standard_normal(spec.shape)
        if name.endswith("scale"):
            drawn = 0.2 * drawn + (0.0 if lm.config.unit_offset_norms else 1.0)
        elif name.endswith("bias"):
            drawn = np.zeros(spec.shape)
        else:
            drawn = drawn / np.sqrt(
                lm.config.width if name.startswith("outer/") else spec.shape[-2]
            )
        return jax.device_put(drawn.astype(spec.dtype))

    return trees.map_named(leaf, lm.abstract_base())


def drawn_lora(lm: LanguageModel, lora: LoRAConfig, seed: int) -> Tree:
    """LoRA leaves as training begins it (A random, B zero, or the other way round), in NumPy."""
    noise = np.random.default_rng((seed, 1))
    random = {"b-zero": "lora_a", "a-zero": "lora_b"}[lora.init]

    def leaf(name: str, spec: jax.ShapeDtypeStruct) -> np.ndarray:
        bound = 1 / np.sqrt(spec.shape[-2])
        drawn = (
            noise.uniform(-bound, bound, spec.shape)
            if name.endswith(random)
            else np.zeros(spec.shape)
        )
        return drawn.astype(spec.dtype)

    return trees.map_named(leaf, lm.abstract_lora(lora))


def make_fresh(lm: LanguageModel = LM, lora: LoRAConfig = LORA, seed: int = 1) -> Adapter:
    """An adapter as training begins it, without a head."""
    return Adapter(lora=jax.device_put(drawn_lora(lm, lora, seed)), config=lora)


def make_adapter(
    lm: LanguageModel = LM, lora: LoRAConfig = LORA, seed: int = 1, *, head: bool = True
) -> Adapter:
    """An adapter as if trained: B is not zero. With a scalar head whose bias is not zero either."""
    noise = np.random.default_rng(seed)
    moved = jax.tree.map(
        lambda leaf: leaf + 0.1 * noise.standard_normal(leaf.shape).astype(np.float32),
        drawn_lora(lm, lora, seed),
    )
    return Adapter(
        lora=jax.device_put(moved), head=make_head(lm, seed) if head else None, config=lora
    )


def make_full(base: Tree, lm: LanguageModel = LM, seed: int = 2) -> Adapter:
    """Full weights that have moved away from the base, with a head."""
    noise = np.random.default_rng(seed)
    moved = jax.tree.map(
        lambda leaf: jax.device_put(
            np.asarray(leaf, np.float32)
            + 0.02 * noise.standard_normal(leaf.shape).astype(np.float32)
        ),
        base,
    )
    return Adapter(weights=moved, head=make_head(lm, seed))


def make_head(lm: LanguageModel = LM, seed: int = 3) -> Tree:
    """A scalar head with N(0, 1 / sqrt(D + 1)) weights and a bias that is not zero."""
    width = lm.config.width
    kernel_D = np.random.default_rng((seed, 2)).standard_normal(width) / np.sqrt(width + 1)
    return {
        "kernel": jax.device_put(kernel_D.astype(np.float32)),
        "bias": jax.device_put(np.float32(0.3)),
    }


def make_valid(rows: Sequence[tuple[str, int]], columns: int) -> np.ndarray:
    """valid_BT of rows given as (side of the padding, number of real tokens)."""
    starts = {
        "none": lambda n: 0,
        "right": lambda n: 0,
        "left": lambda n: columns - n,
        "both": lambda n: (columns - n) // 2,
    }
    index = np.arange(columns)
    return np.stack(
        [(index >= starts[side](n)) & (index < starts[side](n) + n) for side, n in rows]
    )


def make_tokens(
    rows: Sequence[tuple[str, int]] = ROWS,
    columns: int = 11,
    seed: int = 0,
    vocab: int = CONFIG.vocab_size,
) -> Tokens:
    """Random rows; ids in the padding are random too. The second half of each row is the response.

    Rows of one length hold the same tokens, so that only their padding tells them apart.
    """
    valid_BT = make_valid(rows, columns)
    rank_BT = np.cumsum(valid_BT, axis=1) - 1
    response_BT = valid_BT & (rank_BT >= (valid_BT.sum(axis=1, keepdims=True) + 1) // 2)
    tokens_BT = np.random.default_rng(seed).integers(vocab, size=valid_BT.shape, dtype=np.int32)
    for tokens_T, valid_T, (_, n) in zip(tokens_BT, valid_BT, rows, strict=True):
        tokens_T[valid_T] = np.random.default_rng((seed, n)).integers(vocab, size=n)
    return Tokens(tokens_BT, valid_BT, response_BT)


def other_padding(tokens: Tokens) -> Tokens:
    """The same batch with every id in the padding changed."""
    return tokens.replace(
        tokens_BT=np.where(
            tokens.valid_BT, tokens.tokens_BT, (tokens.tokens_BT + 17) % CONFIG.vocab_size
        )
    )


@functools.partial(jax.jit, static_argnums=0)
def logits(lm: LanguageModel, base: Tree, role: Adapter | None, tokens: Tokens) -> jax.Array:
    """logits_BTV, compiled once for all tests."""
    return lm.logits(base, role, tokens.tokens_BT, tokens.valid_BT)


@functools.partial(jax.jit, static_argnums=0)
def values(lm: LanguageModel, base: Tree, role: Adapter, tokens: Tokens) -> jax.Array:
    """values_BT, compiled once for all tests."""
    return lm.values(base, role, tokens.tokens_BT, tokens.valid_BT)


@functools.partial(jax.jit, static_argnums=0)
def score(lm: LanguageModel, base: Tree, role: Adapter, tokens: Tokens) -> jax.Array:
    """score_B, compiled once for all tests."""
    return lm.score(base, role, tokens.tokens_BT, tokens.valid_BT)


def sft_loss(lm: LanguageModel, role: Adapter, base: Tree, tokens: Tokens) -> jax.Array:
    """Mean of -log p over response tokens."""
    return supervised.sft_objective(lm, {"policy": role}, base, tokens, None)[0].mean


def pair_loss(lm: LanguageModel, role: Adapter, base: Tree, tokens: Tokens) -> jax.Array:
    """The first half of the rows preferred to the second: a loss through the scores."""
    chosen_B, rejected_B = jnp.split(lm.score(base, role, tokens.tokens_BT, tokens.valid_BT), 2)
    return bradley_terry(chosen_B, rejected_B, jnp.ones(chosen_B.shape[0])).mean


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradient(
    loss: Callable, lm: LanguageModel, role: Adapter, base: Tree, tokens: Tokens
) -> tuple[jax.Array, Adapter]:
    """Value of one of the losses above and its gradient in the role, compiled once for all
    tests.
    """
    return jax.value_and_grad(functools.partial(loss, lm))(role, base, tokens)


def write_twin(folder: pathlib.Path, lm: LanguageModel, base: Tree) -> Any:
    """The same decoder in torch, by way of files that transformers reads."""
    hf_checkpoint.save_base(folder, lm.config, base, TOKEN_IDS)
    return load_torch(folder)


def load_torch(folder: pathlib.Path) -> Any:
    """A folder's model by transformers, in float32; the test is skipped without torch."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def torch_inputs(tokens: Tokens) -> dict[str, Any]:
    """Arguments of a torch decoder for a padded batch."""
    torch = pytest.importorskip("torch")
    positions_BT = np.maximum(np.cumsum(tokens.valid_BT, axis=1) - 1, 0)
    return {
        "input_ids": torch.tensor(np.asarray(tokens.tokens_BT), dtype=torch.long),
        "attention_mask": torch.tensor(np.asarray(tokens.valid_BT), dtype=torch.long),
        "position_ids": torch.tensor(positions_BT, dtype=torch.long),
    }


def torch_logits(model: Any, tokens: Tokens) -> np.ndarray:
    """logits_BTV of a torch decoder; positions count real tokens, as the package's do."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(**torch_inputs(tokens)).logits.numpy()


def torch_sft_loss(logits_BTV: Any, tokens: Tokens) -> Any:
    """Mean of -log p over response tokens, with torch's own cross-entropy."""
    torch = pytest.importorskip("torch")
    response_BT = torch.tensor(tokens.response_BT[:, 1:])
    targets = torch.tensor(tokens.tokens_BT[:, 1:], dtype=torch.long)[response_BT]
    return torch.nn.functional.cross_entropy(logits_BTV[:, :-1][response_BT], targets)


def change_config(folder: pathlib.Path, **fields: Any) -> None:
    """Changes fields of a checkpoint's config.json; `...` takes one out."""
    values = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in values.items() if value is not ...})
    )


def assert_same(left: Tree, right: Tree) -> None:
    """Bit for bit, dtypes and structure included."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (name, a), b in zip(trees.named_leaves(left).items(), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


def update_gradients(
    objective: Callable,
    roles: dict[str, Adapter],
    frozen: Tree,
    batch: Tree,
    key: jax.Array | None,
    microbatches: int,
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Adapter]]:
    """(mean loss, means of the logs, gradients by role) that an update of the roles has.

    The optimizer keeps the gradient as its state, and changes nothing.
    """
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    kept = optax.GradientTransformation(zeros, lambda grads, _, __: (zeros(grads), grads))
    optimizers = dict.fromkeys(roles, kept)
    state = init_state(roles, optimizers, jax.random.key(0))
    state, metrics = train_step(objective, optimizers, microbatches, state, frozen, batch, key)
    logs = {
        name: value
        for name, value in metrics.items()
        if name not in ("train/loss", "finite") and not name.endswith("/gradient_norm")
    }
    return metrics["train/loss"], logs, state.optimizers
