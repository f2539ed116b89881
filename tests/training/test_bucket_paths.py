"""Commands whose model, rows, artefacts and outputs are in a bucket give what they give on a
disk.
"""

from __future__ import annotations

import json
import os
import pathlib

import jax
import numpy as np
import pytest

from perl_jax.errors import UserError
from perl_jax.evaluation.compare import run_evaluate
from perl_jax.evaluation.report import write_report
from perl_jax.evaluation.score import ScoreConfig, run_score
from perl_jax.hub import verify
from perl_jax.hub.average import AverageConfig, run_average
from perl_jax.hub.export import ExportConfig, run_export
from perl_jax.hub.import_peft import ImportConfig, run_import
from perl_jax.hub.weights import find_model
from perl_jax.runtime import files, programs
from perl_jax.training.commands import run_sft
from tests.training import tiny

ROWS = [{"prompt": "milk", "response": "tea"}, {"prompt": "two", "response": "one milk"}]
BUCKET = "gs://bucket/made"


def put(folder: files.PathLike, to: str) -> str:
    """Copies a folder into the bucket; returns its address."""
    for name in files.tree(folder):
        files.write_bytes(
            files.path_of(to) / name, files.read_bytes(files.path_of(str(folder)) / name)
        )
    return to


@pytest.mark.slow
def test_commands_read_and_write_a_bucket(base, tmp_path, bucket, monkeypatch):
    monkeypatch.setenv("PERL_JAX_CACHE", str(tmp_path / "cache"))
    policy = run_sft(tiny.sft_config(tmp_path / "sft", base))
    model, role = put(base, f"{BUCKET}/base"), put(policy, f"{BUCKET}/policy")
    rows = f"{BUCKET}/rows.jsonl"
    files.write_atomically(rows, "".join(json.dumps(row) + "\n" for row in ROWS))
    files.copy(rows, tmp_path / "rows.jsonl")

    run_score(
        ScoreConfig(model=model, adapter=role, input=rows, output=f"{BUCKET}/deep/scored.jsonl")
    )
    run_score(
        ScoreConfig(
            model=base,
            adapter=str(policy),
            input=str(tmp_path / "rows.jsonl"),
            output=str(tmp_path / "deep" / "scored.jsonl"),
        )
    )
    assert files.read_bytes(f"{BUCKET}/deep/scored.jsonl") == files.read_bytes(
        tmp_path / "deep" / "scored.jsonl"
    )
    # The model was copied once, by its content.
    assert find_model(model).parent == tmp_path / "cache" / "copies"
    assert len(os.listdir(tmp_path / "cache" / "copies")) == 1

    exported = run_export(
        ExportConfig(adapter=role, model=model, format="peft", to=f"{BUCKET}/peft")
    )
    assert str(exported.folder) == f"{BUCKET}/peft" and exported.difference < 1e-5
    assert set(files.tree(exported.folder)) >= {"adapter_config.json", "adapter_model.safetensors"}
    back = run_import(ImportConfig(peft=f"{BUCKET}/peft", model=model, to=f"{BUCKET}/back"))
    mean = run_average(AverageConfig(adapters=(role, str(back)), model=model, to=f"{BUCKET}/mean"))
    loaded = tiny.open_model(base)
    # The adapter averaged with itself: its update is the same, in twice the rank.
    ours, theirs = (tiny.load(folder, loaded)[0] for folder in (mean, policy))
    logits = [
        np.asarray(verify.outputs(loaded, loaded.base, adapter)) for adapter in (ours, theirs)
    ]
    np.testing.assert_allclose(*logits, atol=1e-5)
    with pytest.raises(UserError, match="gs://bucket/made/mean exists already"):
        run_average(AverageConfig(adapters=(role,), model=model, to=f"{BUCKET}/mean"))


@pytest.mark.slow
def test_a_run_that_was_copied_into_a_bucket_is_evaluated_and_reported(jobs, bucket):
    rl = put(pathlib.Path(jobs.tuned).parents[1], f"{BUCKET}/rl")
    reward = put(jobs.reward, f"{BUCKET}/reward")
    there = run_evaluate(
        tiny.evaluate_config(
            rl,
            jobs.base,
            policy=f"{rl}/adapters/policy",
            baseline=str(jobs.policy),
            reward=(reward,),
        )
    )
    found = files.read_json(there / "evaluation.json")
    here = files.read_json(pathlib.Path(jobs.tuned).parents[1] / "evaluation.json")
    assert found["policies"] == here["policies"]
    page = write_report(rl)
    assert files.read_text(page).startswith("<!doctype html>")


def test_programs_are_kept_in_a_bucket(bucket):
    from jax.experimental.compilation_cache import compilation_cache

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        programs.use_compilation_cache("gs://bucket/programs")
        jax.jit(lambda x: x * 3.25 + 1.5)(1.0)
        assert [name for name in bucket.names("programs/") if name.endswith("-cache")]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
