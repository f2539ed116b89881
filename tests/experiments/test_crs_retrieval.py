"""BM25 against the formula, queries, baselines, saving, and an import that leaves JAX alone."""

from __future__ import annotations

import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from documents import Tokenizer, TokenizerConfig
from redial import Case, Movie, Turn
from retrieval import (
    BM25Config,
    Fixed,
    Index,
    QueryConfig,
    Random,
    Repeat,
    Retriever,
    popularity,
    query_tokens,
)

from perl_jax.errors import UserError
from tests.experiments.conftest import EXPERIMENT
from tests.experiments.test_crs_documents import TALK

DOCUMENTS = [["a", "b", "a", "c"], ["b", "c"], ["d"] * 7, ["a"], []]


def reference(documents, query, k1, b):
    """Robertson & Zaragoza 2009, with Lucene's idf, in plain float64."""
    mean, n, scores = sum(map(len, documents)) / len(documents), len(documents), []
    for document in documents:
        score = 0.0
        for token in query:
            df = sum(token in other for other in documents)
            tf = document.count(token)
            if df and tf:
                score += (
                    math.log(1 + (n - df + 0.5) / (df + 0.5))
                    * tf
                    / (tf + k1 * (1 - b + b * len(document) / mean))
                )
        scores.append(score)
    return scores


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.3), (0.9, 0.75), (4.0, 0.0), (1.2, 1.0)])
@pytest.mark.parametrize("query", [["a"], ["a", "b", "d"], ["a", "a", "c", "unknown"], ["d", "a"]])
def test_scores_are_the_formulas(k1, b, query):
    np.testing.assert_allclose(
        Index(DOCUMENTS, BM25Config(k1, b)).scores(query),
        reference(DOCUMENTS, query, k1, b),
        rtol=1e-12,
    )


def test_weights_multiply_documents_scores():
    index = Index(DOCUMENTS, BM25Config())
    weights = np.array([0.0, 2.0, 1.0, 0.5, 1.0])
    np.testing.assert_allclose(
        index.scores(["a", "b"], weights), weights * index.scores(["a", "b"])
    )


def test_settings_out_of_range_and_nothing_to_index():
    with pytest.raises(UserError, match=r"b is 1.2; it must lie in \[0, 1\]"):
        BM25Config(b=1.2)
    with pytest.raises(UserError, match="k1 is 0"):
        BM25Config(k1=0)
    with pytest.raises(UserError, match="every document is empty"):
        Index([[], []], BM25Config())


def test_an_index_comes_back_from_disk(tmp_path):
    index = Index(DOCUMENTS, BM25Config(0.9, 0.4))
    index.save(tmp_path / "index")
    np.testing.assert_array_equal(
        Index.load(tmp_path / "index").scores(["a", "c"]), index.scores(["a", "c"])
    )
    with pytest.raises(UserError, match="holds no index that can be read"):
        Index.load(tmp_path / "none")


CASE = Case("7", 3, TALK.turns[:3], ("2", "1"))


def test_queries():
    tokenizer = Tokenizer(TokenizerConfig(stem=False, stopwords=False, mentions="id"), {})
    tokens = lambda **more: query_tokens(CASE, QueryConfig(**more), tokenizer)
    assert tokens(turns=None) == ["creepy", "please", "seen", "@2", "already", "no", "like", "@1"]
    assert tokens(turns=1) == ["no", "like", "@1"]
    assert tokens(turns=None, seeker_only=True) == ["creepy", "please", "no", "like", "@1"]
    twice = Case("7", 1, (Turn(True, "good good @1", ("1",)),), ("2",))
    assert query_tokens(twice, QueryConfig(distinct=False), tokenizer) == ["good", "good", "@1"]
    assert query_tokens(twice, QueryConfig(distinct=True), tokenizer) == ["good", "@1"]


def test_a_case_without_a_query_is_ranked_by_popularity_and_counted():
    movies = {str(i): Movie(str(i), "t") for i in range(5)}
    fallback = np.array([3.0, 1.0, 0.0, 0.0, 2.0])
    retriever = Retriever(
        Index(DOCUMENTS, BM25Config()),
        Tokenizer(TokenizerConfig(stem=False), movies),
        QueryConfig(),
        fallback,
    )
    np.testing.assert_array_equal(retriever.scores(Case("1", 0, (), ("1",))), fallback)
    np.testing.assert_array_equal(
        retriever.scores(Case("1", 1, (Turn(True, "unheard of", ()),), ("1",))), fallback
    )
    assert retriever.empty_queries == 2
    assert not np.array_equal(
        retriever.scores(Case("1", 1, (Turn(True, "d", ()),), ("1",))), fallback
    )
    assert retriever.empty_queries == 2


def test_baselines_by_hand():
    position = {"1": 0, "2": 1, "3": 2}
    popular = popularity([TALK, TALK], position)
    np.testing.assert_array_equal(
        popular, [2, 2, 0]
    )  # dialogues, not mentions; the seeker's do not count
    popular = np.array([1.0, 5.0, 4.0])
    np.testing.assert_array_equal(Fixed(popular).scores(CASE), popular)
    # @1 was mentioned last, then @2; what was not mentioned comes after, by popularity.
    assert list(np.argsort(-Repeat(position, popular).scores(CASE))) == [0, 1, 2]
    assert list(np.argsort(-Repeat(position, popular).scores(Case("7", 0, (), ("1",))))) == [
        1,
        2,
        0,
    ]
    np.testing.assert_array_equal(popular, [1.0, 5.0, 4.0])  # untouched
    first, again, other = (
        Random(50).scores(CASE),
        Random(50).scores(CASE),
        Random(50).scores(Case("7", 1, (), ("1",))),
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other) and not np.array_equal(
        first, Random(50, seed=1).scores(CASE)
    )


def test_importing_bm25s_leaves_jax_alone():
    code = "import sys, retrieval, reward; print('jax' in sys.modules)"
    path = os.pathsep.join([str(EXPERIMENT), str(pathlib.Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "False\n", done.stderr
    import jax

    assert sys.modules["jax"] is jax  # and here, where JAX is used, it is still there
