"""Taskmaster: rendering by hand, groups and parts, pairs, both dialogue layouts, downloads."""

from __future__ import annotations

import http.server
import json
import shutil
import threading

import numpy as np
import pytest

from experiments.taskmaster import data as taskmaster
from experiments.taskmaster import dialogue
from perl_jax.data import store, upstream
from perl_jax.data.config import DataConfig
from perl_jax.errors import UserError
from tests.paths import TASKMASTER as REAL

needs_real_data = pytest.mark.skipif(
    REAL is None or not REAL.is_dir(), reason="no copy of Taskmaster"
)
GREETING = {"role": "agent", "text": "Welcome!"}


def user(text):
    return {"role": "user", "text": text}


def call(name, **arguments):
    return {"role": "agent", "api": {name: arguments}}


def result(name, **values):
    return {"role": "api", "response": {name: values}}


def rated(context, generation, reward):
    return {"context": json.dumps(context), "generation": json.dumps(generation), "reward": reward}


# ------------------------------------------------------------------------------ rendering


def test_rendering_by_hand():
    turns = [
        GREETING,
        user("an  espresso\nplease"),
        call("get_menu_items", query='"hot" é'),
        result("get_menu_items", items=[{"id": "e-1", "shots": [1, 2]}], ok=True, note=None),
        call("show_menu"),
    ]
    assert dialogue.prompt_of(turns) == (
        "agent:\nWelcome!\n"
        "user:\nan espresso please\n"
        'agent:\ncall get_menu_items(query="\\"hot\\" é")\n'
        'api:\nget_menu_items(items=[{id: "e-1", shots: [1, 2]}], ok=true, note=null)\n'
        "agent:\ncall show_menu()\n"
        "agent:\n"
    )


def test_demonstrations_are_every_agent_turn_after_the_user_and_join_up_to_the_dialogue():
    done = {"role": "agent", "text": "Done."}
    turns = [GREETING, user("tea"), call("order", what="tea"), result("order", ok=True), done]
    found = list(dialogue.responses_of(turns))
    assert [response for _, response in found] == ['call order(what="tea")', "Done."]
    assert found[0][0] == "agent:\nWelcome!\nuser:\ntea\nagent:\n"
    prompt, response = found[1]
    assert f"{prompt}{response}\n" == dialogue.rendered(turns)


def note(name, value, number):
    return {"name": name, "value": value, "context": f"api_{number}"}


def test_tm4_calls_follow_the_users_utterance_that_carries_them():
    utterances = [
        {
            "speaker": "user",
            "text": "a tea",
            "annotations": [
                note("api_call", "find", 0),
                note("request", '{"query": "tea"}', 0),
                note("api_response", "find", 0),
                note("response", '{"items": ["\ttea"]}', 0),
                note("api_call", "show_menu", 1),  # upstream leaves out an empty request
                note("api_response", "show_menu", 1),
                note("response", '{"success": true}', 1),
            ],
        },
        {"speaker": "assistant", "text": "Here.", "annotations": []},
    ]
    assert dialogue.turns_of_tm4(utterances) == [
        user("a tea"),
        call("find", query="tea"),
        result("find", items=["\ttea"]),
        call("show_menu"),
        result("show_menu", success=True),
        {"role": "agent", "text": "Here."},
    ]


def test_tm3_calls_follow_a_user_and_precede_an_assistant():
    api = {"name": "find", "args": {"a": "1"}, "response": {"b": "2"}}
    utterances = [
        {"speaker": "user", "text": "u", "apis": [api]},
        {"speaker": "assistant", "text": "v", "apis": [api]},
    ]
    pair = [call("find", a="1"), result("find", b="2")]
    assert dialogue.turns_of_tm3(utterances) == [
        user("u"),
        *pair,
        *pair,
        {"role": "agent", "text": "v"},
    ]


# ------------------------------------------------------------------------------ groups and rows


def test_a_context_and_its_extension_are_one_group():
    one = [GREETING, user("Can I get an espresso, please?")]
    two = [*one, call("find"), user("make it a double")]
    assert dialogue.group_of(one) == dialogue.group_of(two) == "can i get an espresso please"
    assert dialogue.group_of([user("can I get an espresso please")]) == dialogue.group_of(one)
    assert dialogue.group_of([GREETING]) == dialogue.group_of([]) == ""


def test_parts_have_their_shares_and_are_stable():
    found = [taskmaster.part_of(f"group {i}") for i in range(4000)]
    for part, share in {"train": 0.47, "judge": 0.23, "validation": 0.10, "test": 0.20}.items():
        # Four standard deviations of a binomial share.
        assert abs(found.count(part) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert taskmaster.part_of("can i get an espresso please") == "train"
    assert taskmaster.parts("train", judged=False) == ("train", "judge")
    assert taskmaster.parts("train", judged=True) == ("train",)
    assert taskmaster.parts("test", judged=False) == ("test",)


def test_the_judges_part_trains_no_reward_model():
    assert taskmaster.parts("train", judged=True) == ("train",) and taskmaster.parts(
        "judge", judged=True
    ) == ("judge",)
    assert taskmaster.parts("train", judged=False) == ("train", "judge")


def test_comparisons_are_all_pairs_of_different_text_on_one_context():
    context, other = [user("tea")], [user("coffee")]
    say = lambda text: {"role": "agent", "text": text}
    rows = [
        rated(context, say("good"), 1.0),
        rated(context, say("good"), 1.0),  # exact duplicates make no second pair
        rated(context, say("fine"), 1.0),
        rated(context, say("bad"), 0.0),
        rated(context, say("fine"), 0.0),  # rated both ways: no pair with itself
        rated(other, say("lone"), 0.0),
    ]
    found = list(taskmaster.comparisons(taskmaster.rated_rows(rows)))
    pairs = [(row["chosen"], row["rejected"]) for row in found]
    assert pairs == [("good", "bad"), ("good", "fine"), ("fine", "bad")]
    assert {row["prompt"] for row in found} == {"user:\ntea\nagent:\n"} and {
        row["group"] for row in found
    } == {"tea"}


def test_only_contexts_that_no_other_extends():
    assert list(taskmaster.unextended(["b\n", "a\n", "a\nc\n", "a\n", ""])) == ["a\nc\n", "b\n"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"context": "[", "generation": "{}", "reward": 1},
            "Reward row 0 has no valid JSON in its context",
        ),
        ({"generation": "{}", "reward": 1}, "Reward row 0 has no valid JSON in its context"),
        (
            {"context": "[{}]", "generation": "{}", "reward": 1},
            "Reward row 0 has a turn in its context without a role",
        ),
        (rated([], GREETING, 0.5), r"Reward row 0 has the reward 0\.5; it must be 0 or 1"),
    ],
)
def test_broken_reward_rows_are_named(row, message):
    with pytest.raises(UserError, match=message):
        list(taskmaster.rated_rows([row]))


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def small_upstream(folder, *, dialogues_too):
    say = lambda text: {"role": "agent", "text": text}
    rows = [
        rated([GREETING, user(f"film {i}")], say(f"answer {i}-{reward}"), float(reward))
        for i in range(60)
        for reward in (0, 1)
    ]
    write_json(folder / "TM-3-2020" / "reward" / "reward_00.json", rows)
    if dialogues_too:
        utterances = [
            {"speaker": "user", "text": "hi"},
            {"speaker": "assistant", "text": "tickets?"},
        ]
        broken = [{"speaker": "user"}]
        talks = [
            {"utterances": [{**utterances[0], "text": f"hi {i}"}, utterances[1]]} for i in range(60)
        ]
        talks.append({"utterances": broken})
        write_json(folder / "TM-3-2020" / "data" / "data_00.json", talks)
    return DataConfig(data_dir=str(folder))


def opened(task, kind, split, options):
    source = task.open(kind, split, options)
    return [source[i] for i in range(len(source))]


def test_ticketing_demonstrations_without_dialogues_are_up_rated_train_rows(tmp_path):
    options = small_upstream(tmp_path, dialogues_too=False)
    labels = opened(taskmaster.TICKETING, "labels", "train", options)
    found = opened(taskmaster.TICKETING, "demonstrations", "train", options)
    up = [(row["prompt"], row["response"]) for row in labels if row["label"] == 1]
    assert [(row["prompt"], row["response"]) for row in found] == up
    # Every kind of row says which dialogue it is of: prompts are `user: film 3`, behind a greeting.
    for kind in ("labels", "demonstrations", "comparisons", "prompts"):
        for row in opened(taskmaster.TICKETING, kind, "train", options):
            assert row["group"] == store.group_of(row) == row["prompt"].split("\n")[-3]
    corpus = opened(taskmaster.TICKETING, "corpus", "train", options)
    assert {row["text"] + dialogue.CUE for row in corpus} == {row["prompt"] for row in labels}


def test_ticketing_demonstrations_come_from_dialogues_when_there(tmp_path):
    options = small_upstream(tmp_path, dialogues_too=True)
    found = opened(taskmaster.TICKETING, "demonstrations", "train", options)
    assert {row["response"] for row in found} == {"tickets?"}
    # The dialogues lack the greeting that the reward rows open with.
    assert all(row["prompt"].startswith("agent:\nWelcome!\nuser:\nhi ") for row in found)
    splits = ("train", "validation", "test")
    assert (
        sum(len(opened(taskmaster.TICKETING, "corpus", split, options)) for split in splits) == 60
    )


def test_the_corpus_of_both_is_both_corpora(tmp_path):
    options = small_upstream(tmp_path, dialogues_too=True)
    (tmp_path / "TM-4-2024" / "data").mkdir(parents=True)
    shutil.copytree(tmp_path / "TM-3-2020" / "reward", tmp_path / "TM-4-2024" / "reward")
    say = lambda speaker, text: {"speaker": speaker, "text": text, "annotations": []}
    coffees = [
        {"utterances": [say("user", f"coffee {i}"), say("assistant", "how?")]} for i in range(60)
    ]
    write_json(tmp_path / "TM-4-2024" / "data" / "data_00.json", coffees)
    for split in ("train", "validation", "test"):
        own = [
            row
            for task in (taskmaster.COFFEE, taskmaster.TICKETING)
            for row in opened(task, "corpus", split, options)
        ]
        assert opened(taskmaster.BOTH, "corpus", split, options) == own


def test_missing_copy_is_named(tmp_path):
    options = DataConfig(data_dir=str(tmp_path))
    with pytest.raises(
        UserError,
        match=r"no \.json files in .*TM-4-2024/reward; data_dir must name a copy of the upstream "
        r"folder\.$",
    ):
        taskmaster.COFFEE.open("labels", "train", options)
    write_json(tmp_path / "TM-4-2024" / "reward" / "reward_00.json", {"not": "a list"})
    with pytest.raises(UserError, match=r"reward_00\.json must hold a JSON list of objects"):
        taskmaster.COFFEE.open("labels", "train", options)


# ------------------------------------------------------------------------------ downloads


@pytest.fixture
def server(tmp_path):
    """A folder served on the loopback interface: (folder, base address, paths asked for)."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_address[1]}", asked
        running.shutdown()


def test_downloads_once_and_whole(server, tmp_path, monkeypatch):
    monkeypatch.setenv("PERL_JAX_CACHE", str(tmp_path / "cache"))
    folder, base, asked = server
    for index in range(taskmaster.TicketingBuilder.reward_count):
        name = f"reward_{index:02}.json"
        write_json(folder / "TM-3-2020" / "reward" / name, [rated([user("u")], GREETING, 1.0)])
    options = DataConfig()
    files = taskmaster.TicketingBuilder.files(options, "reward", base)
    assert [path.name for path in files] == [f"reward_{index:02}.json" for index in range(8)]
    assert len(upstream.read_lists(files)) == 8
    assert taskmaster.TicketingBuilder.files(options, "reward", base) == files
    assert len(asked) == 8
    assert taskmaster.TicketingBuilder.files(options, "data", base) == []
    assert taskmaster.COMMIT[:7] in str(files[0])
    assert all(path.suffix == ".json" for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_failed_downloads_leave_nothing_and_say_what_to_do(server, tmp_path):
    folder, base, _ = server
    with pytest.raises(
        UserError,
        match=r"Could not download .*gone\.json \(File not found\); give a local copy "
        r"\(data_dir\)\.$",
    ):
        upstream.fetch(base, "gone.json", tmp_path / "cache")
    (folder / "half.json").write_text("[{")
    with pytest.raises(UserError, match=r"half\.json did not give valid JSON"):
        upstream.fetch(base, "half.json", tmp_path / "cache")
    with pytest.raises(
        UserError, match=r"Could not download http://127\.0\.0\.1:9/x\.json .*Connection refused"
    ):
        upstream.fetch("http://127.0.0.1:9", "x.json", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


# ------------------------------------------------------------------------------ the real data


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return DataConfig(data_dir=str(REAL))


def first_user_turn(prompt):
    """Its letters and digits, read off the text by other means than the package's."""
    line = prompt.partition("user:\n")[2].split("\n")[0]
    return "".join(c for c in line.lower() if c.isalnum())


@needs_real_data
@pytest.mark.parametrize(
    ("task", "rows", "up", "groups", "pairs"),
    [(taskmaster.COFFEE, 3228, 2775, 852, 617), (taskmaster.TICKETING, 3667, 573, 260, 22)],
    ids=["coffee", "ticketing"],
)
def test_real_counts_and_disjoint_parts(real, task, rows, up, groups, pairs):
    labels = {split: opened(task, "labels", split, real) for split in taskmaster.JUDGED}
    whole = [row for part in labels.values() for row in part]
    assert len(whole) == rows
    assert sum(row["label"] for row in whole) == up
    found = {
        split: {first_user_turn(row["prompt"]) for row in part} for split, part in labels.items()
    }
    assert sum(map(len, found.values())) == len(set.union(*found.values()))
    assert abs(len(set.union(*found.values())) - groups) <= 2
    for split, share in {"train": 0.47, "judge": 0.23, "validation": 0.10, "test": 0.20}.items():
        assert abs(len(labels[split]) / rows - share) < 0.05
        assert min(np.mean([row["label"] for row in labels[split]]), 0.9) > 0.1
    compared = [
        row for split in taskmaster.JUDGED for row in opened(task, "comparisons", split, real)
    ]
    assert len(compared) == pairs
    prompts = opened(task, "prompts", "train", real)
    assert {row["prompt"] for row in prompts} == {
        row["prompt"] for row in labels["train"] + labels["judge"]
    }


@needs_real_data
def test_real_extensions_stay_on_one_side(real):
    """A row whose context begins with another row's context and response is in that row's part."""
    part_of = {}
    labels = {
        split: opened(taskmaster.TICKETING, "labels", split, real) for split in taskmaster.JUDGED
    }
    for split, part in labels.items():
        part_of.update({row["prompt"]: split for row in part})
    checked = 0
    for split, part in labels.items():
        for row in part:
            lines = row["prompt"].split(dialogue.CUE)
            for cut in range(2, len(lines)):
                shorter = dialogue.CUE.join(lines[:cut]) + dialogue.CUE
                if "user:\n" in shorter and shorter in part_of:
                    checked += 1
                    assert part_of[shorter] == split
    assert checked > 3000


@needs_real_data
def test_real_coffee_demonstrations_look_like_reward_rows(real):
    found = opened(taskmaster.COFFEE, "demonstrations", "validation", real)
    labels = opened(taskmaster.COFFEE, "labels", "validation", real)
    assert 1500 < len(found) < 3000
    opening = labels[0]["prompt"].partition("user:\n")[0]
    assert np.mean([row["prompt"].startswith(opening) for row in labels]) > 0.95
    assert np.mean([row["prompt"].startswith(opening) for row in found]) > 0.95
    for rows in (found, labels):
        assert 0.4 < np.mean([row["response"].startswith("call ") for row in rows]) < 0.9
        assert all("\n" not in row["response"] for row in rows)
        assert all(f"\n{row['prompt']}".endswith("\nagent:\n") for row in rows)
