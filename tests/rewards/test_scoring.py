"""What a term gets of a rollout: the text of a response, with special tokens if it asks."""

from __future__ import annotations

import types

import jax
import numpy as np

from perl_jax.hub.tokenizer import word_tokenizer
from perl_jax.rewards.compose import Term, read_terms
from perl_jax.rewards.models import reward
from perl_jax.rewards.scoring import Scorer
from perl_jax.runtime import sharding
from perl_jax.runtime.sharding import MeshConfig


def test_filler_rows_reach_no_term():
    tokenizer = word_tokenizer(["hm", "yes"])
    ids_T = np.asarray(tokenizer.inner.convert_tokens_to_ids(["hm", "yes", "</s>"]))
    rollout = types.SimpleNamespace(
        sequences=types.SimpleNamespace(
            tokens_BT=np.stack([ids_T] * 3), response_BT=np.asarray([[False, True, True]] * 3)
        )
    )
    asked = []

    def lengths(prompts, responses):
        asked.append((list(prompts), list(responses)))
        return [float(len(prompt)) for prompt in prompts]

    mesh = sharding.make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])
    model = types.SimpleNamespace(tokenizer=tokenizer, mesh=mesh)
    rows = [{"prompt": "a"}, {"prompt": "bc"}]
    with Scorer(model, None, (reward(lengths, name="lengths"),), 1.0, rows) as scorer:
        score_B = scorer({}, rollout, np.asarray([1, -1, 0]))[0]
        none_B = scorer({}, rollout, np.asarray([-1, -1, -1]))[0]
    assert asked == [(["bc", "a"], ["yes", "yes"])]
    assert np.asarray(score_B).tolist() == [2.0, 0.0, 1.0]
    assert np.asarray(none_B).tolist() == [0.0, 0.0, 0.0]


def test_special_tokens_reach_the_terms_that_ask_for_them():
    tokenizer = word_tokenizer(["hm", "yes"])
    tokenizer.inner.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    words = ["hm", "<think>", "hm", "</think>", "yes", "</s>"]
    ids_T = np.asarray(tokenizer.inner.convert_tokens_to_ids(words))
    assert len(set(ids_T.tolist())) == 5
    mask_T = np.asarray([False, True, True, True, True, True])
    # The second response is cut in the middle.
    rollout = types.SimpleNamespace(
        sequences=types.SimpleNamespace(
            tokens_BT=np.stack([ids_T, ids_T]),
            response_BT=np.stack([mask_T, mask_T & (np.arange(6) < 3)]),
        )
    )
    seen = {}

    def note(name):
        return lambda prompts, responses: seen.setdefault(name, responses) and [0.0] * 2

    terms = (
        reward(note("plain"), name="plain"),
        reward(note("special"), name="special", special_tokens=True),
        *read_terms('{"kind": "regex", "pattern": "</think>", "special_tokens": true}'),
        Term("prompts", 1.0, lambda prompts, responses, rows: np.asarray(list(map(len, prompts)))),
    )
    mesh = sharding.make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])
    model = types.SimpleNamespace(tokenizer=tokenizer, mesh=mesh)
    with Scorer(model, None, terms, 1.0, [{"prompt": "a"}, {"prompt": "bc"}]) as scorer:
        score_B, logs = scorer({}, rollout, np.asarray([0, 1]))
    assert seen == {
        "plain": ["hm yes", "hm"],
        "special": ["<think> hm </think> yes", "<think> hm"],
    }
    assert np.asarray(score_B).tolist() == [2.0, 2.0]
    assert logs["reward/term/regex"] == 0.5
