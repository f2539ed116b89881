"""The bridge: a query's ranks as a reward, as a term of perl_jax, and RL with it from end to
end.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest
import redial
import reward
import rl
from documents import Tokenizer, TokenizerConfig
from redial import Movie
from retrieval import BM25Config, Index
from reward import QueryIndex, write_answer

from perl_jax.errors import UserError
from perl_jax.rewards.compose import Composite, read_terms
from perl_jax.runtime import sharding
from tests.experiments import tiny_redial

MOVIES = {
    str(i): Movie(str(i), title, "2000")
    for i, title in enumerate(["Night Train", "Dark Cellar", "Paper Hearts", "Iron Orbit"])
}
DOCUMENTS = [
    ["horror", "train", "@1"],
    ["horror", "horror", "@0"],
    ["romance"],
    ["horror", "space"],
]


@pytest.fixture
def index():
    return QueryIndex(
        Index(DOCUMENTS, BM25Config(1.2, 0.0)),
        Tokenizer(TokenizerConfig(stem=False), MOVIES),
        MOVIES,
    )


def test_the_reward_by_hand(index):
    # horror: 1 has it twice, then 0 and 3 with equal scores in the order of ties, 2 last.
    order = list(index.order)
    second = 2 if order[0] < order[3] else 3
    np.testing.assert_array_equal(
        index.ranks("some horror please", ["1", "0", "2", "77"], []), [1, second, 4, np.inf]
    )
    assert index.reward("horror", write_answer(["1"], [])) == 1.0
    assert index.reward("horror", write_answer(["0"], ["1"])) == pytest.approx(
        1 / math.log2(second)
    )  # 1 takes no rank
    both = (1.0 + 1 / math.log2(1 + second)) / 2
    assert index.reward("horror", write_answer(["1", "0"], [])) == pytest.approx(both)
    assert index.reward("horror", write_answer(["1", "77"], [])) == pytest.approx(0.5)


def test_titles_in_a_query_are_mentions(index):
    assert index.tokens("Dark Cellar (2000) ; horror ; horror") == [
        "dark",
        "cellar",
        "@1",
        "horror",
    ]
    assert index.ranks("dark cellar (2000)", ["0"], [])[0] == 1  # document 0 holds @1
    assert index.tokens("#2 scary #1", ["3", "1"]) == [
        "dark",
        "cellar",
        "@1",
        "scary",
        "iron",
        "orbit",
        "@3",
    ]
    assert index.ranks("#1", ["0"], ["1"])[0] == 1 and index.ranks("#1", ["0"], [])[0] == np.inf


@pytest.mark.parametrize("query", ["", "   ", "nothing known", "?!"])
def test_a_query_without_a_known_word_is_paid_nothing(index, query):
    assert index.reward(query, write_answer(["0"], [])) == 0.0


@pytest.mark.parametrize(
    "answer",
    ["", "[]", "{}", '{"targets": [], "mentioned": []}', '{"targets": 3, "mentioned": []}', "ten"],
)
def test_an_answer_that_is_none_is_named(index, answer):
    with pytest.raises(UserError, match=r"A row's answer is .*targets"):
        index.reward("horror", answer)


def test_an_index_comes_back_from_disk(index, tmp_path):
    index.save(tmp_path / "index")
    again = QueryIndex.load(tmp_path / "index")
    for query in ("horror", "Dark Cellar (2000)", "romance space"):
        np.testing.assert_array_equal(
            again.ranks(query, ["0", "3"], ["1"]), index.ranks(query, ["0", "3"], ["1"])
        )
    with pytest.raises(UserError, match="holds no index of movies"):
        QueryIndex.load(tmp_path / "none")


def test_it_is_a_term_of_any_command(index, tmp_path, monkeypatch):
    index.save(tmp_path / "index")
    monkeypatch.setenv(reward.VARIABLE, str(tmp_path / "index"))
    rows = [
        {"prompt": "p", "answer": write_answer(["1"], [])},
        {"prompt": "p", "answer": write_answer(["2"], [])},
    ]
    with Composite(read_terms(rl.TERMS)) as terms:
        columns = terms(["p", "p"], ["horror", "romance"], rows)
        np.testing.assert_array_equal(columns["retrieval"], [1.0, 1.0])  # without the weight
        with pytest.raises(UserError, match="A row's answer is 'x'"):
            terms(["p"], ["horror"], [{"prompt": "p", "answer": "x"}])


def test_without_an_index_the_message_names_the_variable(monkeypatch):
    monkeypatch.delenv(reward.VARIABLE, raising=False)
    reward.loaded.cache_clear()
    with pytest.raises(UserError, match=f"Set {reward.VARIABLE}"):
        reward.score([], [], [])


# ------------------------------------------------------------------------------ rows and gains


def test_prompts_conversations_are_in_no_document(tmp_path):
    found = redial.read_redial(str(tiny_redial.small(tmp_path)))
    documents, prompts = rl.split_train(found.train)
    assert len(documents) == len(prompts) == 5 and not {d.id for d in documents} & {
        d.id for d in prompts
    }
    index = rl.query_index(found, documents, rl.Settings())
    cases, rows = rl.prompt_rows(prompts, index)
    assert [json.loads(row["answer"]) for row in rows[:2]] == [
        {"targets": ["21"], "mentioned": ["20"]},
        {"targets": ["11"], "mentioned": ["10"]},
    ]
    vocabulary = index.index.model.vocab_dict
    for case in cases:
        evening = case.context[0].text.split()[-1]
        assert evening not in vocabulary  # "on evening 3" is said in that prompt alone
    with pytest.raises(UserError, match="No dialogue has a case"):
        rl.prompt_rows([dataclasses.replace(prompts[0], turns=prompts[0].turns[:1])], index)


def test_the_gain_is_resampled_by_dialogue():
    make = lambda rewards: rl.Queries(
        [""] * len(rewards), np.asarray(rewards, float), [np.array([1.0])] * len(rewards)
    )
    random = np.random.default_rng(0)
    difference = random.normal(0.1, 1.0, 50)
    once = rl.gain_of(make(difference), make(np.zeros(50)), [str(i) for i in range(50)])
    often = rl.gain_of(
        make(np.repeat(difference, 6)),
        make(np.zeros(300)),
        [str(i) for i in range(50) for _ in range(6)],
    )
    assert (often.n, often.groups) == (300, 50)
    assert (once.value, once.low, once.high) == pytest.approx((often.value, often.low, often.high))
    assert once.low < once.value < once.high


@pytest.mark.slow
def test_rl_runs_from_end_to_end_and_moves_its_reward(tmp_path, capsys, monkeypatch):
    """A policy that has learned next to nothing, on made-up dialogues whose partners are easy to
    find: the rollouts' reward rises.
    """
    # The jobs' mesh, left to itself, would fill the eight devices that tests have.
    monkeypatch.setattr(
        sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    )
    data = tiny_redial.small(tmp_path / "data", tens=8)
    arguments = [
        "--data-dir",
        str(data),
        "--run",
        str(tmp_path / "run"),
        "--base-steps",
        "4",
        "--sft-steps",
        "2",
        "--steps",
        "24",
        "--rate",
        "0.01",
    ]
    assert rl.main(arguments) == 0
    found = json.loads((tmp_path / "run" / "rewriting" / "measured.json").read_text())
    curve = found["curve"]
    assert len(curve) == 24 and np.mean(curve[-6:]) > np.mean(curve[:6]) + 0.1
    assert set(found["queries"]) == {"the whole conversation", "heuristic", "SFT", "after RL"}
    assert "after RL" in capsys.readouterr().out
    rows = [
        json.loads(line)
        for line in (tmp_path / "run" / "rewriting" / "queries.jsonl").read_text().splitlines()
    ]
    assert len(rows) == found["test_prompts"] == 3 and all(
        0 <= row["after RL"]["reward"] <= 1 for row in rows
    )
    assert rl.main(["--data-dir", str(tmp_path / "none")]) == 2
