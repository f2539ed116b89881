"""The calls that docs/walkthrough.md lists are the calls that a command makes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import jax
import pytest

from perl_jax.cli.main import main
from perl_jax.runtime import programs
from tests.paths import ORDERS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "walkthrough.md"
LENGTHS = [
    *("--data.task", ORDERS, "--data.train-size", "32", "--data.evaluation-size", "16"),
    *("--data.max-prompt-length", "8", "--data.max-response-length", "8"),
    *("--steps", "1", "--batch-size", "8", "--evaluate-every", "1", "--lora.rank", "5"),
]


class Reached(Exception):
    """Ends a run at its first call of `jax.value_and_grad`."""


def listed(job: str) -> list[str]:
    """The functions in the page's table of a job's calls."""
    part = PAGE.read_text().split(f"## {job}: the calls", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^\| `(perl_jax[\w.]+)` \|", part, flags=re.MULTILINE)


def made(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> list[str]:
    """The functions of perl_jax between the command and `jax.value_and_grad`, outermost first.

    Compiled programs, which JAX traces on the way, are left out.
    """
    found: list[str] = []

    def stop(*_, **__):
        frame = sys._getframe(1)
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if module.startswith("perl_jax.") and module != programs.__name__:
                found.insert(0, f"{module}.{frame.f_code.co_qualname}")
            frame = frame.f_back
        raise Reached

    monkeypatch.setattr(jax, "value_and_grad", stop)
    with pytest.raises(Reached):
        main(arguments)
    return found


def test_sft_makes_the_calls_that_the_page_lists(base, tmp_path, monkeypatch):
    run = ["--run", str(tmp_path / "run"), "--model", base]
    assert made(monkeypatch, ["sft", *run, *LENGTHS]) == listed("SFT")
    assert 0 < len(listed("SFT")) <= 6


def test_rl_makes_the_calls_that_the_page_lists(jobs, tmp_path, monkeypatch):
    run = ["--run", str(tmp_path / "run"), "--model", jobs.base, "--reward", str(jobs.reward)]
    assert made(monkeypatch, ["rl", *run, *LENGTHS]) == listed("RL")
    assert 0 < len(listed("RL")) <= 6
