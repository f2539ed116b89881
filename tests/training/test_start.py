"""What a training job says before its first step."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest

from perl_jax.data.config import DataConfig
from perl_jax.data.tokenise import tokenise
from perl_jax.hub.tokenizer import word_tokenizer
from perl_jax.training import start
from perl_jax.training.configs import SFTConfig
from perl_jax.training.sft import train_sft
from tests.hub.test_chat import CHATML, byte_tokenizer
from tests.training import tiny


@pytest.mark.slow
def test_a_job_says_what_it_does_before_its_first_step(base, capsys):
    model = tiny.open_model(base)
    capsys.readouterr()
    # An adapter of rank 5 on q, k, v and o of two layers: 2 x 5 x (32 + 24 + 24 + 32) weights.
    rows = [
        {"prompt": "customer : hi , tea please", "response": "add one small tea"},
        *[{"prompt": "hi " * 20, "response": "add one tea"}] * 7,
    ]
    fields = {name: value for name, value in tiny.COMMON.items() if name != "data"}
    data = DataConfig(max_prompt_length=8, max_response_length=6)
    train_sft(model, rows, SFTConfig(**fields | {"data": data, "steps": 1}))
    printed = capsys.readouterr().err
    assert printed.startswith(
        "sft: rows: the given rows, demonstrations: train 8.\n"
        "sft: cut: 7 of 8 train rows, to a prompt of 8 and a response of 6 tokens; the longest row "
        "has 12 tokens.\n"
        "sft: weights: trains policy 1.12 k in float32 (adapters on a base of 5.33 k); base in "
        "float32.\n"
        "sft: devices: 1 x cpu; mesh: data 1, fsdp 1, tensor 1.\n"
        "sft: attention: blocked ("
    )
    assert printed.partition("sft: template: ")[2].startswith(
        "none, a prompt is the text after bos.\n"
        "sft: the first row as the model reads it:\n"
        "sft:   prompt: '<s> customer : hi , tea please' (7 tokens)\n"
        "sft:   response: 'add one small tea </s>' (5 tokens)\n"
        "sft 1/1 (100%)"
    )


@pytest.mark.parametrize(
    ("kind", "row", "parts"),
    [
        ("prompts", {"prompt": "a b"}, {"prompt": "<s> a b"}),
        (
            "comparisons",
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"prompt": "<s> a", "chosen": "b </s>", "rejected": "c </s>"},
        ),
        ("corpus", {"text": "a b c"}, {"text": "<s> a b c </s>"}),
    ],
)
def test_the_parts_of_a_row(kind, row, parts):
    tokenizer = word_tokenizer(["a", "b", "c"])
    rows = tokenise([row], kind, tokenizer, 8, 8)
    found = {name: tokenizer.inner.decode(ids) for name, ids in start._parts(rows, 0)}
    assert found == parts


def test_a_long_text_lacks_its_middle():
    tokenizer = byte_tokenizer(CHATML)
    ids = tokenizer.prompt_ids("x" * 1000)
    shown = start._shown(tokenizer, ids)
    left = len(tokenizer.inner.decode(ids)) - 320
    assert shown.startswith("'<|im_start|>") and f"xxx' ... {left} characters ... 'xxx" in shown
    assert shown.endswith(f"assistant\\n' ({len(ids)} tokens)") and "\n" not in shown


def test_which_template_makes_the_prompts():
    config = SFTConfig()
    own = byte_tokenizer(CHATML)
    assert start._template(own, config) == "the tokenizer's own"
    file = dataclasses.replace(config, data=DataConfig(template="my.jinja"))
    assert start._template(own, file) == "that of my.jinja"
    alone = types.SimpleNamespace(chat=None, bos_id=None)
    assert start._template(alone, config) == "none, a prompt is the text alone"


def test_cuts_are_counted_by_split():
    tokenizer = word_tokenizer(["a"])
    rows = [{"prompt": " ".join(["a"] * number)} for number in (3, 20, 30)]
    split = {
        "train": tokenise(rows, "prompts", tokenizer, 8, 4),
        "validation": tokenise(rows[:1], "prompts", tokenizer, 8, 4),
    }
    config = SFTConfig(data=DataConfig(max_prompt_length=8, max_response_length=4))
    assert start._cut(config, split) == (
        "2 of 3 train rows, 0 of 1 validation rows, to a prompt of 8 tokens; the longest row has "
        f"{int(np.max(split['train'].lengths))} tokens"
    )
