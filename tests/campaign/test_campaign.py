"""A few trials of each kind of the campaign, and that its judgement can fail."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator

import pytest

from tests.campaign import __main__ as campaign
from tests.campaign import kinds
from tests.campaign.bench import Bench, Fault
from tests.campaign.commands import Running, running_commands


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("campaign")
    with running_commands(root / "printed") as commands:
        yield Bench(root, commands)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_fault_is_survived_or_said_in_a_sentence(kind, bench):
    bench.begin(100)
    assert kinds.KINDS[kind](bench) in ("well", "refused")


@dataclasses.dataclass
class Said(Running):
    """A command that has ended and printed a text."""

    text: str = ""

    def poll(self) -> int | None:
        return self.status

    def wait(self, seconds: float = 1) -> int | None:
        return self.status

    def printed(self) -> str:
        return self.text


def said(status: int | None, text: str) -> Running:
    return Said(None, 0, pathlib.Path(), status, text=text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "text", "found"),
    [
        (None, "", "it did not end in time"),
        (3, "x", "status 3"),
        (-11, "", "status -11"),
        (1, "Traceback (most recent call last):\n  ...", "it printed 'Traceback"),
        (2, "", "status 2 without a word"),
        (2, "x\n" * 1000, "it printed 1001 lines"),
        (2, "y" * 5000, "a line of 5000 characters"),
    ],
)
def test_other_ends_are_faults(status, text, found):
    bench = Bench(pathlib.Path(), None)  # type: ignore[arg-type]
    with pytest.raises(Fault, match=found):
        bench.ended(said(status, text))


def test_documented_ends_are_none():
    bench = Bench(pathlib.Path(), None)  # type: ignore[arg-type]
    assert bench.ended(said(0, "policy: run\n")) == "well"
    assert bench.ended(said(2, "perl-jax sft: There is no file x.\n")) == "refused"


def test_metrics_that_differ_are_a_fault(tmp_path):
    bench = Bench(tmp_path, None)  # type: ignore[arg-type]
    bench.whole["sft"] = [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0}]
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss": 1.0}\n')
    bench.check_same("sft", path.parent)
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss": 1.5}\n')
    with pytest.raises(Fault, match=r"the first that differs is 2"):
        bench.check_same("sft", path.parent)
    path.write_text('{"step": 1, "train/loss": 2.0}\n')
    with pytest.raises(Fault, match=r"steps \[1\]"):
        bench.check_same("sft", path.parent)


def test_the_table_counts_and_a_fault_fails_the_campaign(monkeypatch, capsys):
    ends = iter(["well", "refused", Fault("lost a step")])

    def drawn(_):
        end = next(ends)
        if isinstance(end, Fault):
            raise end
        return end

    monkeypatch.setattr(campaign, "KINDS", {"drawn": drawn})
    monkeypatch.setattr(campaign, "running_commands", nothing)
    assert campaign.main(["--trials", "3", "--seed", "7", "--only", "drawn"]) == 1
    printed = capsys.readouterr().out
    assert "FAULT drawn, seed 9: lost a step" in printed
    assert "python -m tests.campaign --only 'drawn' --seed 9 --trials 1" in printed
    assert printed.splitlines()[-1].split() == ["all", "3", "1", "1", "1"]
    ends = iter(["well"])
    assert campaign.main(["--trials", "1", "--only", "drawn"]) == 0


class nothing:
    """In the place of `running_commands`: no process is started."""

    def __init__(self, _: pathlib.Path) -> None:
        pass

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None
