"""The contest beside other libraries: what its ceiling counts, what its contenders are measured by,
and its work's files.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

CONTEST = pathlib.Path(__file__).parents[2] / "experiments" / "benchmarks" / "contest"
# Behind everything else: other experiments have modules of the same names.
sys.path.append(str(CONTEST))
os.environ.pop("CONTEST_SIZE", None)  # figures below are of the default
import ceiling  # noqa: E402
import contender  # noqa: E402
import report  # noqa: E402
import work  # noqa: E402

GROUPS = [(5, (3, 7)), (2, (1, 1, 4))]


def rows_of(groups, shared):
    """Every row as ids; rows of a group begin alike, or with ids of their own."""
    rows = []
    for number, (prompt, responses) in enumerate(groups):
        for each, response in enumerate(responses):
            own = [(number, each, place) for place in range(prompt + response)]
            rows.append(
                [(number, place) for place in range(prompt)] + own[prompt:] if shared else own
            )
    return rows


def slow_layers(rows, last, weight, adapter, pair):
    """Layer by layer, one distinct beginning of a row after the other: what comes after it does not
    matter to it.
    """
    every = {tuple(row[: end + 1]) for row in rows for end in range(len(row))}
    read = {
        tuple(row[: end + 1]) for row in rows for end in range(len(row)) if end >= len(row) - last
    }
    total = 0
    for layer in range(work.MODEL["num_hidden_layers"]):
        for beginning in every:
            there = layer < work.MODEL["num_hidden_layers"] - 1 or beginning in read
            for name, (out, into) in work.layer_shapes().items():
                if there or name in ("self_attn.k_proj", "self_attn.v_proj"):
                    total += weight * out * into + (
                        adapter * work.RANK * (out + into)
                        if name.split(".")[1] in work.TARGETS
                        else 0
                    )
            total += pair * len(beginning) * work.SIZE.heads * work.SIZE.head_dim if there else 0
    return total, len(every), len(read)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["reward-ragged", "rl-function"])
def test_perl_jax_takes_the_steps_that_it_is_asked_for(job, tmp_path):
    variables = os.environ | {"CONTEST_SIZE": "tiny"}
    subprocess.run(
        [sys.executable, CONTEST / "work.py", tmp_path],
        env=variables,
        check=True,
        capture_output=True,
    )
    command = [sys.executable, CONTEST / "contender_perl_jax.py", "--work", tmp_path, "--job", job]
    said = subprocess.run(
        command, input="step\nstep\n", env=variables, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    ready, *steps = map(json.loads, said)
    assert ready["name"] == "perl_jax" and ready["compiled_mib"]["learn"] > 0
    assert len(steps) == 2 and all(
        step["tokens"] == work.TOKENS[job] and step["seconds"] > 0 for step in steps
    )
    assert all(set(step["parts"]) > {"generate", "score", "learn"} for step in steps) == (
        job == "rl-function"
    )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("last", [1, 4])
def test_the_count_is_that_of_distinct_beginnings(shared, last):
    groups = GROUPS if shared else ceiling.alone(GROUPS)
    rows, head = rows_of(GROUPS, shared), work.SIZE.vocabulary * work.SIZE.width
    forward, tokens, read = slow_layers(rows, last, 2, 2, 4)
    assert ceiling.extent(groups).tokens == tokens == (23 if shared else 32)
    assert ceiling.forward(groups, last, head, adapters=True) == forward + 2 * head * read
    # Nothing below the first layer's q, k and v.
    lowest = sum(
        out * into
        for name, (out, into) in work.layer_shapes().items()
        if name[10:] in ("q_proj", "k_proj", "v_proj")
    )
    assert (
        ceiling.backward(groups, last, head, "lora")
        == slow_layers(rows, last, 2, 4, 8)[0] - 2 * lowest * tokens + 2 * head * read
    )
    assert (
        ceiling.backward(groups, last, head, "full")
        == slow_layers(rows, last, 4, 0, 8)[0] + 4 * head * read
    )


def test_positions_that_are_read_may_lie_in_the_prompt():
    assert ceiling.extent([(2, (1, 3))]) == ceiling.Extent(6, 1 + 2 + 3 + 3 + 4 + 5)
    assert ceiling.extent([(2, (1, 3))], 2) == ceiling.Extent(4, 2 + 3 + 4 + 5)


def test_sampling_reads_weights_once_a_token_and_a_shared_prompt_once_for_its_samples():
    weights = 12 * sum(out * into for out, into in work.layer_shapes().values()) + 16384 * 512
    prompts, decoding = ceiling.sampling([(3, (2, 4))], at_once=2)
    assert prompts.operations == ceiling.forward([(3, (0, 0))], 1, 16384 * 512)
    # Four tokens at positions 3; 3, 4, 5: two steps. Keys and values: the prompt's three times,
    # their own 1; 1, 2, 3.
    assert decoding.operations == 2 * weights * 4 + 4 * 512 * 12 * (4 + 4 + 5 + 6)
    assert decoding.bytes == 4 * (weights * 2 + 2 * 256 * 12 * (3 * 3 + 1 + 6))
    apart = ceiling.sampling([(3, (2,)), (3, (4,))], at_once=2)
    assert (
        apart[0].operations == 2 * prompts.operations and apart[1].operations == decoding.operations
    )
    assert apart[1].bytes == 4 * (weights * 2 + 2 * 256 * 12 * (3 * 4 + 1 + 6))


@pytest.mark.parametrize(
    ("job", "tuning", "least", "alone"),
    [
        ("reward-equal", "lora", 463, 611),
        ("reward-ragged", "full", 681, 901),
        ("rl-model", "lora", 2048, 2594),
        ("rl-function", "lora", 1714, 2152),
        ("generate", "lora", 424, 533),
    ],
)
def test_gigaflop_of_a_step(job, tuning, least, alone):
    found = [
        sum(phase.operations for phase in ceiling.phases(job, tuning, shared)) / 1e9
        for shared in (True, False)
    ]
    assert [round(value) for value in found] == [least, alone]


def test_the_report_has_the_least_time_the_one_of_rows_alone_and_the_compilers_account():
    phases = {
        "phases": ceiling.Phase("learn", 2e12),
        "phases_rows_alone": ceiling.Phase("learn", 3e12),
    }
    step = {"seconds": 40.0, "parts": {}, "tokens": 4096, "peak_mib": 900.0}
    ready = {"versions": {"jax": "1"}, "settings": "as ever", "compiled_mib": {"learn": 812.4}}
    text = report.text(
        {
            "job": "reward-equal",
            "rates": {"operations": 1e11, "bytes": 1e10},
            "contenders": {"ours": {"ready": ready, "tuning": "lora", "steps": [step]}},
        }
        | {name: {"lora": [vars(phase)]} for name, phase in phases.items()}
    )
    assert (
        "A step is 2,000 GFLOP (learn 2,000); products of large square matrices here make 100.0 "
        "GFLOP/s, memory 10.0 GB/s.\n"
    ) in text
    assert (
        "At least 20.00 s, of that speed ours 50%.\nRows alone, each with a prompt of its own: "
        "3,000 GFLOP (learn 3,000); 30.00 s, of that speed ours 75%."
    ) in text
    assert (
        "MiB by the compiler's account, without libraries  learn\nours" in text and " 812\n" in text
    )


# Holds 64 MiB, works for a fifth of a second, and waits.
CHILD = (
    "import time; held = bytearray(b'x' * 2**26); end = time.process_time() + 0.2\nwhile "
    "time.process_time() < end: pass\nprint(flush=True); input()"
)


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/status").exists(), reason="children are looked up in /proc"
)
def test_a_contender_answers_for_its_children():
    memory, seconds = contender.peak_memory(), contender.processor_seconds()
    # A shell between them: grandchildren count.
    command = ["sh", "-c", '"$0" -c "$1"; true', sys.executable, CHILD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert len(contender.descendants()) >= 2
        assert contender.peak_memory() >= memory + 2**26
        assert contender.processor_seconds() >= seconds + 0.15
        child.stdin.write(b"\n")
    assert contender.processor_seconds() >= seconds + 0.15


def write(folder, size):
    command = [sys.executable, CONTEST / "work.py", folder]
    return subprocess.run(
        command,
        env=os.environ | {"CONTEST_SIZE": size},
        capture_output=True,
        text=True,
        check=False,
    )


def test_another_works_model_is_removed(tmp_path):
    assert write(tmp_path, "tiny").returncode == 0
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in names
    description = json.loads((tmp_path / "work.json").read_text())
    # As a GPU's size leaves it.
    (tmp_path / "model" / "model-00000.safetensors").write_text("stale")
    (tmp_path / "work.json").write_text("{}")
    assert write(tmp_path, "tiny").returncode == 0
    assert {path.name for path in (tmp_path / "model").iterdir()} == names
    assert json.loads((tmp_path / "work.json").read_text()) == description
    # Its own is left as it is.
    (tmp_path / "model" / "mark").touch()
    assert write(tmp_path, "tiny").returncode == 0 and (tmp_path / "model" / "mark").exists()


def test_a_model_of_somebody_else_stays(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("precious")
    ran = write(tmp_path, "tiny")
    assert (
        ran.returncode == 1
        and "exists and is not the contest's; choose another folder." in ran.stderr
    )
    assert (tmp_path / "model" / "model.safetensors").read_text() == "precious"
