"""The judge against servers that are slow, endless or indiscreet, and while it is told to stop."""

from __future__ import annotations

import gzip
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback

import pytest

from perl_jax.errors import UserError
from perl_jax.rewards.judge import Judge
from perl_jax.rewards.judge_endpoint import bare_url, without_key
from perl_jax.rewards.judge_transport import LARGEST_REPLY
from perl_jax.runtime import hosts, stopping
from tests.rewards.servers import completion_bytes, reply_bytes, request_of, serving

KEY = 'sk-a"b/c+Unicode'


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def judge(port: int, **settings) -> Judge:
    settings = {"timeout_seconds": 20, "retries": 0, "backoff_seconds": 0.001, **settings}
    return Judge(**{"url": f"http://127.0.0.1:{port}/v1", "model": "m", **settings})


def ask(judge: Judge, count: int = 1) -> list[float]:
    return judge(["p"] * count, ["r"] * count, [{}] * count).tolist()


def message(judge: Judge) -> str:
    with pytest.raises(UserError) as caught:
        ask(judge)
    return str(caught.value)


def test_a_whole_reply_is_read():
    def answer(connection):
        request_of(connection)
        connection.sendall(reply_bytes(completion_bytes("10")))

    with serving(answer) as port:
        assert ask(judge(port), 3) == [1, 1, 1]


def dripping(before: bytes, drop: bytes):
    """Sends the beginning at once, and then a drop every 20 ms for ever."""

    def answer(connection):
        request_of(connection)
        connection.sendall(before)
        while True:
            connection.sendall(drop)
            time.sleep(0.02)

    return answer


@pytest.mark.parametrize(
    ("before", "drop"),
    [
        (b"HTTP/1.1 200 ", b"O"),
        (b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (b"HTTP/1.1 500 Error\r\nContent-Length: 100000\r\n\r\n", b" "),
    ],
    ids=["status", "headers", "continue", "body", "body-to-the-end", "chunks", "error"],
)
def test_a_server_that_drips_does_not_outlive_the_deadline(before, drop):
    with serving(dripping(before, drop)) as port:
        begun = time.monotonic()
        found = message(judge(port, timeout_seconds=0.3))
        assert time.monotonic() - begun < 15
    if before.startswith(b"HTTP/1.1 500"):
        assert found.endswith("in 1 attempt: status 500.")
    elif drop != b"A: b\r\n":  # a hundred headers may come sooner
        assert found.endswith("in 1 attempt: no answer within 0.3 s.")


def test_a_tls_handshake_and_a_full_queue_of_connections_end_too():
    def answer(connection):
        connection.recv(65536)
        while True:  # the head of a long TLS record, then its bytes one by one
            connection.sendall(b"\x16")
            time.sleep(0.02)

    with serving(answer) as port:
        begun = time.monotonic()
        url = f"https://127.0.0.1:{port}/v1"
        assert "gave no score" in message(judge(port, url=url, timeout_seconds=0.3))
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:  # never accepts
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        found = message(judge(listener.getsockname()[1], timeout_seconds=0.3))
        assert found.endswith("in 1 attempt: no answer within 0.3 s.")
        for one in waiting:
            one.close()
    assert time.monotonic() - begun < 30


def endless(before: bytes, piece: bytes):
    def answer(connection):
        request_of(connection)
        connection.sendall(before)
        for _ in itertools.count():
            connection.sendall(piece)

    return answer


@pytest.mark.parametrize(
    ("before", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000000000000\r\n\r\n", b" " * 65536),
        (b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b" " * 4098),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
            b" " * 65536,
        ),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"1;" + b"e" * 60_000 + b"\r\n \r\n",
        ),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
            b"A: " + b"b" * 60_000 + b"\r\n",
        ),
        (b"", b"HTTP/1.1 100 Continue\r\nA: " + b"b" * 60_000 + b"\r\n\r\n"),
    ],
    ids=["length", "to-the-end", "chunks", "one-chunk", "extensions", "trailers", "continue"],
)
def test_a_reply_without_an_end_is_refused(before, piece):
    with serving(endless(before, piece)) as port:
        found = message(judge(port, retries=3))
    assert found == (
        f"The judge at http://127.0.0.1:{port}/v1/chat/completions sent a reply of more than 8 MiB;"
        " check that judge.url is an OpenAI-compatible endpoint."
    )


@pytest.mark.parametrize("piece", [b"A: b\r\n", b"a"], ids=["headers", "one-header"])
def test_headers_without_an_end_are_refused(piece):
    with serving(endless(b"HTTP/1.1 200 OK\r\n", piece * 1000)) as port:
        assert "in 1 attempt: the connection failed (got more than" in message(judge(port))


def test_a_reply_of_the_largest_size_is_read_and_a_compressed_one_is_not_unpacked():
    bodies = [completion_bytes("10").ljust(LARGEST_REPLY), gzip.compress(bytes(10**7))]

    def answer(connection):
        request_of(connection)
        connection.sendall(reply_bytes(bodies.pop(0), "200 OK", "Content-Encoding: gzip"))

    with serving(answer) as port:
        assert ask(judge(port)) == [1]
        assert message(judge(port)).startswith("The judge's reply is not a chat completion: '\\x1f")


@pytest.fixture
def silent():
    """(port, set when a request has come) of a server that never answers."""
    asked = threading.Event()

    def answer(connection):
        request_of(connection)
        asked.set()
        connection.recv(1)

    with serving(answer) as port:
        yield port, asked


def signal_when(asked: threading.Event, number: int) -> None:
    def wait() -> None:
        asked.wait(20)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


def test_a_run_that_gets_sigterm_does_not_wait_for_the_judge(silent):
    port, asked = silent
    with hosts.Termination() as termination:
        signal_when(asked, signal.SIGTERM)
        begun = time.monotonic()
        with pytest.raises(stopping.Abandoned):
            ask(judge(port, timeout_seconds=60, retries=9), 5)
        assert time.monotonic() - begun < 15
        assert termination.noted
        termination.noted = 0  # the test itself goes on
    assert not stopping.told()


def test_ctrl_c_does_not_wait_for_the_judge(silent):
    port, asked = silent
    signal_when(asked, signal.SIGINT)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask(judge(port, timeout_seconds=60), 5)
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_ends_at_once_while_the_judge_is_silent(silent, number):
    port, asked = silent
    code = (
        "import sys; from perl_jax.rewards.judge import Judge; "
        "Judge(sys.argv[1], 'm', timeout_seconds=60)(['p'] * 9, ['r'] * 9, [{}] * 9)"
    )
    command = [sys.executable, "-c", code, f"http://127.0.0.1:{port}/v1"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        assert asked.wait(30)
        begun = time.monotonic()
        process.send_signal(number)
        assert process.wait(20) == -number
        assert time.monotonic() - begun < 15


def test_an_error_of_one_response_ends_the_waits_for_the_others():
    together = threading.Barrier(4)

    def answer(connection):
        request_of(connection)
        if together.wait(20) == 0:
            connection.sendall(reply_bytes(b"{}", "400 Bad Request"))
        connection.recv(1)

    with serving(answer) as port:
        begun = time.monotonic()
        with pytest.raises(UserError, match="status 400"):
            ask(judge(port, timeout_seconds=60, concurrency=4), 9)
        assert time.monotonic() - begun < 15


def key_in(request: bytes) -> str:
    return request.split(b"Bearer ")[1].split(b"\r\n")[0].decode()


ECHOES = {
    "no completion": lambda key: reply_bytes(f'{{"your": {key!r}}}'.encode()),
    "cut in the key": lambda key: reply_bytes(("x" * 110 + key).encode()),
    "answer": lambda key: reply_bytes(completion_bytes(f"you said {key}")),
    "cut answer": lambda key: reply_bytes(completion_bytes("x" * 110 + key)),
    "400": lambda key: reply_bytes(f"bad key {key}".encode(), "400 Bad Request"),
    "401, cut where it is read": lambda key: reply_bytes(
        b" " * (2**16 - 9) + f"{key}!".encode(), "401 No"
    ),
    "503": lambda key: reply_bytes(f"bad key {key}".encode(), "503 Busy"),
    "reason": lambda key: reply_bytes(b"", f"400 Bad {key}"),
    "reason of a busy server": lambda key: reply_bytes(b"", f"500 Bad {key}"),
    "header": lambda key: reply_bytes(b"", "400 Bad", f"X-Key: {key}"),
    "wait": lambda key: reply_bytes(b"", "429 Slow", f"Retry-After: {key}"),
    "redirect": lambda key: reply_bytes(b"", "302 Found", f"Location: http://127.0.0.1/{key}"),
    "redirect to nowhere": lambda key: reply_bytes(b"", "302 Found", f"Location: http://[{key}"),
    "no HTTP": lambda key: f"{key} {key}\r\n\r\n".encode(),
    "version": lambda key: f"HTTP/{key} 200 OK\r\n\r\n".encode(),
    "status": lambda key: f"HTTP/1.1 {key} OK\r\n\r\n".encode(),
    "chunk": lambda key: (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + f"{key}\r\n".encode()
    ),
}


@pytest.mark.parametrize("echo", ECHOES)
def test_a_key_that_the_server_sends_back_is_shown_nowhere(echo, monkeypatch, caplog, capfd):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    seen = []

    def answer(connection):
        key = key_in(request_of(connection))
        seen.append(key)
        connection.sendall(ECHOES[echo](key))

    with (
        serving(answer) as port,
        caplog.at_level(logging.DEBUG),
        pytest.raises(UserError) as caught,
    ):
        ask(judge(port, api_key_variable="JUDGE_KEY", retries=1))
    assert set(seen) == {KEY}
    whole = "".join(traceback.format_exception(caught.value)) + caplog.text
    whole += "".join(capfd.readouterr())
    assert not [part for part in (KEY, KEY[:6], KEY[-6:]) if part in whole]


def test_the_key_is_found_in_every_spelling():
    json_form, url_form = 'sk-a\\"b/c+Unicode', "sk-a%22b/c%2BUnicode"
    text = f"1 {KEY} 2 {json_form} 3 {url_form} 4 {KEY[:5]}"
    assert without_key(KEY, text) == "1 (key) 2 (key) 3 (key) 4 (key)"
    assert without_key(None, text) == text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://h/v1?key=sk-1", "https://h/v1"),
        ("https://h/v1?version=2&k=sk-1", "https://h/v1"),
        ("https://h/v1?sk-1", "https://h/v1"),
        ("https://h/v1#sk-1", "https://h/v1"),
        ("https://sk-1@h/v1", "https://h/v1"),
        ("https://me:sk-1@h/v1", "https://h/v1"),
        ("https://me:sk-1/x@h:0/v1", "https://h:0/v1"),
        ("me:sk-1@h", "h"),
        ("https://me:sk-1@h /v1?k=sk-1", "https://h /v1"),
        ("ftp://h/?key=sk-1", "ftp://h/"),
    ],
)
def test_an_address_that_may_hold_a_key_is_refused_and_not_shown(url, shown):
    assert bare_url(url) == shown
    with pytest.raises(UserError) as caught:
        Judge(url=url, model="m")
    assert "sk-1" not in str(caught.value)
    assert "judge.url" in str(caught.value)
    assert "sk-1" not in "".join(traceback.format_exception(caught.value))


def test_a_version_in_the_address_is_sent():
    paths = []

    def answer(connection):
        paths.append(request_of(connection).split(b" ")[1])
        connection.sendall(reply_bytes(completion_bytes("1")))

    with serving(answer) as port:
        url = f"http://127.0.0.1:{port}/openai/v1?api-version=2026-01-01"
        assert ask(judge(port, url=url)) == [0]
    assert paths == [b"/openai/v1/chat/completions?api-version=2026-01-01"]


def test_requests_go_through_the_proxy_of_the_environment(monkeypatch):
    asked = []

    def answer(connection):
        asked.append(request_of(connection).split(b"\r\n")[0])
        connection.sendall(reply_bytes(completion_bytes("10")))

    monkeypatch.setenv("no_proxy", "")
    with serving(answer) as port:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        assert ask(judge(port, url="http://judge.invalid/v1")) == [1]
    assert asked == [b"POST http://judge.invalid/v1/chat/completions HTTP/1.1"]
