"""ReDial read from upstream's files: turns, cases, forms, copies, the split, errors, downloads."""

from __future__ import annotations

import http.server
import io
import json
import threading
import zipfile

import pytest
import redial
from redial import Case, Label, Turn

from perl_jax.errors import UserError
from tests.experiments import tiny_redial
from tests.paths import REDIAL

needs_real_data = pytest.mark.skipif(
    REDIAL is None or not REDIAL.is_dir(), reason="no copy of ReDial"
)

SAID = [
    ("s", "Hi"),
    ("s", "I like @10"),
    ("r", "Try @11 or @20, @11 is best"),
    ("s", "What about @30?"),
    ("s", "or @31"),
    ("r", "Never heard"),
    ("s", "ok"),
    ("r", "Then @10"),
    ("r", "bye"),
]
NAMES = {
    "10": "Night Train  (1999)",
    "11": "Dark Cellar (2001)",
    "20": "Paper Hearts (2005)",
    "30": "Iron Orbit (2015)",
    "31": "Untold",
}


def dialogue(number=1, said=SAID, names=NAMES, **more):
    return redial.parse_dialogue(json.dumps(tiny_redial.row(number, said, names, **more)), "here")


def test_messages_of_one_speaker_in_a_row_are_one_turn():
    assert dialogue().turns == (
        Turn(True, "Hi I like @10", ("10",)),
        Turn(False, "Try @11 or @20, @11 is best", ("11", "20")),
        Turn(True, "What about @30? or @31", ("30", "31")),
        Turn(False, "Never heard", ()),
        Turn(True, "ok", ()),
        Turn(False, "Then @10 bye", ("10",)),
    )


def test_cases_are_the_recommenders_turns_with_movies_and_hold_only_what_came_before():
    one = dialogue()
    assert redial.cases_of(one) == [
        Case("1", 1, one.turns[:1], ("11", "20")),
        Case("1", 5, one.turns[:5], ("10",)),
    ]
    first, second = redial.cases_of(one)
    assert first.mentioned == ("10",)
    assert second.mentioned == (
        "31",
        "30",
        "20",
        "11",
        "10",
    )  # the latest first, the target among them


def test_a_dialogue_that_the_recommender_opens_has_a_case_without_context():
    (case,) = redial.cases_of(dialogue(said=[("r", "Watch @10"), ("s", "ok")]))
    assert case.context == () and case.targets == ("10",) and case.mentioned == ()


def test_forms_are_the_seekers_and_the_recommenders_where_that_says_nothing():
    row = tiny_redial.row(1, SAID, NAMES)
    row["initiatorQuestions"] = {
        "10": {"suggested": 0, "seen": 1, "liked": 2},
        "11": {"suggested": 1, "seen": 2, "liked": 0},
    }
    row["respondentQuestions"] = {
        "10": {"suggested": 1, "seen": 1, "liked": 1},
        "20": {"suggested": 1, "seen": 1, "liked": 1},
    }
    assert redial.labels_of(row) == {
        "10": Label(False, None),
        "11": Label(True, False),
        "20": Label(True, True),
    }
    row["initiatorQuestions"] = []  # upstream's empty form
    assert set(redial.labels_of(row)) == {"10", "20"}


def test_titles_and_years():
    assert redial.split_title("The Shining  (1980)") == ("The Shining", "1980")
    assert redial.split_title("American Pie ") == ("American Pie", "")
    assert redial.split_title("2012 (2009)") == ("2012", "2009")


def test_copies_are_left_out_by_id_and_by_content_whatever_the_cut_into_messages():
    same_words = [
        ("s", "hi i like @10"),
        ("r", "try @11 or @20 @11 is best"),
        ("s", "what about @30 or @31"),
        *SAID[5:],
    ]
    copies = [
        dialogue(5),
        dialogue(5, said=[("s", "something else")]),
        dialogue(6, said=same_words),
        dialogue(7, said=[("s", "new")]),
    ]
    assert [d.id for d in redial.without_copies(copies, [])] == ["5", "7"]
    test = [dialogue(7, said=[("s", "unlike")]), dialogue(99)]
    assert redial.without_copies(copies, test) == [
        copies[1]
    ]  # 5's and 6's words are in the test side, and 7's id


def test_reading_a_folder(tmp_path):
    train = [
        tiny_redial.row(2, SAID, {**NAMES, "77": "Only Mentioned (1970)"}),
        tiny_redial.row(3, [("s", "@77 is great")], {"77": "Only Mentioned (1970)"}),
    ]
    test = [
        tiny_redial.row(
            9,
            [("s", "I like @88"), ("r", "And @88 or @10?")],
            {"88": "Test Only (1971)", "10": NAMES["10"]},
        )
    ]
    found = redial.read_redial(str(tiny_redial.write(tmp_path, train, test)))
    assert (
        [d.id for d in found.train] == ["2", "3"]
        and [d.id for d in found.test] == ["9"]
        and found.repeated == 0
    )
    assert found.movies["10"] == redial.Movie(
        "10", "Night Train", "1999", ("horror",), ("Ada Moss",), ("Bo Lind",), "A haunted sleeper."
    )
    assert found.movies["77"] == redial.Movie("77", "Only Mentioned", "1970")
    assert list(found.movies) == [
        "10",
        "11",
        "20",
        "21",
        "30",
        "31",
        "77",
    ]  # what only the test side names is not in it
    (case,) = redial.cases_of(found.test[0])
    assert case.targets == ("88", "10")  # and yet nothing is lost


def test_validation_is_later_and_shares_no_worker_with_fit():
    train = [dialogue(i, seeker=i % 4, recommender=10 + i) for i in range(1, 21)]
    fit, validation = redial.split_validation(train, share=0.1)
    assert [d.id for d in validation] == ["19", "20"]  # seekers 3 and 0
    assert [d.id for d in fit] == [str(i) for i in range(1, 19) if i % 4 not in (0, 3)]


def test_what_is_missing_or_broken_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"There is no folder .*nowhere"):
        redial.read_redial(str(tmp_path / "nowhere"))
    folder = tiny_redial.write(
        tmp_path / "data", [tiny_redial.row(1, SAID, NAMES)], [tiny_redial.row(2, SAID[:3], NAMES)]
    )
    (folder / "id2info.json").rename(folder / "kept.json")
    with pytest.raises(UserError, match=r"There is no id2info\.json in"):
        redial.read_redial(str(folder))
    (folder / "id2info.json").write_text('{"10": {"genre": []}}')
    with pytest.raises(UserError, match="the movie 10 has no name"):
        redial.read_redial(str(folder))
    (folder / "kept.json").rename(folder / "id2info.json")
    good = (folder / "valid_data.jsonl").read_text()
    (folder / "valid_data.jsonl").write_text(good + "{\n")
    with pytest.raises(UserError, match=r"valid_data.jsonl, line 2: not valid JSON"):
        redial.read_redial(str(folder))
    row = tiny_redial.row(1, SAID, NAMES)
    del row["messages"][3]["text"]
    tiny_redial.write_lines(folder / "valid_data.jsonl", [row])
    with pytest.raises(UserError, match=r"line 1: the field text is missing"):
        redial.read_redial(str(folder))
    (folder / "valid_data.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match=r"line 1: not a ReDial dialogue"):
        redial.read_redial(str(folder))
    (folder / "valid_data.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"valid_data.jsonl is empty"):
        redial.read_redial(str(folder))
    (folder / "valid_data.jsonl").unlink()
    with pytest.raises(UserError, match="There are no train dialogues"):
        redial.read_redial(str(folder))
    tiny_redial.write_lines(folder / "valid_data.jsonl", [tiny_redial.row(2, SAID, NAMES)])
    with pytest.raises(UserError, match=r"Every train dialogue .* is in test_data\.jsonl too"):
        redial.read_redial(str(folder))


@pytest.fixture
def served(tmp_path):
    """A folder on the loopback interface: (folder, address)."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_downloads_the_archive_once_and_refuses_a_broken_one(served, tmp_path):
    folder, url = served
    source = tiny_redial.write(
        tmp_path / "source",
        [tiny_redial.row(1, SAID, NAMES)],
        [tiny_redial.row(2, SAID[:3], NAMES)],
    )
    (folder / "id2info.json").write_bytes((source / "id2info.json").read_bytes())
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(source / "valid_data.jsonl", "train_data.jsonl")
        archive.write(source / "test_data.jsonl", "test_data.jsonl")
    (folder / redial.ARCHIVE).write_bytes(packed.getvalue()[:-30])
    target = tmp_path / "cache"
    with pytest.raises(UserError, match=r"redial_dataset\.zip did not give valid ZIP"):
        redial.download(target, url, url)
    assert not (target / redial.ARCHIVE).exists()
    (folder / redial.ARCHIVE).write_bytes(packed.getvalue())
    found = redial.read_redial(str(redial.download(target, url, url)))
    assert [d.id for d in found.train] == ["1"] and found.files == ("train_data.jsonl",)
    (folder / redial.ARCHIVE).unlink()
    assert redial.download(target, url, url) == target  # nothing is asked for again


@needs_real_data
def test_the_real_files():
    found = redial.read_redial(str(REDIAL))
    assert (len(found.train), len(found.test), found.repeated) == (1813, 1342, 88)
    cases = [case for dialogue in found.test for case in redial.cases_of(dialogue)]
    assert (len(cases), sum(len(case.targets) for case in cases)) == (3671, 4969)
    fit, validation = redial.split_validation(found.train)
    assert not frozenset().union(*(d.workers for d in fit)) & frozenset().union(
        *(d.workers for d in validation)
    )
    assert (
        max(int(d.id) for d in fit)
        < min(int(d.id) for d in validation)
        < min(int(d.id) for d in found.test)
    )
