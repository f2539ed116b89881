"""What the trials share: a tiny model, runs without a fault, artefacts, and checks of an end."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from perl_jax.runs.metrics import read_metrics, without_timing
from tests.campaign.commands import Commands, Running
from tests.golden.runs import make_base
from tests.paths import ORDERS

STEPS = 4
DATA = (
    *("--data.task", ORDERS, "--data.train-size", "32", "--data.evaluation-size", "16"),
    *("--data.max-prompt-length", "8", "--data.max-response-length", "8"),
)
TRAINING = (
    *DATA,
    *("--lora.rank", "4", "--lora.dropout", "0.1", "--optimizer.name", "adamw"),
    *("--optimizer.learning-rate", "3e-3", "--batch-size", "8", "--evaluate-every", "2"),
    *("--checkpoint-every", "1", "--steps", str(STEPS)),
)
# What the command line documents: done, failed, the user's error, stopped.
STATUSES = (0, 1, 2, 130, 141, 143)
# More lines than any command prints that ends with a sentence, or runs a few steps.
LINES = 120


class Fault(Exception):
    """A trial found what must not be; the message says what."""


@dataclasses.dataclass
class Bench:
    """The folder and the commands of a campaign.

    Attributes:
        root: The folder; each trial has one of its own below.
        commands: Runs the commands.
        draw: The random numbers of the trial.
        trial: The trial's folder, empty when it begins.
    """

    root: pathlib.Path
    commands: Commands
    draw: random.Random = dataclasses.field(default_factory=random.Random)
    trial: pathlib.Path = pathlib.Path()

    def begin(self, seed: int) -> None:
        """Begins a trial: its random numbers are drawn from the seed, its folder is empty."""
        self.draw = random.Random(seed)
        self.trial = self.root / "trial"
        shutil.rmtree(self.trial, ignore_errors=True)
        self.trial.mkdir(parents=True)

    # What was made without a fault.

    @functools.cached_property
    def model(self) -> str:
        """The folder of the tiny base model."""
        return make_base(self.root / "model")

    def training(self, job: str, run: object) -> tuple[str, ...]:
        """Returns the arguments of a job that trains."""
        more = {
            "rl": ("--terms", '[{"kind": "length", "maximum": 3, "scale": 4}]', *RL),
        }.get(job, ())
        return (job, "--run", str(run), "--model", self.model, *TRAINING, *more)

    @functools.cached_property
    def whole(self) -> dict[str, list[dict[str, Any]]]:
        """Metrics of whole runs by job; filled by `metrics_of`."""
        return {}

    def metrics_of(self, job: str) -> list[dict[str, Any]]:
        """Returns the metrics of a job's run without a fault."""
        if job not in self.whole:
            run = self.root / f"whole-{job}"
            self.expect(self.training(job, run))
            self.whole[job] = metrics(run)
        return self.whole[job]

    def artefact(self, job: str) -> pathlib.Path:
        """Returns the artefact of a job's run without a fault: policy or reward."""
        self.metrics_of(job)
        role = "reward" if job == "reward" else "policy"
        return self.root / f"whole-{job}" / "adapters" / role

    @functools.cached_property
    def peft(self) -> pathlib.Path:
        """A PEFT folder, exported from the policy of SFT."""
        folder = self.root / "peft"
        self.expect(
            (
                *("export", self.artefact("sft"), "--model", self.model),
                *("--format", "peft", "--to", folder),
            )
        )
        return folder

    # Commands and their ends.

    def expect(self, arguments: Sequence[object], **how: Any) -> Running:
        """Runs a command that must succeed; raises Fault if it does not."""
        running = self.commands.start(arguments, **how)
        status = running.wait()
        if status != 0:
            raise Fault(f"{arguments[0]} ended with {status}: {running.printed()[-1500:]}")
        self.check_said(running)
        return running

    def ended(
        self,
        running: Running,
        allowed: Sequence[int] = STATUSES,
        own: pathlib.Path | None = None,
    ) -> str:
        """Waits for the end of a command with a fault; returns `well` or `refused`.

        Raises Fault if it takes too long, ends with a status that is not allowed, or says more than
        a sentence.

        Args:
            running: The command.
            allowed: Statuses that it may end with.
            own: A file of the user's, whose own errors may be shown with their traceback.
        """
        status = running.wait()
        said = running.printed()
        if status is None:
            raise Fault(f"it did not end in time: {said[-1000:]}")
        if status not in allowed:
            raise Fault(f"status {status}: {said[-1500:]}")
        self.check_said(running, own)
        if status in (1, 2) and not said.strip():
            raise Fault(f"status {status} without a word")
        return "well" if status == 0 else "refused"

    def check_said(self, running: Running, own: pathlib.Path | None = None) -> None:
        """Raises Fault for a traceback (but one of the user's own file), a log of C++, or very much
        text.
        """
        said = running.printed()
        if own is not None and f'File "{own}"' in said:
            said = said.replace("Traceback (most recent call last)", "", 1)
        for sign in ("Traceback (most recent call last)", "*** Check failure", "terminate called"):
            if sign in said:
                raise Fault(f"it printed {sign!r}: ...{said[-1500:]}")
        lines = re.split(r"[\r\n]+", said)
        if len(lines) > LINES:
            raise Fault(f"it printed {len(lines)} lines: {said[:600]} ... {said[-600:]}")
        if longest := max((line for line in lines if len(line) > 3000), key=len, default=""):
            raise Fault(f"it printed a line of {len(longest)} characters: {longest[:300]}")

    def check_same(self, job: str, run: object) -> None:
        """Raises Fault unless a run's metrics equal those of the run without a fault."""
        expected, found = self.metrics_of(job), metrics(run)
        if found != expected:
            steps = [row.get("step") for row in found]
            first = next(
                (a["step"] for a, b in zip(expected, found, strict=False) if a != b), "none"
            )
            raise Fault(f"metrics differ: steps {steps}, the first that differs is {first}")

    def resumed(self, job: str, run: object, **how: Any) -> None:
        """Runs a job's command again to its end and compares with the run without a fault."""
        self.expect(self.training(job, run), **how)
        self.check_same(job, run)


RL = (
    *("--algorithm.name", "rloo", "--max-mismatch", "10", "--validation-prompts", "8"),
    *("--lora.dropout", "0"),
)


def metrics(run: object) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics without what depends on the clock."""
    from perl_jax.runtime import files

    return without_timing(read_metrics(files.path_of(str(run)) / "metrics.jsonl"))


def write_rows(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> pathlib.Path:
    """Writes rows as JSON Lines and returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
