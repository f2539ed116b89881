"""What a run stands on: every change under the same paths is noticed, and named; what is the same
is not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from perl_jax.adapters.lora import LoRAConfig
from perl_jax.errors import UserError
from perl_jax.evaluation import compare
from perl_jax.hub import artefacts
from perl_jax.runs import folder as folder_lib
from perl_jax.runs import provenance
from perl_jax.runs.provenance import source_of
from perl_jax.runtime import files, json_values
from perl_jax.training import roles
from perl_jax.training.commands import RLCommand
from perl_jax.training.rl_config import KLConfig
from tests import small
from tests.training import tiny

ROWS = [{"prompt": f"order {i}", "answer": str(i)} for i in range(40)]
FUNCTION = "def score(prompts, responses):\n    return [len(r) for r in responses]\n"


@pytest.fixture
def config(jobs, tmp_path) -> RLCommand:
    """RL with all that a run can be given, in folders of its own."""
    for name, source in {
        "base": jobs.base,
        "policy": jobs.policy,
        "reward": jobs.reward,
        "reference": jobs.policy,
    }.items():
        shutil.copytree(source, tmp_path / name)
    (tmp_path / "score.py").write_text(FUNCTION)
    terms = [
        {"kind": "length", "maximum": 5},
        {"kind": "function", "function": f"{tmp_path}/score.py:score"},
    ]
    (tmp_path / "terms.json").write_text(json.dumps(terms))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tiny.rl_config(
        tmp_path / "run",
        str(tmp_path / "base"),
        tmp_path / "policy",
        tmp_path / "reward",
        kl=KLConfig(reference=str(tmp_path / "reference")),
        terms=str(tmp_path / "terms.json"),
        data=dataclasses.replace(tiny.DATA, task="jsonl", data_dir=str(tmp_path / "train.jsonl")),
    )


def replace(name: str, old: str, new: str) -> Callable[[pathlib.Path], None]:
    """Changes the first occurrence of a text in a file."""

    def change(folder: pathlib.Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def other_weights(folder: pathlib.Path) -> None:
    """One matrix of the base is another."""
    tensors = load_file(folder / "base" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(
        tensors | {name: np.ascontiguousarray(tensors[name] * 1.01)},
        folder / "base" / "model.safetensors",
        metadata={"format": "pt"},
    )


def other_setting(**fields) -> Callable[[pathlib.Path], None]:
    return lambda folder: small.change_config(folder / "base", **fields)


def other_record(role: str, **fields) -> Callable[[pathlib.Path], None]:
    """An artefact with another record, whole in itself."""

    def change(folder: pathlib.Path) -> None:
        path = folder / role / artefacts.RECORD
        files.write_json(path, json_values.with_checksum(files.read_json(path) | fields))

    return change


def first_format(folder: pathlib.Path) -> None:
    """The policy as an older version wrote it."""
    path = folder / "policy" / artefacts.RECORD
    values = {
        name: value
        for name, value in files.read_json(path).items()
        if name not in ("digests", "checksum")
    }
    files.write_json(path, values | {"format": 1})


def exchange_rows(folder: pathlib.Path) -> None:
    rows = [ROWS[1], ROWS[0], *ROWS[2:]]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def begin(config: RLCommand) -> None:
    """Begins a run and gives it a checkpoint's folder: it holds work from here on."""
    folder_lib.begin(folder_lib.open_run("rl", config))
    (pathlib.Path(config.run) / "checkpoints" / "1").mkdir(parents=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_weights, "the base under {0}/base"),
        (other_setting(rope_theta=20_000.0), "the base under {0}/base"),
        (other_setting(rms_norm_eps=1e-3), "the base under {0}/base"),
        (
            replace(
                "base/tokenizer.json", '"normalizer": null', '"normalizer": {"type": "Lowercase"}'
            ),
            "the tokenizer or its template under {0}/base",
        ),
        (other_setting(eos_token_id=[2, 5]), "the tokenizer or its template under {0}/base"),
        (other_record("policy", step=99), "the policy artefact {0}/policy"),
        (other_record("reward", score_std=9.0), "the reward artefact {0}/reward"),
        (other_record("reference", digests={}), "the reference artefact {0}/reference"),
        (first_format, "the policy artefact {0}/policy"),
        (replace("terms.json", "5", "6"), "the file of terms {0}/terms.json"),
        (replace("score.py", "len(r)", "-len(r)"), "the function {0}/score.py:score"),
        (exchange_rows, "the rows of --data.task jsonl in {0}/train.jsonl"),
        (
            replace("train.jsonl", '"answer": "7"', '"answer": "8"'),
            "the rows of --data.task jsonl in {0}/train.jsonl",
        ),
    ],
)
def test_what_changed_is_named(config, tmp_path, change, said):
    begin(config)
    folder_lib.open_run("rl", config)
    change(tmp_path)
    with pytest.raises(UserError) as error:
        folder_lib.open_run("rl", config)
    assert str(error.value) == (
        f"{tmp_path}/run holds a run whose inputs have changed since it began: "
        f"{said.format(tmp_path)}; restore them, or use another --run."
    )


def test_what_does_not_matter_may_change(config, tmp_path):
    begin(config)
    # Other times, an order of keys, a field that no number depends on.
    for name in ("policy", "base"):
        shutil.copytree(tmp_path / name, tmp_path / "copy")
        shutil.rmtree(tmp_path / name)
        (tmp_path / "copy").rename(tmp_path / name)
    small.change_config(tmp_path / "base", torch_dtype="bfloat16", max_position_embeddings=4096)
    # What a run no longer needs may be gone; one that needs it says so itself.
    shutil.rmtree(tmp_path / "reference")
    folder_lib.open_run("rl", config)


def test_runs_of_an_earlier_version_go_on_with_a_notice(config, tmp_path, capsys):
    begin(config)
    (tmp_path / "run" / folder_lib.INPUTS_FILE).unlink()
    other_weights(tmp_path)
    folder_lib.open_run("rl", config)
    assert (
        capsys.readouterr().out.count(
            "begun by an earlier version, which did not record the run's inputs"
        )
        == 1
    )


def test_a_finished_run_is_compared_too(jobs, base):
    path = pathlib.Path(jobs.reward) / artefacts.RECORD
    before = path.read_text()
    config = tiny.rl_config(jobs.root / "rl", base, jobs.policy, jobs.reward, tuning="lora")
    try:
        other_record(jobs.reward.name, score_mean=7.0)(jobs.reward.parent)
        with pytest.raises(
            UserError, match=f"changed since it began: the reward artefact {jobs.reward};"
        ):
            folder_lib.open_run("rl", config)
    finally:
        path.write_text(before)
    folder_lib.open_run("rl", config)


def test_a_role_of_format_1_needs_the_tokenizer_that_its_version_knew_it_by(jobs, base, tmp_path):
    """The digest of that version was of the vocabulary, bos, eos and the template."""
    model = tiny.open_model(base)
    vocabulary = tiny.read(pathlib.Path(base) / "tokenizer.json")["model"]["vocab"]
    listed = sorted(vocabulary.items(), key=lambda item: item[1])
    first = hashlib.sha256(
        repr((listed, vocabulary["<s>"], vocabulary["</s>"], None)).encode()
    ).hexdigest()[:16]
    shutil.copytree(jobs.reward, tmp_path / "reward")
    path = tmp_path / "reward" / artefacts.RECORD
    values = {
        name: value
        for name, value in tiny.read(path).items()
        if name not in ("digests", "checksum", "turn_end")
    }
    values |= {"format": 1, "base_fingerprint": model.weights_fingerprint}
    files.write_json(path, values | {"tokenizer_fingerprint": first})
    adapter, record = model.load_role(tmp_path / "reward", "reward")
    assert (record.format, record.turn_end) == (1, None)
    small.assert_same(adapter, model.load_role(jobs.reward)[0])
    for other in (model.tokenizer.fingerprint, first[::-1]):
        files.write_json(path, values | {"tokenizer_fingerprint": other})
        with pytest.raises(
            UserError,
            match=f"{tmp_path}/reward was trained with another tokenizer or chat template than "
            f"that of {base};",
        ):
            model.load_role(tmp_path / "reward")


class Redone(Exception):
    """An evaluation that begins."""


@pytest.mark.parametrize("role", ["tuned", "policy", "reward"])
def test_an_evaluation_of_other_weights_is_done_again(jobs, base, monkeypatch, role):
    def begin(*_):
        raise Redone

    monkeypatch.setattr(compare, "load_model", begin)
    config = tiny.evaluate_config(
        jobs.root / "rl",
        base,
        policy=str(jobs.tuned),
        baseline=str(jobs.policy),
        reward=(str(jobs.reward),),
    )
    compare.run_evaluate(config)
    folder = getattr(jobs, role)
    path = folder / artefacts.RECORD
    before = path.read_text()
    try:
        other_record(folder.name, step=77)(folder.parent)
        with pytest.raises(Redone):
            compare.run_evaluate(config)
    finally:
        path.write_text(before)
    compare.run_evaluate(config)


def test_functions_are_found_without_importing_them(tmp_path, monkeypatch):
    (tmp_path / "pack").mkdir()
    for name in ("alone.py", "pack/__init__.py", "pack/inner.py"):
        (tmp_path / name).write_text("raise ImportError\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert source_of("alone:f") == tmp_path / "alone.py"
    assert source_of("pack:f") == tmp_path / "pack" / "__init__.py"
    assert source_of("pack.inner:f") == tmp_path / "pack" / "inner.py"
    assert source_of(f"{tmp_path}/alone.py:f") == tmp_path / "alone.py"
    with pytest.raises(FileNotFoundError):
        source_of("no_such_module_of_anybody:f")


def test_every_job_says_what_it_stands_on(config, base, tmp_path):
    given = {
        "sft": tiny.sft_config(tmp_path / "r", base),
        "reward": tiny.reward_config(tmp_path / "r", base, objective="pointwise"),
    }
    for job, settings in given.items():
        found = provenance.fingerprints(job, settings)
        assert len(found) == 3 and None not in found.values()
    assert (
        len(provenance.fingerprints("rl", config)) == 8
        and None not in provenance.fingerprints("rl", config).values()
    )
    # A base is trained on rows; its model's folder is what it writes.
    assert [
        name.split()[1]
        for name in provenance.fingerprints(
            "base", tiny.base_config(tmp_path / "r", tmp_path / "m")
        )
    ] == ["rows"]


# Settings that the policy artefact decides.


@pytest.mark.parametrize(
    ("field", "value", "there"),
    [
        ("rank", 32, 5),
        ("alpha", 3.0, 10.0),
        ("targets", "q,v", "attention"),
        ("dropout", 0.2, 0.0),
        ("layers", "0", None),
    ],
)
def test_settings_that_the_policy_decides_otherwise_are_refused(
    jobs, base, tmp_path, field, value, there
):
    model = tiny.open_model(base)
    given = dataclasses.replace(tiny.COMMON["lora"], **{field: value})
    settings = tiny.rl_config(tmp_path, base, jobs.policy, jobs.reward, lora=given)
    with pytest.raises(UserError) as error:
        roles.starting_role(model, settings, settings.policy, None)
    assert (
        f"lora.{field} is {value!r}; {jobs.policy}, which this run goes on from, has {there!r}: "
        "leave it out"
    ) in str(error.value)
    # The artefact's own, and what is the default, pass.
    for passing in (tiny.COMMON["lora"], LoRAConfig()):
        settings = dataclasses.replace(settings, lora=passing)
        assert (
            roles.starting_role(model, settings, settings.policy, None).config
            == tiny.COMMON["lora"]
        )
