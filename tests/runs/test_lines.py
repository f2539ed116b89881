"""Files of lines that grow in parts in a bucket, and stay as they are on a disk."""

from __future__ import annotations

import json
import pathlib
import re

import pytest

from perl_jax.errors import UserError
from perl_jax.runs import lines, metrics
from perl_jax.runs.lines import Lines, read_rows
from perl_jax.runs.metrics import MetricsWriter, SamplesWriter, read_metrics
from perl_jax.runs.owner import Lost
from perl_jax.runtime import files
from perl_jax.runtime.outputs import LocalCopy

RUN = "gs://bucket/run"
PATH = f"{RUN}/metrics.jsonl"


def steps(path=PATH) -> list[int]:
    return [row["step"] for row in read_rows(files.path_of(path))]


def write(found: Lines, *numbers: int, rows: int = 1) -> None:
    """Writes these steps, each of so many rows, and stores them as one part."""
    for step in numbers:
        found.write(step, [{"step": step, "row": row} for row in range(rows)])
    found.sync()


def test_rows_are_stored_in_parts_and_merged_at_the_end(bucket):
    found = Lines(files.path_of(PATH), None)
    assert not lines.exist(files.path_of(PATH)) and found.last_step is None
    write(found, 1, 2)
    write(found, 3)
    found.write(4, [{"step": 4}])
    # What waits for a `sync` is in no part.
    assert steps() == [1, 2, 3] and lines.exist(files.path_of(PATH))
    assert bucket.names("run/") == [
        f"run/metrics.jsonl.parts/{name}.jsonl"
        for name in ("000000000002.000000", "000000000003.000001")
    ]
    found.close()
    assert steps() == [1, 2, 3, 4] and len(bucket.names("run/")) == 3
    found.close(merge=True)
    found.close(merge=True)
    assert steps() == [1, 2, 3, 4] and bucket.names("run/") == ["run/metrics.jsonl"]


def test_a_resumed_file_drops_later_rows(bucket):
    found = Lines(files.path_of(PATH), None)
    write(found, 1, 2)
    write(found, 3, 4, 5)
    again = Lines(files.path_of(PATH), 4)
    assert again.last_step == 4 and steps() == [1, 2, 3, 4]
    write(again, 5, 6)
    again.close(merge=True)
    assert steps() == [1, 2, 3, 4, 5, 6]


def test_a_new_file_keeps_the_rows_of_the_one_before(bucket):
    found = Lines(files.path_of(PATH), None)
    write(found, 1)
    write(found, 2)
    again = Lines(files.path_of(PATH), None)
    write(again, 1)
    again.close(merge=True)
    assert steps() == [1] and steps(f"{RUN}/metrics.previous.jsonl") == [1, 2]
    assert bucket.names("run/") == ["run/metrics.jsonl", "run/metrics.previous.jsonl"]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_merge_that_was_stopped_does_no_harm(bucket, monkeypatch, rows):
    found = Lines(files.path_of(PATH), None)
    for step in range(6):
        write(found, step, rows=rows)
    expected = read_rows(files.path_of(PATH))
    assert len(expected) == 6 * rows
    with monkeypatch.context() as patch:
        patch.setattr(lines.files, "remove", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            found.close(merge=True)
    # The file and all of its parts.
    assert len(bucket.names("run/")) == 7 and read_rows(files.path_of(PATH)) == expected
    # Half of the parts are gone, and the run goes on from before them.
    for name in bucket.names("run/metrics.jsonl.parts")[::2]:
        files.remove(files.path_of(f"gs://bucket/{name}"))
    again = Lines(files.path_of(PATH), 3)
    write(again, 4, 5, rows=rows)
    again.close(merge=True)
    assert read_rows(files.path_of(PATH)) == expected


def test_a_damaged_part_is_named(bucket):
    write(Lines(files.path_of(PATH), None), 1)
    write(Lines(files.path_of(PATH), 1), 2)
    (part,) = bucket.names("run/metrics.jsonl.parts")
    assert steps() == [1, 2]
    for name, line in ((part, 2), ("run/metrics.jsonl", 1)):
        files.write_bytes(f"gs://bucket/{name}", b"nonsense\n" + bucket.read(name))
        said = f"Line {line} of gs://bucket/run/metrics.jsonl is not a JSON object"
        with pytest.raises(UserError, match=re.escape(said)):
            steps()


def test_the_writers_files_are_those_of_a_disk(bucket, tmp_path):
    for folder in (files.path_of(RUN), files.path_of(tmp_path / "run")):
        samples = SamplesWriter(folder, None)
        with MetricsWriter(folder, None) as writer, samples:
            samples.write(0, [{"text": "a"}, {"text": "b"}])
            for step in (1, 2, 3):
                writer.write(step, {"train/loss": 1 / step})
                samples.write(step, [{"text": str(step)}])
                if step == 2:
                    writer.sync()
        with MetricsWriter(folder, 2) as writer, SamplesWriter(folder, 2) as samples:
            writer.write(3, {"train/loss": 3.0})
            samples.write(3, [{"text": "c"}])
    found = bucket.download("run", tmp_path / "bucket")
    names = sorted(path.name for path in found.iterdir())
    assert names == ["metrics.jsonl", "samples.jsonl"]
    for name in names:
        assert (found / name).read_text() == (tmp_path / "run" / name).read_text()
    assert [row["step"] for row in read_metrics(f"{RUN}/metrics.jsonl")] == [1, 2, 3]


def test_who_lost_the_folder_writes_nothing_more(bucket):
    folder = files.path_of(RUN)
    for error in (Lost, KeyboardInterrupt):
        writer, samples = MetricsWriter(folder, None), SamplesWriter(folder, None)
        writer.write(1, {})
        for found in (writer, samples):
            found.__exit__(error)
        assert steps() == ([] if error is Lost else [1])


def test_what_dashboards_write_is_copied(bucket, tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsWriter(files.path_of(RUN), None, tensorboard=True) as writer:
        writer.write(1, {"train/loss": 1.0})
    (name,) = bucket.names("run/tensorboard/")
    assert name.startswith("run/tensorboard/events") and len(bucket.read(name)) > 50
    for folder, keep in ((RUN, True), (f"{RUN}/no", False), (tmp_path / "disk", True)):
        local = LocalCopy(files.path_of(folder))
        (local.path / "a").mkdir(parents=True)
        (local.path / "a" / "b").write_text(json.dumps(str(folder)))
        local.close(keep)
        local.close(keep)
        assert local.path.exists() == (folder == tmp_path / "disk")
    assert bucket.read("run/a/b").decode() == json.dumps(RUN) and not bucket.names("run/no")
    assert pathlib.Path(tmp_path / "disk" / "a" / "b").exists() and metrics.FILE_NAME
