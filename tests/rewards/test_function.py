"""The user's function in a process of its own: what it may return, how it may fail, and how it
ends.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from perl_jax.errors import UserError
from perl_jax.rewards.function import FunctionReward
from perl_jax.runtime import hosts, stopping

# Does what the first response says.
SCORE = """
import os, sys, time

calls = 0

def score(prompts, responses):
    global calls
    calls += 1
    action, _, argument = responses[0].partition(" ")
    return ACTIONS[action](prompts, responses, argument)

def divide(a):
    return 1 / a

class Vector:
    ndim = 1

    def __float__(self):
        return 1.0

def noise(text):
    print(text)
    os.write(1, b"raw " + text.encode())
    sys.stdout.write(text * 100_000)

ACTIONS = {
    "length": lambda p, r, a: [len(x) + len(y) for x, y in zip(p, r)],
    "calls": lambda p, r, a: [calls],
    "process": lambda p, r, a: [os.getpid()],
    "array": lambda p, r, a: __import__("numpy").array([0.5, 2], "float32"),
    "bools": lambda p, r, a: (True, False, __import__("numpy").bool_(True)),
    "generator": lambda p, r, a: (len(x) for x in r),
    "noise": lambda p, r, a: noise(a) or [1.0],
    "zero": lambda p, r, a: [divide(0)],
    "exit": lambda p, r, a: sys.exit("enough"),
    "short": lambda p, r, a: [1.0],
    "number": lambda p, r, a: 1.0,
    "nothing": lambda p, r, a: None,
    "mapping": lambda p, r, a: {0: 1.0},
    "text": lambda p, r, a: "1",
    "texts": lambda p, r, a: [1.0, "2.0"],
    "none": lambda p, r, a: [None],
    "nested": lambda p, r, a: __import__("numpy").ones((1, 1)),
    "vector": lambda p, r, a: [Vector()],
    "nan": lambda p, r, a: [0.0, float("nan")],
    "inf": lambda p, r, a: [float("-inf")],
    "huge": lambda p, r, a: [10**400],
    "die": lambda p, r, a: os._exit(3),
    "killed": lambda p, r, a: os.kill(os.getpid(), 9),
    "hang": lambda p, r, a: time.sleep(60),
}
"""


def file(folder, source, name="mine.py"):
    path = folder / name
    path.write_text(source, "utf-8")
    return f"{path}:score"


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """One process for the whole file: every error but a time-out or a crash must leave it
    usable.
    """
    with FunctionReward(
        file(tmp_path_factory.mktemp("function"), SCORE), timeout_seconds=30
    ) as reward:
        yield reward


def ask(reward, *responses):
    values = reward(["p"] * len(responses), responses, [{}] * len(responses))
    assert values.dtype == np.float64
    assert values.shape == (len(responses),)
    return values.tolist()


def message(reward, *responses):
    with pytest.raises(UserError) as caught:
        ask(reward, *responses)
    return str(caught.value)


def test_a_batch_is_one_call_to_one_process_that_keeps_its_state(reward):
    first, process = ask(reward, "calls"), ask(reward, "process")
    assert ask(reward, "length", "", "日本") == [7, 1, 3]
    assert ask(reward, "calls") == [first[0] + 3]
    assert ask(reward, "process") == process != [os.getpid()]


def test_what_counts_as_numbers(reward):
    assert ask(reward, "array", "b") == [0.5, 2]
    assert ask(reward, "bools", "b", "c") == [1, 0, 1]
    assert ask(reward, "generator", "bc") == [9, 2]


def test_a_large_batch_and_an_empty_one(reward):
    text = "x" * 3_000_000
    assert ask(reward, "length", text) == [7, 3_000_001]
    before = ask(reward, "calls")[0]
    assert ask(reward) == []
    assert ask(reward, "calls") == [before + 1]


@pytest.mark.parametrize(
    ("responses", "expected"),
    [
        (
            ("short", "b"),
            "returned 1 values; it must return a sequence of 2 numbers, one a response.",
        ),
        (("number",), "returned a float; it must return a sequence of 1 numbers"),
        (("nothing",), "returned a NoneType; it must return a sequence"),
        (("mapping",), "returned a dict; it must return a sequence"),
        (("text",), "returned a str; it must return a sequence"),
        (
            ("texts", "b" * 100),
            f"returned a str at index 1, for the response '{'b' * 80}'; it must be a number.",
        ),
        (
            ("none",),
            "returned a NoneType at index 0, for the response 'none'; it must be a number.",
        ),
        (
            ("nested",),
            "returned a ndarray at index 0, for the response 'nested'; it must be a number.",
        ),
        (
            ("vector",),
            "returned a Vector at index 0, for the response 'vector'; it must be a number.",
        ),
        (
            ("nan", "b" * 100),
            f"returned nan at index 1, for the response '{'b' * 80}'; it must be a finite number.",
        ),
        (("inf",), "returned -inf at index 0, for the response 'inf'; it must be a finite number."),
        (("huge",), "returned inf at index 0"),
    ],
)
def test_wrong_values(reward, responses, expected):
    found = message(reward, *responses)
    assert found.startswith(f"The reward function {reward.function} ")
    assert expected in found
    assert ask(reward, "length") == [7]


def test_an_exception_is_told_with_its_place(reward):
    found = message(reward, "zero")
    line = SCORE[: SCORE.index("return 1 / a")].count("\n") + 1
    path = reward.function.removesuffix(":score")
    assert found == (
        f"The reward function {reward.function} raised ZeroDivisionError: division by zero "
        f"({path}, line {line}, in divide)."
    )
    assert "raised SystemExit: enough (" in message(reward, "exit")
    assert ask(reward, "length") == [7]


def test_prints_go_to_standard_error_and_do_no_harm(tmp_path, capfd):
    with FunctionReward(file(tmp_path, "print('at import')\n" + SCORE)) as reward:
        ask(reward, "length")
        assert "at import" in capfd.readouterr().err
        assert ask(reward, "noise loud") == [1]
        assert ask(reward, "length") == [7]
    out, err = capfd.readouterr()
    assert out == ""
    assert "raw loud" in err
    assert err.count("loud") == 100_002


def test_a_hang_a_crash_and_a_kill_end_the_process_and_the_next_batch_has_a_new_one(tmp_path):
    with FunctionReward(file(tmp_path, SCORE), timeout_seconds=1.5) as reward:
        ask(reward, "calls")
        process = reward.worker.process
        assert (
            "took longer than 1.5 s for a batch of 2 (timeout_seconds) and was ended."
            in message(reward, "hang", "b")
        )
        assert reward.worker.process is None
        assert process.returncode == -signal.SIGKILL
        assert ask(reward, "calls") == [1]
        assert message(reward, "die").endswith("ended with exit code 3 during a batch of 1.")
        assert ask(reward, "calls") == [1]
        assert "ended with exit code -9 (Killed) during a batch of 1" in message(reward, "killed")


# Starts a program that holds the named pipe that the prompt names, in one of several ways, and then
# does what the response says. Who reads the pipe sees its end when every process that holds it has
# ended.
HOLDS_A_PIPE = """
import os, subprocess, time

def score(prompts, responses):
    pipe, how = open(prompts[0], "wb", 0), responses[0].split()
    program = ["sh", "-c", "echo begun; sleep 90; echo late"]
    if how[0] == "child":
        subprocess.Popen(program, stdout=pipe)
    elif how[0] == "session":
        subprocess.Popen(program, stdout=pipe, start_new_session=True)
    elif how[0] == "orphan":
        code = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True)"
        subprocess.run(["python3", "-c", code, *program], stdout=pipe, start_new_session=True)
    elif os.fork() == 0:
        os.setsid()
        pipe.write(b"begun\\n")
        time.sleep(90)
    pipe.close()
    if how[1] == "hang":
        time.sleep(90)
    return [1.0]
"""
HOW = [
    "session",
    *(pytest.param(how, marks=pytest.mark.slow) for how in ("child", "orphan", "fork")),
]


@pytest.fixture
def reader(tmp_path):
    """Reads the named pipe `pipe` in the test's folder; a read without bytes is its end."""
    os.mkfifo(tmp_path / "pipe")
    descriptor = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "rb", 0) as pipe:
        yield pipe


def begins(reader, goes_on) -> bool:
    """Whether a program says that it has begun, before `goes_on()` is False."""
    while not (found := reader.read(6)):  # nobody has opened the pipe yet
        if not goes_on():
            return False
        time.sleep(0.01)
    return found == b"begun\n"


def ask_in_thread(reward, path, response):
    """Asks, and returns a list that gets the error or the values."""
    found = []

    def asks():
        try:
            found.append(reward([str(path)], [response], [{}]).tolist())
        except UserError as error:
            found.append(str(error))

    thread = threading.Thread(target=asks)
    thread.start()
    return thread, found


@pytest.mark.parametrize("how", HOW)
def test_a_time_out_ends_what_the_function_started(tmp_path, reader, how):
    source = file(tmp_path, HOLDS_A_PIPE)
    for seconds in (1.5, 9.0, 50.0):  # on a busy machine a program may begin too late
        with FunctionReward(source, timeout_seconds=seconds) as reward:
            thread, found = ask_in_thread(reward, tmp_path / "pipe", f"{how} hang")
            begun = begins(reader, thread.is_alive)
            if begun:
                assert reader.read() == b""  # before `late`
            thread.join(90)
            assert f"took longer than {seconds:g} s" in found[0]
        if begun:
            return
    pytest.fail("no program has begun")


@pytest.mark.parametrize("how", HOW)
def test_the_end_of_the_context_ends_what_the_function_started(tmp_path, reader, how):
    with FunctionReward(file(tmp_path, HOLDS_A_PIPE)) as reward:
        assert reward([str(tmp_path / "pipe")], [f"{how} return"], [{}]).tolist() == [1]
        assert begins(reader, lambda: True)
        begun = time.monotonic()
    assert reader.read() == b""
    assert time.monotonic() - begun < 45


@pytest.mark.parametrize("how", HOW)
def test_a_killed_parent_takes_along_what_the_function_started(tmp_path, reader, how):
    code = (
        "import sys; from perl_jax.rewards.function import FunctionReward; "
        "FunctionReward(sys.argv[1])([sys.argv[2]], [sys.argv[3]], [{}])"
    )
    source, pipe = file(tmp_path, HOLDS_A_PIPE), str(tmp_path / "pipe")
    command = [sys.executable, "-c", code, source, pipe, f"{how} hang"]
    with subprocess.Popen(command) as parent:
        assert begins(reader, lambda: parent.poll() is None)
        parent.send_signal(signal.SIGKILL)
        assert reader.read() == b""


# Forks, and returns in both processes, in the child later.
FORKS = """
import ctypes, os, sys, time

FORK = {"os": os.fork, "libc": ctypes.CDLL(None).fork}

def score(prompts, responses):
    how, end, number = responses[0].split()
    if FORK[how]() == 0:
        time.sleep(0.2)
        if end == "exit":
            sys.exit("the child's end")
        return [-1.0]
    return [float(number)]
"""


@pytest.mark.parametrize("how", ["os", "libc"])
@pytest.mark.parametrize("end", ["return", "exit"])
def test_a_function_that_forks_is_paid_for_its_own_batch(tmp_path, how, end):
    with FunctionReward(file(tmp_path, FORKS)) as reward:
        assert ask(reward, f"{how} {end} 1") == [1]
        time.sleep(0.4)  # the child has returned by now, and its answer would be there
        assert ask(reward, f"{how} {end} 2") == [2]
        assert ask(reward, f"{how} {end} 3") == [3]


WORKS_IN_A_POOL = """
import multiprocessing

def score(prompts, responses):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(len, responses)
"""


def test_a_function_may_have_a_pool_of_processes(tmp_path):
    with FunctionReward(file(tmp_path, WORKS_IN_A_POOL)) as reward:
        assert ask(reward, "a", "bc", "def") == [1, 2, 3]
        assert ask(reward, "bc") == [2]


# Finds the worker's end of the pipe, and writes into it.
MEDDLES = """
import gc, os
from multiprocessing.connection import Connection

def score(prompts, responses):
    pipe = next(one for one in gc.get_objects() if isinstance(one, Connection))
    if responses[0] == "late":
        pipe.send((0, "values", [-1.0]))
    elif responses[0] == "early":
        pipe.send((99, "values", [-1.0]))
    elif responses[0] == "bytes":
        os.write(pipe.fileno(), b"\\0\\0\\0\\4abcd")
    return [1.0]
"""


def test_a_reply_to_another_batch_is_dropped_and_what_is_no_reply_ends_the_worker(tmp_path):
    with FunctionReward(file(tmp_path, MEDDLES)) as reward:
        assert ask(reward, "late") == [1]
        assert ask(reward, "nothing") == [1]
        for what in ("early", "bytes"):
            found = message(reward, what)
            assert found == (
                f"The process of the reward function {reward.function} sent what is no reply "
                "during a batch of 1: something writes into the worker's pipe."
            )
            assert reward.worker.process is None
        assert ask(reward, "nothing") == [1]


# Does strange things to its own process.
STRANGE = """
import os, sys

class Odd(Exception):
    def __str__(self):
        raise RuntimeError

class Number:
    def __float__(self):
        raise RuntimeError("not today")

KEPT = []

def close_all(opens=False):
    os.closerange(3, 256)
    if opens:
        for _ in range(20):  # one of them has the number of the pipe
            KEPT.append(open(os.path.dirname(__file__) + "/own", "a"))
    return [1.0]

def raise_odd():
    raise Odd

def clear(responses):
    responses.clear()
    return [1.0]

def close_standard():
    sys.stderr.close()
    for number in (0, 1, 2):
        os.close(number)
    raise ValueError("unheard")

def score(prompts, responses):
    return {
        "close": lambda: close_all(),
        "open": lambda: close_all(True),
        "odd": raise_odd,
        "number": lambda: [Number()],
        "memory": lambda: [len(bytearray(10**16))],
        "clear": lambda: clear(responses),
        "folder": lambda: os.chdir("/") or [1.0],
        "standard": close_standard,
        "fine": lambda: [2.0],
    }[responses[0]]()
"""


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("close", "closed file descriptors that are not its own, and with them the worker's pipe"),
        ("open", "closed file descriptors that are not its own, and with them the worker's pipe"),
        ("odd", "raised Odd ("),
        ("number", "cannot be read: RuntimeError: not today."),
        ("memory", "raised MemoryError ("),
        ("standard", "raised ValueError: unheard ("),
    ],
)
def test_strange_functions_end_in_one_sentence(tmp_path, what, expected):
    with FunctionReward(file(tmp_path, STRANGE)) as reward:
        found = message(reward, what)
        assert expected in found
        assert "\n" not in found
        assert ask(reward, "fine") == [2]
    if what == "open":
        assert (tmp_path / "own").read_bytes() == b""


def test_a_function_may_change_its_folder_and_its_arguments(tmp_path):
    here = os.getcwd()
    with FunctionReward(file(tmp_path, STRANGE)) as reward:
        assert ask(reward, "folder") == [1]
        assert ask(reward, "clear") == [1]
        assert ask(reward, "fine") == [2]
    assert os.getcwd() == here


def test_a_run_that_gets_sigterm_does_not_wait_for_the_function(tmp_path):
    with FunctionReward(file(tmp_path, SCORE)) as reward, hosts.Termination() as termination:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        begun = time.monotonic()
        with pytest.raises(stopping.Abandoned):
            ask(reward, "hang")
        assert time.monotonic() - begun < 45
        assert reward.worker.process is None
        termination.noted = 0  # the test itself goes on


# Without `if __name__ == "__main__":`, and with much imported.
TRAINS = """
import sys
import jax
from perl_jax.rewards.function import FunctionReward

print("trains")
with FunctionReward(sys.argv[1]) as reward:
    print(reward(["p"], ["r"], [{}]).tolist())
"""
WHAT_IS_THERE = """
import sys

def score(prompts, responses):
    names = ("jax", "numpy", "transformers", "orbax", "perl_jax.rewards.function")
    return [sum(name in sys.modules for name in names)]
"""


def test_the_process_imports_neither_the_script_that_trains_nor_what_that_needs(tmp_path):
    (tmp_path / "trains.py").write_text(TRAINS)
    # Of the working folder: Python's own is not to be taken from there.
    (tmp_path / "json.py").write_text("raise SystemExit('not this one')\n")
    (tmp_path / "elsewhere").mkdir()
    command = [
        sys.executable,
        "-P",
        tmp_path / "trains.py",
        file(tmp_path / "elsewhere", WHAT_IS_THERE),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.stdout == "trains\n[0.0]\n", ran.stderr


def test_rows_and_modules(tmp_path, monkeypatch):
    (tmp_path / "neighbour.py").write_text("WORTH = 2\n")
    source = (
        "import neighbour\n\ndef score(prompts, responses, rows=None):\n    return "
        "[row['worth'] * neighbour.WORTH for row in rows]\n"
    )
    file(tmp_path, source, "by_rows.py")
    monkeypatch.chdir(tmp_path)
    for target in ("by_rows:score", "by_rows.py:score"):
        with FunctionReward(target) as reward:
            assert reward(["p", "p"], ["a", "b"], [{"worth": 3}, {"worth": 0.5}]).tolist() == [6, 1]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "import nothing_of_this_name\n",
            r"cannot be imported: ModuleNotFoundError: No module named 'nothing_of_this_name' "
            r"\(.*line 1, in <module>\)\.$",
        ),
        (
            "def score(:\n",
            r"cannot be imported: SyntaxError: invalid syntax \(mine.py, line 1\)\.$",
        ),
        ("score = 3\n", r"is a int; it must be a function\.$"),
        (
            "import os\ndef points(p, r): pass\n",
            r"mine\.py has no function 'score'; it has points\.$",
        ),
        (
            "def score(p): pass\n",
            r"takes \(p\); it must take \(prompts, responses\) or \(prompts, responses, rows\)\.$",
        ),
        ("def score(p, r, *, scale): pass\n", r"takes \(p, r, \*, scale\); it must take"),
        ("def score(a, b, c, d): pass\n", r"takes \(a, b, c, d\); it must take"),
        ("raise KeyError\n", r"cannot be imported: KeyError \(.*line 1, in <module>\)\.$"),
        ("raise OSError('No.')\n", r"cannot be imported: OSError: No \("),
        ("raise SystemExit(4)\n", r"cannot be imported: SystemExit: 4 "),
        (
            "import os; os._exit(5)\n",
            r"ended with exit code 5 during starting up\.$",
        ),
    ],
)
def test_functions_that_cannot_be_loaded(tmp_path, source, expected):
    reward = FunctionReward(file(tmp_path, source))
    with pytest.raises(UserError, match=expected), reward:
        pass
    assert reward.worker.process is None


def test_a_file_may_have_the_name_of_a_known_module(tmp_path):
    source = "import json\n\ndef score(p, r):\n    return json.loads('[3]')\n"
    with FunctionReward(file(tmp_path, source, "json.py")) as reward:
        assert ask(reward, "r") == [3]


def test_a_hang_at_import_is_ended(tmp_path):
    with pytest.raises(
        UserError, match=r"took longer than 0\.3 s for starting up \(start_seconds\) and was ended"
    ):
        FunctionReward(file(tmp_path, "import time; time.sleep(60)"), start_seconds=0.3).start()


def test_a_third_parameter_with_a_default_is_not_the_rows(tmp_path):
    with FunctionReward(
        file(tmp_path, "def score(p, r, scale=2.0, *more):\n    return [scale for _ in r]\n")
    ) as reward:
        assert reward(["p"], ["r"], [{"a": 1}]).tolist() == [2]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"function": "mine.py"},
            "function.function is 'mine.py'; it must be module:function or "
            "path/to/file.py:function.",
        ),
        ({"function": ":score"}, "function.function is ':score'; it must be module:function"),
        (
            {"function": "my-module:score"},
            "function.function is 'my-module:score'; it must be module:function",
        ),
        ({"function": "module:a b"}, "function.function is 'module:a b'; it must be"),
        ({"function": 3}, "function.function is 3; it must be a text"),
        (
            {"function": "nowhere/mine.py:score"},
            "There is no file nowhere/mine.py, the source of a reward function.",
        ),
        (
            {"function": "json:loads", "timeout_seconds": 0},
            "function.timeout_seconds is 0; it must be a finite number greater than 0.",
        ),
        (
            {"function": "json:loads", "start_seconds": "1"},
            "function.start_seconds is '1'; it must be a finite number",
        ),
    ],
)
def test_wrong_settings(settings, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        FunctionReward(**settings)


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="prompts, responses and rows have 1, 2, 1 items"):
        FunctionReward("json:loads")(["p"], ["a", "b"], [{}])
