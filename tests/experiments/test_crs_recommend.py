"""The one command on made-up dialogues: views, buckets, tuning, files, errors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import ranked
import recommend
import redial
import systems
from ranking import MEASURES
from retrieval import BM25Config, Fixed, popularity
from systems import Data, Settings, Trial, tune

from perl_jax.errors import UserError
from tests.experiments import tiny_redial

SAID = [("s", "I like @10"), ("r", "@10 is great, try @11"), ("s", "no"), ("r", "@88 or @20 then")]
NAMES = {
    "10": "Night Train (1999)",
    "11": "Dark Cellar (2001)",
    "20": "Paper Hearts (2005)",
    "88": "Nowhere Else (1950)",
}


@pytest.fixture
def found(tmp_path):
    folder = tiny_redial.small(tmp_path)
    tiny_redial.write_lines(
        folder / "test_data.jsonl", [tiny_redial.row(900, SAID, NAMES, suggested=("11",))]
    )
    return redial.read_redial(str(folder))


def ranked_by(values, found):
    position = {movie: i for i, movie in enumerate(found.movies)}
    counts = systems.mention_counts(found.train, position)
    targets = ranked.targets_of(found.test, position, counts)
    return ranked.rank(
        Fixed(np.array([values.get(movie, 0.0) for movie in found.movies])), targets, position
    ), targets


def test_views_of_the_same_ranking_by_hand(found):
    one, targets = ranked_by(
        {"10": 5.0, "11": 4.0, "20": 3.0, "21": 2.0, "30": 1.0, "31": 0.5}, found
    )
    assert [(t.movie, t.mentioned, t.suggested, t.count) for t in targets] == [
        ("10", True, False, 5),
        ("11", False, True, 5),
        ("88", False, False, 0),
        ("20", False, False, 5),
    ]
    np.testing.assert_array_equal(
        one.all, [1, 2, np.inf, 3]
    )  # 88 is not in the catalogue: a miss, not left out
    np.testing.assert_array_equal(
        one.new, [np.nan, 1, np.inf, 1]
    )  # @10 had been mentioned; then @10 and @11
    everything, new, suggested = (ranked.summary_of(one, targets, view) for view in ranked.VIEWS)
    assert (everything.n, new.n, suggested.n) == (4, 3, 1)
    assert (
        everything.values["recall@1"] == 0.25
        and new.values["recall@1"] == pytest.approx(2 / 3)
        and suggested.values["recall@1"] == 1.0
    )
    assert everything.values["mrr"] == pytest.approx((1 + 1 / 2 + 0 + 1 / 3) / 4)
    assert (
        ranked.summary_of(one, targets, "all", "0").n == 1
        and ranked.summary_of(one, targets, "all", "5-9").n == 3
    )
    assert ranked.summary_of(one, targets, "all", "30+") is None
    turns = ranked.turns_summary(one, targets, "all")
    assert turns.n == 2  # (10, 11) and (88, 20)
    assert turns.values["recall@10"] == pytest.approx((1 + 0.5) / 2) and turns.values[
        "mrr"
    ] == pytest.approx((1 + 1 / 3) / 2)
    assert turns.values["ndcg@10"] == pytest.approx(
        (1 + (1 / math.log2(4)) / (1 + 1 / math.log2(3))) / 2
    )
    better, _ = ranked_by({"11": 9.0, "20": 8.0}, found)
    assert ranked.gain_of(better, one, targets, "all").values["recall@1"] == pytest.approx(0.0)
    assert ranked.gain_of(better, one, targets, "all").values["mrr"] == pytest.approx(
        (1 / better.all[0] + 1 + 0 + 1 / 2 - 1 - 1 / 2 - 1 / 3) / 4
    )


def test_rows_to_read_errors_from(found):
    one, targets = ranked_by({"10": 5.0, "11": 4.0}, found)
    rows = ranked.case_rows({"system": one}, targets, found.movies)
    assert rows[1]["context"] == [{"speaker": "seeker", "text": "I like @10"}]
    assert (
        rows[1]["title"],
        rows[1]["systems"]["system"]["rank"],
        rows[1]["systems"]["system"]["rank_new"],
    ) == ("Dark Cellar (2001)", 2, 1)
    assert rows[1]["systems"]["system"]["first"][0] == "Dark Cellar (2001)"
    assert (rows[2]["title"], rows[2]["systems"]["system"]["rank"]) == (None, None)
    assert json.loads(json.dumps(rows)) == rows


def test_tuning_takes_the_best_value_of_each_field():
    best = {"b": 0.75, "k1": 4.0}
    score = lambda s: -abs(s.bm25.b - best["b"]) - abs(s.bm25.k1 - best["k1"])
    grid = (("bm25", "b", (0.0, 0.3, 0.75)), ("bm25", "k1", (0.5, 1.5, 4.0)))
    chosen, trials = tune(Settings(), score, grid)
    assert chosen.bm25 == BM25Config(4.0, 0.75)
    assert trials[0] == Trial("bm25", "b", 0.0, score(Settings(bm25=BM25Config(1.5, 0.0))))
    # Ties go to the value that comes first, whatever the start.
    assert tune(Settings(), lambda s: 0.0, grid)[0].bm25 == BM25Config(0.5, 0.0)


def test_the_objective_is_the_mean_of_recalls():
    position = {"10": 0, "11": 1, "20": 2}
    case = redial.Case("1", 0, (), ("11", "20", "88"))
    # Ranks 1, 3 and none: recall at 1 is 1/3, at 10 and 50 2/3.
    assert systems.objective(Fixed(np.array([2.0, 3.0, 1.0])), [case], position) == pytest.approx(
        (1 / 3 + 2 / 3 + 2 / 3) / 3
    )


def test_validation_documents_do_not_see_validation(tmp_path):
    found = redial.read_redial(str(tiny_redial.small(tmp_path)))
    with pytest.raises(UserError, match="test dialogues are among those"):
        systems.Validation(found.train, found.train[-2:], found.movies)
    score = systems.Validation(found.train[:8], found.train[8:], found.movies)
    vocabulary = systems.build(Settings(), score.data).index.model.vocab_dict
    assert "3" in vocabulary and "8" not in vocabulary  # "on evening 8" is said in validation only
    assert score(Settings()) == pytest.approx(objective_of(found))


def objective_of(found):
    """The same by hand: documents of the first eight dialogues, the last two to be predicted."""
    data = Data(found.movies, found.train[:8])
    cases = [case for dialogue in found.train[8:] for case in redial.cases_of(dialogue)]
    return systems.objective(systems.build(Settings(), data), cases, data.position)


def test_popularity_counts_dialogues_that_recommend(found):
    data = Data(found.movies, found.train)
    np.testing.assert_array_equal(popularity(data.dialogues, data.position), [0, 5, 0, 5, 0, 0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run on made-up dialogues."""
    root = tmp_path_factory.mktemp("recommend")
    folder = tiny_redial.small(root / "data")
    assert recommend.main(["--data-dir", str(folder), "--run", str(root / "run")]) == 0
    return root


def test_the_command_writes_tables_results_settings_and_cases(finished):
    text = (finished / "run" / "table.md").read_text()
    for name in (
        "random",
        "popularity",
        "repeat the context",
        recommend.MAIN,
        "without plot",
        "metadata alone",
        "BM25 + similar seekers",
        recommend.BEST,
    ):
        assert f"| {name} |" in text
    assert "| UniCRS, published | 0.051 | 0.224 | 0.428 | | |" in text
    assert "Documents from 10 dialogues of the train side" in text and "the whole 10,006" in text
    results = json.loads((finished / "run" / "results.json").read_text())
    system = results["systems"][recommend.MAIN]
    assert (
        set(system["targets"]["all"]["values"]) == set(MEASURES)
        and system["targets"]["all"]["n"] == 3
    )
    assert system["queries_per_second"] > 0 and system["build_seconds"] > 0
    # Horror goes with horror: conversations find both partners, the third test movie is in none.
    assert system["targets"]["new"]["values"]["recall@1"] == pytest.approx(2 / 3)
    cases = [
        json.loads(line) for line in (finished / "run" / "cases.jsonl").read_text().splitlines()
    ]
    assert [row["target"] for row in cases] == ["11", "21", "30"] and set(cases[0]["systems"]) >= {
        "popularity",
        recommend.MAIN,
        recommend.BEST,
    }


def test_settings_of_a_run_give_the_same_numbers_without_tuning(finished, capsys):
    again = finished / "again"
    arguments = [
        "--data-dir",
        str(finished / "data"),
        "--run",
        str(again),
        "--settings",
        str(finished / "run" / "settings.json"),
    ]
    assert recommend.main(arguments) == 0
    assert "tuning" not in capsys.readouterr().out
    values = lambda folder: {
        name: system["targets"]
        for name, system in json.loads((folder / "results.json").read_text())["systems"].items()
    }
    assert values(again) == values(finished / "run")


def test_fields_and_conversations_from_a_file(finished):
    written = finished / "written.jsonl"
    row = {
        "movie": "30",
        "turns": [{"seeker": True, "text": "I love @20"}, {"seeker": False, "text": "Then @30"}],
    }
    written.write_text(json.dumps(row) + "\n")
    arguments = [
        "--data-dir",
        str(finished / "data"),
        "--run",
        str(finished / "fields"),
        "--fields",
        "title",
        "conversations",
        "--augmented",
        str(written),
    ]
    assert recommend.main(arguments) == 0
    text = (finished / "fields" / "table.md").read_text()
    assert "| without title |" in text and "without plot" not in text
    results = json.loads((finished / "fields" / "results.json").read_text())["systems"]
    # The written conversation lets the seeker of @20 find @30.
    reciprocal = lambda name: results[name]["buckets"]["all"]["0"]["values"]["mrr"]
    assert reciprocal(recommend.MAIN) == pytest.approx(1 / 4) and reciprocal(
        "BM25 + made-up, language model"
    ) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-dir", "nowhere"], "There is no folder nowhere"),
        (["--fields", "colour"], "fields is 'colour'"),
        (["--data-dir", "DATA", "--settings", "none.json"], "none.json"),
        (
            ["--data-dir", "DATA", "--settings", "SETTINGS", "--augmented", "none.jsonl"],
            "none.jsonl cannot be read",
        ),
    ],
)
def test_what_the_user_got_wrong_is_one_sentence_and_status_2(
    finished, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    places = {"DATA": str(finished / "data"), "SETTINGS": str(finished / "run" / "settings.json")}
    assert recommend.main([places.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("recommend.py: ") and message in error and error.count("\n") == 1
