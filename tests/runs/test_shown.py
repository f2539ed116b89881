"""Names of metrics and samples as a person sees them."""

from __future__ import annotations

import pytest

from perl_jax.runs import shown

SAMPLE = {
    "split": "validation",
    "prompt": "Say\nhello",
    "response": "h\x1b[31m\u202e" + "o" * 500,
    "reward": 0.25,
    "parts": {"model": 0.5, "term/length": -0.5},
    "gold": None,
    "kl": 1.23456,
    "finished": False,
}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("train/loss", "loss"),
        ("reward/score", "reward"),
        ("reward/gold", "gold"),
        ("kl/sequence", "KL"),
        ("response/eos_rate", "ended"),
        ("validation/reward", "validation reward"),
        ("validation/kl", "validation KL"),
        ("validation/auc", "validation AUC"),
        ("train/accuracy", "accuracy"),
        ("validation/accuracy", "validation accuracy"),
        ("mine", "mine"),
    ],
)
def test_a_metric_is_named_for_people(key, name):
    assert shown.label(key) == name


def test_a_sample_is_wrapped_cut_and_harmless():
    text = shown.sample_text("rl", 100, [SAMPLE], width=60)
    lines = text.splitlines()
    heading = " ".join(line.strip() for line in lines[: lines.index("  prompt    Say")])
    assert heading == (
        "rl step 100, a validation prompt: reward 0.25 (model 0.5, length -0.5), gold not finite, "
        "KL 1.235, cut at the maximum length"
    )
    assert "  prompt    Say" in lines and "            hello" in lines
    assert "\\x1b[31m\\u202eooo" in text and "\x1b" not in text and "\u202e" not in text
    left_out = len(shown.visible(SAMPLE["response"])) - shown.LONGEST
    assert text.endswith(f"({left_out} characters more)")
    assert max(map(len, lines)) <= 60


def test_an_empty_response_and_what_is_not_known():
    text = shown.sample_text("rl", 0, [{"prompt": "a", "response": "", "reward": 1}], width=80)
    assert text == "rl step 0: reward 1\n  prompt    a\n  response  (empty)"


def test_wide_letters_take_two_columns():
    text = shown.sample_text("rl", 0, [{"prompt": "語" * 60, "response": "a"}], width=60)
    assert max(len(line) for line in text.splitlines() if "語" in line) <= 36
    assert text.count("語") == 60


def test_joined_letters_stay_joined():
    assert shown.visible("👨\u200d👩 می\u200cخواهم") == "👨\u200d👩 می\u200cخواهم"


def test_the_end_of_a_training_says_the_numbers_of_the_step_that_is_kept():
    rows = [
        {"step": 1, "train/loss": 2.0, "validation/reward": 0.5, "time/step": 60.0},
        {"step": 2, "train/loss": 1.0, "kl/sequence": 0.25, "time/step": 5.0, "time/validate": 1.0},
    ]
    assert shown.training_text("rl", rows, 1, best=True) == (
        "rl: 2 steps in 1 min 06 s; step 1, the best one: validation reward 0.5; training loss 2."
    )
    assert shown.training_text("rl", rows, 2, best=False).endswith(
        "step 2, the last one: training loss 1, KL 0.25."
    )


def test_measures_of_test_rows_have_their_intervals():
    accuracy = {"value": 0.75, "low": 0.5, "high": 0.875, "n": 1024, "groups": 9}
    assert shown.test_text("reward", {"n": 5, "ece": 0.125, "pairwise_accuracy": accuracy}) == (
        "reward: test of 1,024 rows: pairs in the right order 75.0 % (50.0 % to 87.5 %), "
        "calibration error 12.5 %."
    )
    assert shown.estimate_text({"value": 0.5, "low": None, "high": None}) == "0.5"
