"""Every number that a few steps of training print is the number that they printed before."""

from __future__ import annotations

from tests.golden import runs

# Processors round differently; a change of behaviour is larger.
RELATIVE = 1e-4


def test_training_gives_the_numbers_that_it_gave(tmp_path):
    lines = runs.differences(runs.run_all(tmp_path), runs.read_file(), RELATIVE)
    assert not lines, (
        "Did you mean to change behaviour? Then run `make golden` and commit what it writes.\n"
        + "\n".join(lines)
    )


def test_a_changed_missing_or_new_number_is_a_difference():
    kept = {"sft": [{"step": 1, "train/loss": 2.0}]}
    assert runs.differences(kept, kept, 0.0) == []
    assert runs.differences({"sft": [{"step": 1, "train/loss": 2.0001}]}, kept, RELATIVE) == []
    assert runs.differences({"sft": [{"step": 1, "train/loss": 2.001}]}, kept, RELATIVE) == [
        "sft, step 1, train/loss: 2.001, was 2.0"
    ]
    assert runs.differences({"sft": [{"step": 1}]}, kept, RELATIVE) == [
        "sft, step 1, train/loss: None, was 2.0"
    ]
    assert (
        len(
            runs.differences(
                {"sft": [*kept["sft"], {"step": 2, "train/loss": 1.0}]}, kept, RELATIVE
            )
        )
        == 2
    )
