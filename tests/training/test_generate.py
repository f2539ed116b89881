"""`generate` and `score`: what they say equals a forward pass a row, whatever the batch."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest

from perl_jax.errors import TrainingError, UserError
from perl_jax.evaluation import score as scoring
from perl_jax.evaluation.score import ScoreConfig, run_score, score
from perl_jax.generation.text import GenerateConfig, generate, run_generate
from perl_jax.types import Tokens
from tests import small
from tests.training import tiny

PROMPT = "customer : hi"


@pytest.fixture(scope="module")
def model(base):
    return tiny.open_model(base)


@pytest.fixture(scope="module")
def texts() -> list[dict[str, str]]:
    """Prompts and responses of many lengths, in the words of the task."""
    source = [
        "add",
        "2",
        "large",
        "latte",
        "oat",
        ";",
        "add",
        "1",
        "small",
        "tea",
        "none",
        ";",
        "here",
    ]
    return [
        {"prompt": " ".join(source[:n]), "response": " ".join(source[-m:])}
        for n, m in ((1, 1), (3, 5), (8, 2), (2, 9), (11, 4))
    ]


@pytest.fixture(scope="module")
def file(texts, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    return path


def config(base: str, file: pathlib.Path, **fields) -> ScoreConfig:
    return ScoreConfig(
        **{
            "model": base,
            "input": str(file),
            "batch_size": 4,
            "max_prompt_length": 24,
            "max_response_length": 24,
            **fields,
        }
    )


def one_row(model, row: dict[str, str]) -> tuple[Tokens, int]:
    """A row alone, without padding, and where its response begins."""
    prompt = model.tokenizer.prompt_ids(row["prompt"])
    ids = np.asarray([prompt + model.tokenizer.response_ids(row["response"])], np.int32)
    return Tokens(ids, np.ones_like(ids, bool), np.arange(ids.shape[1])[None] >= len(prompt)), len(
        prompt
    )


def expected_logprobs(model, adapter, row: dict[str, str], temperature: float) -> np.ndarray:
    tokens, start = one_row(model, row)
    logits_TV = (
        np.asarray(small.logits(model.lm, model.base, adapter, tokens), np.float64)[0] / temperature
    )
    logp_TV = logits_TV - np.log(np.sum(np.exp(logits_TV), axis=-1, keepdims=True))
    return np.asarray(
        [logp_TV[t - 1, tokens.tokens_BT[0, t]] for t in range(start, tokens.tokens_BT.shape[1])]
    )


@pytest.mark.parametrize(
    "role",
    [
        "base",
        "reward",
        *(pytest.param(role, marks=pytest.mark.slow) for role in ("policy", "value")),
    ],
)
def test_scores_are_those_of_a_row_alone(role, jobs, model, texts, file):
    folder = {
        "base": None,
        "policy": jobs.tuned,
        "reward": jobs.reward,
        "value": jobs.tuned.with_name("value"),
    }[role]
    adapter, record = (None, None) if folder is None else tiny.load(folder, model)
    rows = score(
        config(jobs.base, file, adapter=None if folder is None else str(folder), temperature=0.5)
    )
    assert [{name: row[name] for name in ("prompt", "response")} for row in rows] == texts
    for row in rows:
        expected = expected_logprobs(model, adapter, row, 0.5)
        # The eos that ends a response is one of its tokens.
        assert len(row["token_logprobs"]) == len(model.tokenizer.response_ids(row["response"]))
        np.testing.assert_allclose(row["token_logprobs"], expected, atol=1e-5)
        assert row["logprob"] == pytest.approx(sum(row["token_logprobs"]), abs=1e-9)
        assert ("score" in row) == (role in ("reward", "value"))
        if "score" in row:
            raw = small.score(model.lm, model.base, adapter, one_row(model, row)[0]).item()
            # A reward is normalised; a value is not.
            wanted = (raw - record.score_mean) / record.score_std if role == "reward" else raw
            assert row["score"] == pytest.approx(wanted, abs=2e-5)


def test_scores_do_not_depend_on_the_batch(jobs, file):
    # A row beside others is padded to their length, in a batch filled up with rows of nothing.
    alone, together = (
        score(config(jobs.base, file, adapter=str(jobs.reward), batch_size=size)) for size in (1, 4)
    )
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a["token_logprobs"], b["token_logprobs"], atol=1e-6)
        # The score is divided by the reference's standard deviation.
        assert a["score"] == pytest.approx(b["score"], abs=1e-6, rel=1e-5)


def test_scored_rows_are_written_or_printed(jobs, file, tmp_path, capsys):
    run_score(config(jobs.base, file))
    printed = capsys.readouterr().out
    run_score(config(jobs.base, file, output=str(tmp_path / "out.jsonl")))
    assert (tmp_path / "out.jsonl").read_text() == printed
    assert [set(json.loads(line)) for line in printed.splitlines()] == [
        {"prompt", "response", "token_logprobs", "logprob"}
    ] * 5


def test_all_columns_are_kept_and_computed_ones_are_replaced(base, tmp_path, capsys):
    rows = [
        {"id": 7, "response": "here", "prompt": "add 1", "answer": None, "score": "mine"},
        {"prompt": "add 2", "tags": [{"a": 0.5}], "response": "here", "logprob": -1, "group": ""},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = score(config(base, path))
    for row, scored in zip(rows, found, strict=True):
        kept = {name: value for name, value in row.items() if name != "logprob"}
        assert {name: scored[name] for name in kept} == kept  # the base computes no score
        assert set(scored) == {*row, "token_logprobs", "logprob"}
    assert found[1]["logprob"] == pytest.approx(sum(found[1]["token_logprobs"]))
    said = capsys.readouterr().err
    assert "score: computed numbers replace columns of the input: logprob\n" in said


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("NaN", "line 2: the field x holds NaN or infinity, which are not JSON."),
        ('{"a": [1, -Infinity]}', "line 2: the field x holds NaN or infinity"),
        ("1e999", "line 2: the field x holds NaN or infinity"),
        ("[" * 100_000 + "]" * 100_000, "line 2: not valid JSON (nested too deeply)."),
    ],
)
def test_columns_that_are_no_json_are_refused_by_their_line(tmp_path, value, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "p", "response": "r"}\n{"prompt": "p", "response": "r", "x": ' + value + "}\n"
    )
    with pytest.raises(UserError) as error:  # before the model is looked for
        score(config("no such model", path))
    assert str(error.value).startswith(f"{path}, {message}")


@pytest.mark.parametrize("number", [np.nan, -np.inf])
def test_numbers_that_are_not_finite_are_an_error_that_names_the_line(
    base, file, monkeypatch, number
):
    measure = scoring.measure_program

    def spoiled(lm, temperature):
        def program(*arguments):
            logp_BT, score_B = measure(lm, temperature)(*arguments)
            return logp_BT.at[2].set(number), score_B

        return program

    monkeypatch.setattr(scoring, "measure_program", spoiled)
    with pytest.raises(TrainingError) as error:
        run_score(config(base, file, output=str(file.with_name("out"))))
    found = re.fullmatch(
        rf"{re.escape(str(file))}, line \d: token_logprobs is NaN or infinite, so nothing was "
        r"written; the model or its adapter gives no finite number for this row\.",
        str(error.value),
    )
    assert found and not file.with_name("out").exists()


def test_generate_needs_a_policy(jobs, model):
    settings = {"model": jobs.base, "prompt": PROMPT, "max_new_tokens": 2}
    with pytest.raises(UserError, match=r"holds a reward adapter; a policy adapter is needed"):
        run_generate(GenerateConfig(**settings, adapter=str(jobs.reward)))
    value = jobs.tuned.with_name("value")
    with pytest.raises(UserError, match=r"holds a value adapter; a policy adapter is needed"):
        run_generate(GenerateConfig(**settings, adapter=str(value)))
    with pytest.raises(UserError, match=r"^The adapter has a scalar head, so it is a reward or"):
        generate(model, tiny.load(jobs.reward, model)[0], [PROMPT])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"max_response_length": 8},
            r"the response of row \d has (\d+) tokens; max_response_length is 8\.",
        ),
        (
            {"max_prompt_length": 11},
            r"the prompt of row \d has (\d+) tokens; max_prompt_length is 11\.",
        ),
    ],
)
def test_rows_too_long_are_refused(base, file, fields, message):
    with pytest.raises(UserError) as error:
        score(config(base, file, **fields))
    found = re.fullmatch(rf"{re.escape(str(file))}: {message}", str(error.value))
    assert found and int(found[1]) > next(iter(fields.values()))


def test_rows_beyond_the_models_positions_are_refused(base, tmp_path):
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"prompt": "add " * 60, "response": "here " * 20}) + "\n"
    )
    with pytest.raises(UserError, match=r"has a row of 82 tokens; .* has 64 positions\."):
        score(config(base, tmp_path / "long.jsonl", max_prompt_length=100, max_response_length=100))


def test_generate_at_temperature_0_takes_the_likeliest_tokens(jobs, model):
    made = run_generate(
        GenerateConfig(
            model=jobs.base,
            adapter=str(jobs.tuned),
            prompt=PROMPT,
            max_new_tokens=5,
            temperature=0.0,
            samples=2,
        )
    )
    adapter, _ = tiny.load(jobs.tuned, model)
    prompt = model.tokenizer.prompt_ids(PROMPT)
    ids = list(prompt)
    while len(ids) < len(prompt) + 5 and ids[-1] not in model.tokenizer.stop_ids:
        row = np.asarray([ids + [0] * (16 - len(ids))], np.int32)
        logits_BTV = small.logits(
            model.lm, model.base, adapter, Tokens(row, np.arange(16)[None] < len(ids), row > 0)
        )
        ids.append(int(np.argmax(logits_BTV[0, len(ids) - 1])))
    response = model.tokenizer.text(
        i for i in ids[len(prompt) :] if i not in model.tokenizer.stop_ids
    )
    assert made == [made[0]] * 2 and made[0].strip() == response.strip() != ""


def test_samples_differ_and_the_seed_decides(base):
    settings = GenerateConfig(
        model=base, prompt=PROMPT, max_new_tokens=6, temperature=1.0, samples=4
    )
    first, again, other = (
        run_generate(settings),
        run_generate(settings),
        run_generate(dataclasses.replace(settings, seed=1)),
    )
    assert first == again != other and len(set(first)) > 1 and len(first) == 4


def test_prompts_too_long_are_refused(base):
    with pytest.raises(
        UserError, match=r"The prompt has 4 tokens and max_new_tokens is 61; .* has 64 positions\."
    ):
        run_generate(GenerateConfig(model=base, prompt=PROMPT, max_new_tokens=61))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GenerateConfig(model="m", prompt="p", samples=0), "samples is 0"),
        (lambda: ScoreConfig(model="m", input="i", batch_size=0), "batch_size is 0"),
        (
            lambda: ScoreConfig(model="m", input="i", temperature=0.0),
            "temperature is 0.0; it must be a finite number greater than 0.",
        ),
    ],
)
def test_wrong_settings_are_refused_by_name(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value)
