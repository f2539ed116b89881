"""The judge against a server of the test's own: what is asked, what is read, what is tried
again.
"""

from __future__ import annotations

import collections
import dataclasses
import http.server
import json
import logging
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from perl_jax.errors import UserError
from perl_jax.rewards.judge import TEMPLATE, Judge
from perl_jax.rewards.judge_answers import read_number
from perl_jax.rewards.judge_endpoint import chat_url

SHORT = "{prompt}|{response}"


def completion(
    answer: str | None, logprobs: Any = None, finish: str = "stop"
) -> tuple[int, dict, dict]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answer},
        "finish_reason": finish,
        "logprobs": logprobs,
    }
    return 200, {}, {"id": "1", "object": "chat.completion", "choices": [choice]}


@dataclasses.dataclass
class Server:
    """reply(question, times it has been asked before) -> status, headers, JSON value or bytes;
    None: silence.
    """

    url: str
    reply: Callable[[str, int], tuple[int, dict, Any] | None]
    requests: list[tuple[str, dict, dict]] = dataclasses.field(default_factory=list)
    asked: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    silence: threading.Event = dataclasses.field(default_factory=threading.Event)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def judge(self, **settings) -> Judge:
        return Judge(
            **{
                "url": self.url,
                "model": "m",
                "template": SHORT,
                "backoff_seconds": 0.001,
                "timeout_seconds": 30,
                **settings,
            }
        )


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        state = self.server.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        with state.lock:
            state.requests.append((self.path, dict(self.headers), body))
            before = state.asked[question]
            state.asked[question] += 1
        reply = state.reply(question, before)
        if reply is None:
            state.silence.wait(30)
            return
        status, headers, value = reply
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST  # a followed redirect would arrive as a GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Server(
        f"http://127.0.0.1:{http_server.server_port}/v1", lambda question, before: completion("7")
    )
    http_server.state = state
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    state.silence.set()
    http_server.shutdown()
    http_server.server_close()
    thread.join()


def ask(judge, *responses, prompt="p"):
    values = judge([prompt] * len(responses), responses, [{}] * len(responses))
    assert values.dtype == np.float64
    assert values.shape == (len(responses),)
    return values.tolist()


def message(judge, *responses):
    with pytest.raises(UserError) as caught:
        ask(judge, *responses)
    return str(caught.value)


def test_the_request(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", " secret\n")
    judge = server.judge(
        model="org/judge",
        template=TEMPLATE,
        lowest=0,
        highest=8,
        max_tokens=9,
        api_key_variable="JUDGE_KEY",
    )
    assert ask(judge, "an answer", prompt="a question") == [7 / 8]
    [(path, headers, body)] = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Content-Type"] == "application/json"
    [said] = body.pop("messages")
    assert body == {"model": "org/judge", "temperature": 0.0, "max_tokens": 9}
    assert said["role"] == "user"
    assert (
        "<request>\na question\n</request>\n\n<response>\nan answer\n</response>" in said["content"]
    )
    assert said["content"].endswith("from 0 (very bad) to 8 (excellent), and nothing else.")


def test_without_a_key_none_is_sent(server):
    ask(server.judge(), "r")
    assert "Authorization" not in server.requests[0][1]


def test_braces_and_backslashes_stay_what_they_are(server):
    judge = server.judge(template='{"p": {prompt}, "r": {response}, {other} {{}} {0} %s}')
    ask(judge, r"{prompt} {response} {} {x \1 \g<0>", prompt="{response}{lowest}")
    said = server.requests[0][2]["messages"][0]["content"]
    assert said == (
        r'{"p": {response}{lowest}, "r": {prompt} {response} {} {x \1 \g<0>, '
        r"{other} {{}} {0} %s}"
    )


def test_order_is_kept_under_concurrency(server):
    together = threading.Barrier(4, timeout=20)

    def reply(question, before):
        together.wait()  # goes on only when four requests are there at once
        return completion(question.partition("|")[2])

    server.reply = reply
    scores = [float(1 + (7 * i) % 10) for i in range(12)]
    found = ask(server.judge(concurrency=4), *(f"{score:g}" for score in scores))
    assert found == [(score - 1) / 9 for score in scores]
    assert len(server.requests) == 12


def test_unicode_huge_and_empty_texts(server):
    server.reply = lambda question, before: completion(str(len(question)))
    judge = server.judge(lowest=0, highest=2_000_000)
    assert ask(judge, "", "日本\ud800", "x" * 999_998, prompt="") == [
        1 / 2e6,
        4 / 2e6,
        999_999 / 2e6,
    ]
    assert ask(judge) == []
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, status):
    server.reply = lambda question, before: (
        (status, {}, {"error": "busy"}) if before < 2 else completion("10")
    )
    assert ask(server.judge(retries=2), "a", "b") == [1, 1]
    assert set(server.asked.values()) == {3}
    found = message(server.judge(retries=1, concurrency=1, template="2" + SHORT), "a")
    assert found == (
        f"The judge at {server.url} gave no score for index 0 in 2 attempts: status {status}, "
        '\'{"error": "busy"}\'.'
    )


def test_waits_double_up_to_a_minute_and_heed_the_server(server, monkeypatch):
    waits = []
    monkeypatch.setattr(threading.Event, "wait", recorded(waits, threading.Event.wait))
    server.reply = lambda question, before: (
        429,
        {"Retry-After": "9" if before == 1 else "soon"},
        {},
    )
    message(server.judge(retries=5, backoff_seconds=4), "a")
    assert waits == [4, 9, 16, 32, 60]


def recorded(waits, wait):
    """Event.wait that notes the judge's waits, which begin at a second, and does not wait for
    them.
    """

    def stand_in(event, seconds=None):
        if (
            seconds is not None
            and 1 < seconds <= 60
            and threading.current_thread().name.startswith("judge")
        ):
            waits.append(seconds)
            return False
        return wait(event, seconds)

    return stand_in


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (400, "check judge's settings"),
        (401, "check the key"),
        (404, "check judge.url and judge.model"),
        (301, "it redirects; give the address it leads to"),
    ],
)
def test_other_statuses_are_errors_at_once(server, status, hint, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    location = {"Location": server.url + "/chat/completions"}
    server.reply = lambda question, before: (status, location, {"error": "no secret\nhere"})
    found = message(server.judge(api_key_variable="JUDGE_KEY"), "a")
    assert found == (
        f"The judge at {server.url}/chat/completions refused the request: status {status}, "
        f'\'{{"error": "no (key)\\\\nhere"}}\'; {hint}.'
    )
    assert len(server.requests) == 1


def test_the_first_error_ends_the_batch(server):
    server.reply = lambda question, before: (500, {}, {}) if question == "p|slow" else (401, {}, {})
    found = message(server.judge(concurrency=2, retries=9, backoff_seconds=60), "slow", *"abcdefgh")
    assert "status 401" in found
    assert set(server.asked) <= {"p|slow", "p|a"}
    assert max(server.asked.values()) == 1


def test_a_silent_server(server):
    server.reply = lambda question, before: None if before == 0 else completion("1")
    assert ask(server.judge(timeout_seconds=0.3), "a") == [0]
    assert server.asked["p|a"] == 2
    server.reply = lambda question, before: None
    found = message(server.judge(timeout_seconds=0.2, retries=1), "b")
    assert found == (
        f"The judge at {server.url} gave no score for index 0 in 2 attempts: no answer within "
        "0.2 s."
    )


def test_a_connection_cut_in_the_middle_is_tried_again(server):
    cut = (200, {"Content-Length": "1000"}, b'{"choices"')
    server.reply = lambda question, before: cut if before == 0 else completion("10")
    assert ask(server.judge(), "a") == [1]


def test_a_server_that_is_not_there():
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}"
    found = message(Judge(url=url, model="m", retries=1, backoff_seconds=0.001), "a")
    assert found.startswith(
        f"The judge at {url} gave no score for index 0 in 2 attempts: the connection failed ("
    )
    assert "refused" in found


@pytest.mark.parametrize(
    "reply",
    [
        b"<html>hello</html>",
        b"\xff",
        {"error": "quota"},
        {"choices": []},
        {"choices": ["7"]},
        {"choices": [{"text": "7"}]},
        [],
    ],
)
def test_replies_that_are_no_chat_completion(server, reply):
    server.reply = lambda question, before: (200, {}, reply)
    found = message(server.judge(), "a")
    assert found.startswith("The judge's reply is not a chat completion: '")
    assert found.endswith("'; check that judge.url is an OpenAI-compatible endpoint.")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("7", 7),
        (" 7.", 7),
        ("8/10", 8),
        ("Score: **9** of 10", 9),
        ("I say 2.5, or 3", 2.5),
        ("v2 gives 4", 4),
        ("+3", 3),
        ("Rating-6", 6),
        ("10", 10),
        ("８", 8),
    ],
)
def test_the_first_number_is_read(answer, score):
    assert read_number({"message": {"content": answer}}, 1, 10) == score


def test_an_answer_without_a_score_is_asked_for_again(server):
    answers = ["none", "0.5", "11", "-3", "9" * 400, None, "4"]
    server.reply = lambda question, before: completion(answers[before])
    assert ask(server.judge(retries=6), "a") == [1 / 3]


@pytest.mark.parametrize(
    ("answer", "finish", "problem"),
    [
        ("no " * 100, "stop", f"the answer {('no ' * 40)!r} holds no number from 1 to 10"),
        (
            "11 of 10",
            "stop",
            "the answer '11 of 10' has 11 as its first number, not one from 1 to 10",
        ),
        (None, "length", "the answer '' (cut at max_tokens) holds no number from 1 to 10"),
    ],
)
def test_answers_without_a_score(server, caplog, answer, finish, problem):
    server.reply = lambda question, before: completion(
        "10" if question == "p|good" else answer, finish=finish
    )
    found = message(server.judge(retries=2), "good", "bad")
    assert found == f"The judge at {server.url} gave no score for index 1 in 3 attempts: {problem}."
    assert server.asked["p|bad"] == 3
    with caplog.at_level(logging.WARNING):
        assert ask(server.judge(retries=0, on_failure="neutral"), "good", "bad") == [1, 0.5]
    assert "1 of 2 answers of the judge held no score; they count 0.5." in caplog.text


def test_neutral_does_not_cover_a_server_that_fails(server):
    server.reply = lambda question, before: (500, {}, b"")
    assert message(server.judge(retries=0, on_failure="neutral"), "a").endswith(
        "in 1 attempt: status 500."
    )


def listed(*positions):
    """Log-probabilities of an answer: for each token, its text and its candidates'
    probabilities.
    """
    return {
        "content": [
            {
                "token": token,
                "logprob": 0,
                "top_logprobs": [
                    {"token": t, "logprob": math.log(p) if p else -9999.0}
                    for t, p in candidates.items()
                ],
            }
            for token, candidates in positions
        ]
    }


def test_expected_score(server):
    # 8 (twice written) has 0.5, 2 has 0.3, of 0.8 in all: (8 * 0.5 + 2 * 0.3) / 0.8 = 5.75.
    candidates = {
        "8": 0.3,
        " 8": 0.2,
        "2": 0.3,
        "the": 0.1,
        "11": 0.05,
        "0": 0.04,
        "5": 0,
        "1.5": 0.01,
    }
    server.reply = lambda question, before: completion(
        "8", listed(("\n", {"1": 1.0}), ("8", candidates), (".", {"1": 1.0}))
    )
    [value] = ask(server.judge(mode="expected", top_logprobs=7), "a")
    assert value == pytest.approx((5.75 - 1) / 9, rel=1e-12)
    body = server.requests[0][2]
    assert (body["logprobs"], body["top_logprobs"]) == (True, 7)


def test_expected_score_needs_numbers_among_the_candidates(server):
    answers = [
        listed(("Sure", {"Sure": 0.9, "11": 0.1})),
        listed(),
        listed(("3", {"3": 0})),
        listed(("3", {"3": 1.0})),
    ]
    server.reply = lambda question, before: completion("Sure", answers[before])
    [value] = ask(server.judge(mode="expected"), "a")
    assert value == pytest.approx(2 / 9, rel=1e-12)
    found = message(server.judge(mode="expected", retries=0, template="2" + SHORT), "a")
    assert found.endswith(
        "in 1 attempt: the answer 'Sure' has no number from 1 to 10 among its likely first tokens."
    )


@pytest.mark.parametrize(
    "logprobs", [None, {}, {"content": None}, {"content": [{"token": "7"}]}, {"tokens": ["7"]}]
)
def test_expected_score_without_log_probabilities(server, logprobs):
    server.reply = lambda question, before: completion("7", logprobs)
    found = message(server.judge(mode="expected"), "a")
    assert found == (
        "The judge's server returns no log-probabilities, which mode expected needs; use a "
        "server that does, or mode number."
    )
    assert len(server.requests) == 1


def test_expected_score_of_a_tokenizer_that_splits_numbers(server):
    server.reply = lambda question, before: completion(
        "10", listed(("1", {"1": 1.0}), ("0", {"0": 1.0}))
    )
    found = message(server.judge(mode="expected"), "a")
    assert found.startswith(
        "The judge's model writes a score as two tokens, '1' and '0', which mode expected cannot "
        "read"
    )


def test_the_key_is_checked_before_the_first_batch(monkeypatch):
    judge = Judge(url="http://localhost/v1", model="m", api_key_variable="JUDGE_KEY")
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    for _ in range(2):
        with (
            pytest.raises(
                UserError,
                match=r"The environment variable JUDGE_KEY \(judge\.api_key_variable\) is not "
                r"set\.",
            ),
            judge,
        ):
            pass
        monkeypatch.setenv("JUDGE_KEY", " ")
    monkeypatch.setenv("JUDGE_KEY", "sec\nret")
    with pytest.raises(UserError) as caught, judge:
        pass
    assert "sec" not in str(caught.value)


def test_the_address_of_chat_completions():
    assert (
        chat_url("http://h:8000")
        == chat_url("http://h:8000/")
        == "http://h:8000/v1/chat/completions"
    )
    assert chat_url("https://h/api/v3/") == "https://h/api/v3/chat/completions"
    assert (
        chat_url("https://h/v1/chat/completions?version=2")
        == "https://h/v1/chat/completions?version=2"
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"url": "localhost:8000"},
            "judge.url is 'localhost:8000'; it must be an http or https address, such as "
            "http://localhost:8000/v1.",
        ),
        ({"url": "http://h:x/v1"}, "judge.url is 'http://h:x/v1'; it must be"),
        ({"url": "http://a b/v1"}, "judge.url is 'http://a b/v1'; it must be"),
        ({"url": 3}, "judge.url is 3; it must be a text"),
        (
            {"url": "http://me:pass@h/v1"},
            "judge.url holds a user name or a password; give the address alone",
        ),
        ({"model": ""}, "judge.model is ''; it must be a text that is not empty."),
        (
            {"template": "{prompt} {Response}"},
            "judge.template has no {response}; it must hold {prompt} and {response}.",
        ),
        ({"template": "rate it"}, "judge.template has no {prompt} and no {response};"),
        (
            {"lowest": 10},
            "judge.lowest is 10 and judge.highest 10; the highest must be above the lowest.",
        ),
        ({"highest": float("inf")}, "judge.highest is inf; it must be a finite number."),
        ({"mode": "mean"}, "judge.mode is 'mean'; it must be one of number, expected."),
        ({"on_failure": "skip"}, "judge.on_failure is 'skip'; it must be one of error, neutral."),
        (
            {"api_key_variable": "sk-123"},
            "judge.api_key_variable must be the name of an environment variable (OPENAI_API_KEY), "
            "not a key.",
        ),
        (
            {"timeout_seconds": 0},
            "judge.timeout_seconds is 0; it must be a finite number greater than 0.",
        ),
        (
            {"backoff_seconds": -1},
            "judge.backoff_seconds is -1; it must be a finite number greater than 0.",
        ),
        ({"temperature": -1}, "judge.temperature is -1; it must be a finite number at least 0."),
        ({"retries": -1}, "judge.retries is -1; it must be a whole number of at least 0."),
        ({"concurrency": 0}, "judge.concurrency is 0; it must be a whole number of at least 1."),
        ({"max_tokens": 1.5}, "judge.max_tokens is 1.5; it must be a whole number of at least 1."),
        ({"top_logprobs": 0}, "judge.top_logprobs is 0; it must be a whole number of at least 1."),
    ],
)
def test_wrong_settings(settings, expected):
    with pytest.raises(UserError) as caught:
        Judge(**{"url": "http://localhost/v1", "model": "m", **settings})
    assert expected in str(caught.value)
    assert "pass@" not in str(caught.value)
    assert "sk-123" not in str(caught.value)
