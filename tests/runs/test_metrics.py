"""Writers, resume and versions."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from perl_jax.errors import UserError
from perl_jax.runs import environment, metrics
from perl_jax.runs.metrics import MetricsWriter, read_metrics, without_timing


def write_steps(folder, steps, resume_step=None, clock=0.0):
    with MetricsWriter(folder, resume_step) as writer:
        for step in steps:
            writer.write(step, {"train/loss": 1 / step, "time/step": clock + step})


class TestRows:
    def test_line_is_flat_json_with_step_first(self, tmp_path):
        with MetricsWriter(tmp_path, None) as writer:
            writer.write(3, {"train/loss": jnp.float32(0.5), "kl/token": np.array([2], np.int32)})
            text = (tmp_path / "metrics.jsonl").read_text()  # flushed before the writer closes
        assert text == '{"step": 3, "train/loss": 0.5, "kl/token": 2.0}\n'

    def test_bfloat16_is_written_as_its_value(self):
        assert metrics.encode_row(1, {"a": jnp.bfloat16(0.25)}) == {"step": 1, "a": 0.25}

    def test_nonfinite_is_null_and_named(self, tmp_path):
        with MetricsWriter(tmp_path, None) as writer:
            writer.write(1, {"train/loss": float("nan"), "a": 1, "b": np.float32("-inf")})
        line = (tmp_path / "metrics.jsonl").read_text()
        assert "NaN" not in line and "Infinity" not in line
        assert json.loads(line) == {
            "step": 1,
            "train/loss": None,
            "a": 1.0,
            "b": None,
            "nonfinite": ["train/loss", "b"],
        }

    @pytest.mark.parametrize("name", ["step", "nonfinite"])
    def test_reserved_names_are_refused(self, name):
        with pytest.raises(ValueError, match=name):
            metrics.encode_row(1, {name: 1.0})

    def test_arrays_are_refused_by_name(self):
        with pytest.raises(ValueError, match=r"'train/loss'.*\(2,\)"):
            metrics.encode_row(1, {"train/loss": np.zeros(2)})

    def test_steps_must_increase(self, tmp_path):
        with MetricsWriter(tmp_path, None) as writer:
            writer.write(2, {})
            with pytest.raises(ValueError, match="step 2 come after"):
                writer.write(2, {})

    def test_without_timing(self):
        rows = [
            {"step": 1, "a": 1.0, "time/step": 3.0, "timeless": 2.0},
            {"step": 2, "a": None, "time/x": None, "nonfinite": ["time/x", "a"]},
            {"step": 3, "time/x": None, "nonfinite": ["time/x"]},
        ]
        assert without_timing(rows) == [
            {"step": 1, "a": 1.0, "timeless": 2.0},
            {"step": 2, "a": None, "nonfinite": ["a"]},
            {"step": 3},
        ]


class TestResume:
    def test_killed_and_resumed_equals_uninterrupted(self, tmp_path):
        write_steps(tmp_path / "whole", range(1, 11))
        write_steps(tmp_path / "cut", range(1, 8), clock=5.0)
        with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
            file.write('{"step": 8, "train/lo')
        write_steps(tmp_path / "cut", range(6, 11), resume_step=5, clock=9.0)
        whole, cut = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
        assert whole != cut  # the clocks differ
        assert without_timing(whole) == without_timing(cut)
        assert [row["step"] for row in cut] == list(range(1, 11))
        assert not list((tmp_path / "cut").glob(".*tmp"))

    def test_kept_rows_are_the_same_bytes(self, tmp_path):
        write_steps(tmp_path, range(1, 4))
        before = (tmp_path / "metrics.jsonl").read_bytes()
        write_steps(tmp_path, [], resume_step=3)
        assert (tmp_path / "metrics.jsonl").read_bytes() == before

    def test_last_line_without_newline_is_kept_whole(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}')
        write_steps(tmp_path, [3], resume_step=2)
        assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]

    def test_resume_continues_after_the_kept_step(self, tmp_path):
        write_steps(tmp_path, range(1, 6))
        with MetricsWriter(tmp_path, 3) as writer, pytest.raises(ValueError, match="step 3"):
            writer.write(3, {})

    def test_resume_before_the_first_row_empties_the_file(self, tmp_path):
        write_steps(tmp_path, range(1, 3))
        write_steps(tmp_path, [1], resume_step=0)
        assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]

    def test_new_run_keeps_what_was_there(self, tmp_path):
        write_steps(tmp_path, range(1, 3))
        write_steps(tmp_path, [7])
        assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [7]
        assert len(read_metrics(tmp_path / "metrics.previous.jsonl")) == 2

    @pytest.mark.parametrize("line", ["{bad", "[1]", '{"step": 1.5}', '{"step": true}', "\\xff"])
    def test_damage_in_the_middle_is_an_error(self, tmp_path, line):
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
        with pytest.raises(UserError, match="Line 2"):
            read_metrics(path)
        with pytest.raises(UserError, match="Line 2"):
            MetricsWriter(tmp_path, 3)
        assert path.read_text().count("\n") == 3  # nothing was lost

    def test_missing_file(self, tmp_path):
        with pytest.raises(UserError, match="no metrics file"):
            read_metrics(tmp_path / "metrics.jsonl")


class TestDashboards:
    @pytest.mark.parametrize(
        ("module", "option"), [("wandb", "wandb"), ("tensorboardX", "tensorboard")]
    )
    def test_missing_package_names_its_extra_and_loses_nothing(
        self, tmp_path, monkeypatch, module, option
    ):
        write_steps(tmp_path, [1])
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"pip install -c constraints.txt -e '\.\[{option}\]'"):
            MetricsWriter(tmp_path, None, **{option: True})
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1

    def test_tensorboard_events_are_written(self, tmp_path):
        pytest.importorskip("tensorboardX")
        with MetricsWriter(tmp_path, None, tensorboard=True) as writer:
            writer.write(1, {"train/loss": 0.5, "bad": float("nan")})
        events = list((tmp_path / "tensorboard").glob("events*"))
        assert len(events) == 1
        assert b"train/loss" in events[0].read_bytes()
        assert b"bad" not in events[0].read_bytes()

    def test_wandb_run_keeps_its_id_over_a_resume(self, tmp_path, monkeypatch):
        started, logged = [], []
        run = types.SimpleNamespace(
            log=lambda values, step: logged.append((step, values)), finish=lambda: None
        )
        fake = types.SimpleNamespace(init=lambda **options: started.append(options) or run)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        with MetricsWriter(tmp_path, None, wandb=True) as writer:
            writer.write(1, {"a": 1.0})
        with MetricsWriter(tmp_path, 1, wandb=True) as writer:
            writer.write(2, {"a": float("inf"), "b": 2.0})
        MetricsWriter(tmp_path, None, wandb=True).close()
        assert started[0]["id"] == started[1]["id"] != started[2]["id"]
        assert logged == [(1, {"a": 1.0}), (2, {"b": 2.0})]

    def test_wandb_gets_a_project_and_a_name(self, tmp_path, monkeypatch):
        found = []
        run = types.SimpleNamespace(finish=lambda: None)
        init = lambda **options: found.append((options["project"], options["name"])) or run
        monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
        monkeypatch.delenv("WANDB_PROJECT", raising=False)
        folder = tmp_path / "my" / "sft"
        MetricsWriter(folder, None, wandb=True).close()
        monkeypatch.setenv("WANDB_PROJECT", "theirs")
        MetricsWriter(folder, None, wandb=True).close()
        MetricsWriter(folder, None, False, True, "ours", "first").close()
        assert found == [("perl_jax", "my/sft"), ("theirs", "my/sft"), ("ours", "first")]


class TestEnvironment:
    def test_names_what_decides_the_numbers(self):
        found = environment.environment()
        assert found["python"].startswith("3.")
        assert found["packages"]["jax"].split(".")[0].isdigit()
        assert found["devices"] >= 1 and found["backend"] in ("cpu", "gpu", "tpu")
        json.dumps(found)

    def test_commit_of_a_tracked_and_of_an_untracked_folder(self, tmp_path):
        def git(*arguments):
            subprocess.run(
                ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
                cwd=tmp_path,
                check=True,
                capture_output=True,
            )

        git("init", "-q")
        (tmp_path / "code").mkdir()
        (tmp_path / "installed").mkdir()
        (tmp_path / "code" / "a.py").write_text("x = 1\n")
        git("add", "code")
        git("commit", "-q", "-m", "one")
        clean = environment.git_commit(tmp_path / "code")
        assert clean is not None and len(clean) == 40
        assert environment.git_commit(tmp_path / "installed") is None
        (tmp_path / "code" / "a.py").write_text("x = 2\n")
        assert environment.git_commit(tmp_path / "code") == f"{clean}-dirty"
