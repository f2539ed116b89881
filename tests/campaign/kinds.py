"""The kinds of trials: each puts a fault into a command and judges how the command ends.

A trial returns `well` (the command did what it was asked to) or `refused` (it said in a sentence
why not), and raises `Fault` for any other end, or if something is lost.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import signal
import socket
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from perl_jax.cli import main
from tests import odd_files
from tests.campaign.bench import Bench, Fault, write_rows
from tests.rewards.servers import completion_bytes, reply_bytes, request_of, serving

# Seconds from a command's start within which it is killed or told to stop: it takes about as long.
MOMENTS = 8.0
RULE = '[{"kind": "length", "maximum": 3, "scale": 4}]'


# What dies.


def kills(bench: Bench) -> str:
    """Kills a run once or twice at any moment, then lets it end."""
    job, run = bench.draw.choice(("sft", "reward", "dpo", "rl")), bench.trial / "run"
    bench.metrics_of(job)
    for _ in range(bench.draw.choice((1, 1, 2))):
        running = bench.commands.start(bench.training(job, run))
        time.sleep(bench.draw.uniform(0, MOMENTS))
        running.send(signal.SIGKILL)
        if running.wait() not in (0, -signal.SIGKILL):
            raise Fault(f"before it was killed: {running.printed()[-1500:]}")
    bench.resumed(job, run)
    return "well"


def signals(bench: Bench) -> str:
    """Tells a run to stop by SIGTERM or Ctrl-C, once or twice, then lets it end."""
    job, run = bench.draw.choice(("sft", "reward", "dpo", "rl")), bench.trial / "run"
    bench.metrics_of(job)
    number = bench.draw.choice((signal.SIGTERM, signal.SIGINT))
    running = bench.commands.start(bench.training(job, run))
    time.sleep(bench.draw.uniform(0, MOMENTS))
    running.send(number)
    if bench.draw.random() < 0.4:
        time.sleep(bench.draw.uniform(0, 1))
        running.send(number)
    # Before the loop SIGTERM ends the process as the system does.
    bench.ended(running, (0, 130, 143, -signal.SIGTERM))
    bench.resumed(job, run)
    return "well"


def disks(bench: Bench) -> str:
    """Lets a command meet a disk that takes no more, or a path where nothing can be written."""
    draw, run = bench.draw, bench.trial / "run"
    kind = draw.choice(("large files", "open files", "output", "output", "run"))
    if kind in ("large files", "open files"):
        bench.metrics_of("sft")
        limits = (
            {"RLIMIT_FSIZE": draw.choice((0, 100, 1000, 10_000, 50_000))}
            if kind == "large files"
            else {"RLIMIT_NOFILE": draw.choice((8, 16, 32, 64))}
        )
        ended = bench.ended(bench.commands.start(bench.training("sft", run), limits=limits))
        bench.resumed("sft", run)
        return ended
    (bench.trial / "file").write_text("a file")
    bad = draw.choice(
        (
            bench.trial / "file" / "below",
            "/dev/null/below",
            "/proc/none/below",
            bench.trial / ("n" * 300),
            bench.trial / "a\nb" / "c",
            "",
        )
    )
    if kind == "run":
        return bench.ended(bench.commands.start(bench.training("sft", bad)))
    bad = draw.choice((bad, "/dev/full", bench.trial))
    command = draw.choice(("best-of", "score", "export", "average"))
    return bench.ended(bench.commands.start(writing(bench, command, bad)))


def writing(bench: Bench, command: str, to: object) -> tuple[object, ...]:
    """Returns the arguments of a short command that writes to a path."""
    policy = bench.artefact("sft")
    rows = write_rows(bench.trial / "rows.jsonl", [{"prompt": "two tea", "response": "yes"}] * 3)
    data = bench.training("sft", "")[5:15]
    return {
        "best-of": (
            *("best-of", "--model", bench.model, "--policy", policy, "--terms", RULE, "--n", "2"),
            *("--batch-size", "16", "--output", to, *data),
        ),
        "score": ("score", "--model", bench.model, "--input", rows, "--output", to),
        "export": ("export", policy, "--model", bench.model, "--format", "peft", "--to", to),
        "average": ("average", policy, policy, "--model", bench.model, "--to", to),
    }[command]


# What is damaged.


def flips(bench: Bench) -> str:
    """Damages a file of a run that has not ended, then lets the run go on.

    The same command either ends with the metrics of a run without a fault, or says what is damaged.
    Metrics are text without checksums: a changed digit there goes unnoticed, so then only the form
    of the end is judged.
    """
    job, run = bench.draw.choice(("sft", "reward")), bench.trial / "run"
    bench.metrics_of(job)
    half = bench.root / f"half-{job}"
    if not half.exists():
        # A run's last step is validated; so is step 2 of the whole run.
        bench.expect((*bench.training(job, half), "--steps", "2"))
    shutil.copytree(half, run)
    paths = sorted(path for path in run.rglob("*") if path.is_file() and path.stat().st_size)
    path = bench.draw.choice(paths)
    damage(bench, path)
    running = bench.commands.start(bench.training(job, run))
    ended = bench.ended(running)
    if ended == "well" and path.suffix not in (".jsonl", ".html"):
        bench.check_same(job, run)
    return ended


def damage(bench: Bench, path: pathlib.Path) -> None:
    """Truncates, empties, removes or fills a file, or flips some of its bits."""
    content = bytearray(path.read_bytes())
    match bench.draw.choice(("flip", "flip", "cut", "empty", "remove", "zeros", "append")):
        case "flip":
            for _ in range(bench.draw.choice((1, 3))):
                content[bench.draw.randrange(len(content))] ^= 1 << bench.draw.randrange(8)
        case "cut":
            del content[bench.draw.randrange(len(content)) :]
        case "empty":
            content.clear()
        case "remove":
            path.unlink()
            return
        case "zeros":
            content[:] = bytes(len(content))
        case "append":
            content += b"\0" * bench.draw.choice((1, 5000))
    path.write_bytes(content)


def rows(bench: Bench) -> str:
    """Trains on, or scores, rows of which one is odd."""
    good = [{"prompt": f"order {i}", "response": f"yes {i}", "answer": "yes"} for i in range(12)]
    path = write_rows(bench.trial / "rows.jsonl", good)
    if bench.draw.random() < 0.3:
        trials = [*odd_files.odd_bytes(path.read_bytes())]
        path.write_bytes(bench.draw.choice(trials)[1])
    else:
        lines = path.read_text().splitlines()
        at = bench.draw.randrange(len(lines))
        odd = bench.draw.choice([*odd_files.odd_fields(good[at])])[1]
        lines[at] = json.dumps(odd) if bench.draw.random() < 0.8 else lines[at][:-3]
        path.write_text("\n".join(lines) + "\n")
    if bench.draw.random() < 0.5:
        return bench.ended(
            bench.commands.start(
                (
                    *("score", "--model", bench.model, "--input", path),
                    *("--output", bench.trial / "scores.jsonl"),
                )
            )
        )
    arguments = (
        *("sft", "--run", bench.trial / "run", "--model", bench.model, "--data.data-dir", path),
        *("--batch-size", "2", "--steps", "1", "--data.max-prompt-length", "16"),
        *("--data.max-response-length", "16"),
    )
    return bench.ended(bench.commands.start(arguments))


# What is asked for.

TEXTS = ("", "x", "nan", "inf", "-1", "0", "1e400", "1" * 400, "../..", "\n", "é\u202e", "[", "{}")
NUMBERS = ("0", "-1", "1", "2147483648", "9223372036854775808", "1e30", "nan", "inf", "-inf", "x")


def leaves_of(cls: type, above: str = "") -> Iterator[str]:
    """Yields the names of a command's flags, dotted, without those that are positions."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        inner = [one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)]
        if inner:
            yield from leaves_of(typing.cast(type, inner[0]), f"{above}{field.name}.")
        else:
            yield f"{above}{field.name}".replace("_", "-")


def flags(bench: Bench) -> str:
    """Gives one flag of a command, or two, a value that makes little sense."""
    draw = bench.draw
    command = draw.choice(("sft", "reward", "rl", "dpo", "best-of", "score", "export", "average"))
    arguments = (
        [*bench.training(command, bench.trial / "run")]
        if command in ("sft", "reward", "rl", "dpo")
        else [*map(str, writing(bench, command, bench.trial / "written"))]
    )
    # A mesh of the machine's devices, or a base of a million layers, would be refused too, but only
    # after a while: what is drawn here has no size that could be computed.
    known = [
        name
        for name in leaves_of(main._command(command)[0])
        if name not in ("compile-cache", "run", "output", "to", "wandb-project")
    ]
    for _ in range(draw.choice((1, 1, 2))):
        arguments += [f"--{draw.choice(known)}", draw.choice(TEXTS + NUMBERS)]
    return bench.ended(bench.commands.start(arguments))


# Folders of others.


def models(bench: Bench) -> str:
    """Generates from a model of which one file is odd."""
    folder = bench.trial / "model"
    shutil.copytree(bench.model, folder)
    make_odd(bench, folder)
    arguments = ("generate", "--model", folder, "--prompt", "two tea", "--max-new-tokens", "4")
    return bench.ended(bench.commands.start(arguments))


def pefts(bench: Bench) -> str:
    """Imports a PEFT folder of which one file is odd."""
    folder = bench.trial / "peft"
    shutil.copytree(bench.peft, folder)
    make_odd(bench, folder)
    arguments = ("import", folder, "--model", bench.model, "--to", bench.trial / "role")
    return bench.ended(bench.commands.start(arguments))


def make_odd(bench: Bench, folder: pathlib.Path) -> None:
    """Makes one file of a folder odd."""
    paths = [path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")]
    path = bench.draw.choice(sorted(paths))
    bench.draw.choice([*odd_files.odd_files(path)])[1]()


# What is far away.


def buckets(bench: Bench) -> str:
    """Trains in a bucket that fails or is slow, kills the run perhaps, then lets it end."""
    from tests.bucket import running_bucket

    bench.metrics_of("sft")
    draw, run = bench.draw, "gs://bucket/runs/a"
    with running_bucket() as bucket:
        bucket.draw.seed(draw.random())
        bucket.failing, bucket.delay = draw.choice((0, 0.02, 0.1, 1.0)), draw.choice((0, 0, 0.02))
        bucket.status = draw.choice((503, 503, 500, 429, 403, 404))
        hopeless = bucket.failing == 1.0 or bucket.status in (403, 404)
        how: dict[str, Any] = {"environment": bucket.environment}
        running = bench.commands.start(bench.training("sft", run), **how)
        if draw.random() < 0.5:
            time.sleep(draw.uniform(0, 2 * MOMENTS))
            running.send(signal.SIGKILL)
            running.wait()
            ended = "well"
        else:
            ended = bench.ended(running)
        if ended == "refused" and not hopeless and bucket.failing < 0.1:
            raise Fault(f"a bucket that seldom fails ended it: {running.printed()[-1500:]}")
        bucket.failing = bucket.delay = 0
        # The lease of a run that was killed ends after a while.
        deadline = time.monotonic() + 180
        while True:
            again = bench.commands.start(bench.training("sft", run), **how)
            if again.wait() == 0 or time.monotonic() > deadline:
                break
            time.sleep(5)
        if again.status != 0:
            raise Fault(f"it does not go on: {again.printed()[-1500:]}")
        bench.check_said(again)
        bench.check_same("sft", run)
    return ended


KEY = "sk-campaign-0123456789"


def judges(bench: Bench) -> str:
    """Asks a judge that closes, lies, drips or answers with anything but a number."""
    draw = bench.draw
    replies: Mapping[str, Callable[[socket.socket], None]] = {
        "well": lambda c: c.sendall(reply_bytes(completion_bytes("7"))),
        "words": lambda c: c.sendall(reply_bytes(completion_bytes("quite good"))),
        "not a number": lambda c: c.sendall(reply_bytes(completion_bytes("nan"))),
        "a large number": lambda c: c.sendall(reply_bytes(completion_bytes("1e999"))),
        "no JSON": lambda c: c.sendall(reply_bytes(b"<html>")),
        "another shape": lambda c: c.sendall(reply_bytes(b'{"choices": [null]}')),
        "closes": lambda c: None,
        "500": lambda c: c.sendall(reply_bytes(b"{}", "500 Error")),
        "401 that echoes the key": lambda c: c.sendall(reply_bytes(KEY.encode(), "401 No")),
        "a huge length": lambda c: c.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"
        ),
        "not HTTP": lambda c: c.sendall(os.urandom(300)),
        "half": lambda c: c.sendall(reply_bytes(completion_bytes("7"))[:60]),
        "drips": drip,
    }
    answer = replies[draw.choice(sorted(replies))]

    def reply(connection: socket.socket) -> None:
        request_of(connection)
        answer(connection)

    with serving(reply) as port:
        term = {
            "kind": "judge",
            "url": f"http://127.0.0.1:{port}/v1",
            "model": "m",
            "api_key_variable": "JUDGE_KEY",
            "timeout_seconds": 2,
            "retries": draw.choice((0, 1)),
            "backoff_seconds": 0.01,
        }
        arguments = [*writing(bench, "best-of", bench.trial / "best.jsonl")]
        arguments[arguments.index(RULE)] = json.dumps([term])
        environment = {"JUDGE_KEY": KEY, "no_proxy": "127.0.0.1"}
        running = bench.commands.start(arguments, environment)
        ended = bench.ended(running)
    if KEY in running.printed():
        raise Fault("it printed the judge's key")
    return ended


def drip(connection: socket.socket) -> None:
    """Sends a byte every 50 ms for ever."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        connection.sendall(b" ")
        time.sleep(0.05)


# What a reward function does, and whole files that have no good one.
BODIES = (
    "return [len(r) / 9 for r in responses]",
    "raise ValueError('mine')",
    "return [1]",
    "return [float('nan')] * len(responses)",
    "return ['a'] * len(responses)",
    "return None",
    "os._exit(3)",
    "os.kill(os.getpid(), signal.SIGKILL)",
    "time.sleep(600)",
    "sys.exit('bye')",
    "os.fork(); return [float(len(r)) for r in responses]",
    "print('x' * 2000); return [1.0] * len(responses)",
    "os.close(1); os.close(2); return [1.0] * len(responses)",
    "return [10 ** 400] * len(responses)",
    "return score(prompts, responses)",
)
SOURCES = (
    *(
        f"import os, signal, sys, time\ndef score(prompts, responses):\n    {body}\n"
        for body in BODIES
    ),
    "def score(prompts):\n    return [1.0]\n",
    "score = 3\n",
    "def other():\n    pass\n",
    "def score(:\n",
    "import nonesuch_module\n",
    "raise SystemExit(4)\n",
    "import time\ntime.sleep(600)\n",
)


def functions(bench: Bench) -> str:
    """Pays by a function that raises, dies, hangs, forks or returns what is no reward."""
    source = bench.trial / "mine.py"
    source.write_text(bench.draw.choice(SOURCES))
    term: dict[str, Any] = {"kind": "function", "function": f"{source}:score", "timeout_seconds": 5}
    term["start_seconds"] = 20
    arguments = [*writing(bench, "best-of", bench.trial / "best.jsonl")]
    arguments[arguments.index(RULE)] = json.dumps([term])
    running = bench.commands.start(arguments)
    ended = bench.ended(running, own=source)
    left = children_of(str(source))
    if left:
        raise Fault(f"the function's processes are still there: {left}")
    if ended == "well":
        values = [json.loads(line) for line in (bench.trial / "best.jsonl").open()]
        scores = [row["score"] for row in values]
        if not all(isinstance(s, float) and math.isfinite(s) for s in scores):
            raise Fault(f"scores {scores}")
    return ended


def children_of(source: str) -> list[str]:
    """Processes whose command line has a word, after two seconds in which they may end."""
    for _ in range(20):
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if re.search(re.escape(source), line):
                found.append(line[:200])
        if not found:
            return []
        time.sleep(0.1)
    return found


KINDS: Mapping[str, Callable[[Bench], str]] = {
    "kills": kills,
    "signals": signals,
    "disks": disks,
    "flips": flips,
    "rows": rows,
    "flags": flags,
    "model folders": models,
    "PEFT folders": pefts,
    "buckets": buckets,
    "judges": judges,
    "functions": functions,
}
