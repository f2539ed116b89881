"""Contenders at the same work in turns, round after round, one at a time.

A contender is a script that is run as

    python SCRIPT --work FOLDER --job JOB [--tuning full]

by the Python of its own environment, and speaks JSON lines (`contender.Protocol` is its side of
this):

- Once it has loaded the work (`work.py`) and taken enough steps for every compilation to be over,
  it prints
  {"ready": true, "name": NAME, "versions": {PACKAGE: VERSION}, "settings": TEXT} and, where it can,
  "compiled_mib": {PROGRAM: M}
- For each line "step" on its standard input it takes one step and prints
  {"seconds": S, "parts": {NAME: S}, "tokens": N, "peak_mib": M} and, where it can,
  "processor_seconds": S
- It ends when its standard input does. Only these lines go to its standard output.

seconds: from the line to the end of the step, reading and batching the rows in it; the driver's own
clock must agree. parts: any of generate, score, reference, learn and others; a part that cannot be
told apart is left out. tokens: `work.TOKENS[JOB]`, counted by what was really seen or sampled.
peak_mib: the process's largest resident memory since it began and that of each process it started,
as a sum; on a GPU what its library had of the device's at most. processor_seconds: of all their
threads, for machines that other work shares. compiled_mib: memory by program as the compiler
accounts for it, with what stays resident meanwhile (`peak_bytes_by_program` of a run's cost.json).

A step by job; adapters are of rank 8, alpha 16, on q, k, v and o, alone trained (with a scalar head
for rewards):

    reward-equal, reward-ragged   an update of a reward model on 8 pairs, Bradley-Terry
    rl-model                      4 samples of 128 tokens for each of 8 prompts at temperature 1, no
    early end, rewards from
                                  a model of the same shape, KL weight 0.05, RLOO, one update from
                                  the 32 samples
    rl-function                   the same with `contender.even_words` for rewards, GRPO
    generate                      the sampling alone, by a policy whose adapters may be merged

Contenders start one after another and wait for their lines together; each round goes the other way
round, after a pause in which threads that spin for more work go to sleep. A turn is two steps, of
which the second counts.

CONTEST_SIZE=1b and 8b (`work.SIZES`) are for one GPU, whose memory must hold all contenders of a
job beside each other; --contenders says which. Weights and activations are bfloat16 there, and
environments have CUDA. What the contenders' best settings are has been tried on a CPU alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ceiling
import report
import work

HERE = pathlib.Path(__file__).absolute().parent
PAUSE_SECONDS = 0.5
LAST_LINES = 12
VARIABLES = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CONTEST_SIZE": work.NAME}
if work.SIZE.device == "cpu":
    # Everybody's memory comes in large pages where Linux has them: fewer faults when a step's room
    # is taken anew.
    VARIABLES["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
else:
    # JAX would take three quarters of the memory for itself at once.
    VARIABLES["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


@dataclasses.dataclass(frozen=True)
class Contender:
    """environment: the name of its environment, and requirements, pip's words for what that holds.
    tuning: lora or full. variables: of its process.
    """

    script: str
    environment: str
    requirements: tuple[str, ...]
    jobs: tuple[str, ...] = tuple(work.JOBS)
    tuning: str = "lora"
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)


# The CPU build of torch is enough where there is no GPU.
TRL = (
    "trl==1.16.0",
    "peft==0.21.2",
    "transformers==5.24.0",
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "torch==2.13.0",
)
TUNIX = (
    *(
        "google-tunix==0.1.7",
        "qwix==0.1.8",
        "jax==0.10.2",
        "jaxlib==0.10.2",
        "flax==0.12.8",
        "optax==0.2.8",
    ),
    *("orbax-checkpoint==0.12.8", "transformers==5.12.1"),
)
ROOT = HERE.parents[2]
# As its users have it: without the tests' torch, which transformers would load.
PERL_JAX = ("-c", str(ROOT / "constraints.txt"), "-e", str(ROOT))
SUFFIX = ""
if work.SIZE.device == "gpu":
    SUFFIX, PERL_JAX, TUNIX = (
        "_gpu",
        (*PERL_JAX[:-1], f"{ROOT}[cuda]"),
        (*TUNIX, "jax[cuda13]==0.10.2"),
    )
CONTENDERS = {
    "perl_jax": Contender("contender_perl_jax.py", "perl_jax" + SUFFIX, PERL_JAX),
    "trl": Contender("contender_trl.py", "trl" + SUFFIX, TRL),
    "tunix": Contender("contender_tunix.py", "tunix" + SUFFIX, TUNIX, ("rl-function",)),
    # Everything trained in the place of adapters.
    "perl_jax_full": Contender(
        "contender_perl_jax.py", "perl_jax" + SUFFIX, PERL_JAX, tuning="full"
    ),
}
PEERS = ("perl_jax", "trl", "tunix")


class ContestError(Exception):
    """What went wrong, in a sentence for the user."""


def environment(
    name: str, requirements: Sequence[str], folder: pathlib.Path | None
) -> pathlib.Path:
    """The Python of a virtual environment with these requirements, made unless it is there; the
    marker is written last.

    folder: None is the Python that runs this, with what it has.
    """
    if folder is None:
        return pathlib.Path(sys.executable)
    home = folder.absolute() / name
    python, marker = home / "bin" / "python", home / "installed.txt"
    local = hashlib.sha256(
        b"".join((ROOT / file).read_bytes() for file in ("constraints.txt", "setup.py"))
    ).hexdigest()
    wanted = "\n".join(
        (platform.python_version(), *requirements, *((local,) if requirements == PERL_JAX else ()))
    )
    if not (marker.exists() and marker.read_text() == wanted):
        print(f"installing {', '.join(requirements)} under {home}", file=sys.stderr)
        venv.create(home, clear=True, with_pip=True)
        if subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *requirements], check=False
        ).returncode:
            raise ContestError(
                f"pip could not install the environment of {name}; its own words are above."
            )
        marker.write_text(wanted)
    return python


class Running:
    """A contender's process. A death or a line that is none of the protocol's is a ContestError
    with its last words.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | pathlib.Path],
        variables: Mapping[str, str],
        log: pathlib.Path,
    ):
        self.name, self.log = name, log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | VARIABLES | variables,
            )
        self.ready: dict[str, Any] = {}

    def warm_up(self) -> None:
        """Waits for the ready line."""
        self.ready = self.read("its ready line")
        if self.ready.get("ready") is not True or {"versions", "settings"} - self.ready.keys():
            raise ContestError(
                f"The contender {self.name} said {self.ready} in the place of its ready line."
            )

    def step(self, tokens: int) -> dict[str, Any]:
        """What the contender says of one step, which must have that many tokens, and `wall_seconds`
        by the clock here.
        """
        began = time.perf_counter()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        said = self.read("a step's line")
        wall = time.perf_counter() - began
        missing = {"seconds", "parts", "tokens", "peak_mib"} - said.keys()
        if missing:
            raise ContestError(
                f"The contender {self.name} said {said} of a step, without "
                f"{', '.join(sorted(missing))}."
            )
        if said["tokens"] != tokens:
            raise ContestError(
                f"The contender {self.name} had {said['tokens']} tokens in a step where the work "
                f"has {tokens}."
            )
        if abs(wall - said["seconds"]) > 0.1 + 0.02 * wall:
            raise ContestError(
                f"The contender {self.name} says {said['seconds']:.2f} s for a step that took "
                f"{wall:.2f} s here."
            )
        return said | {"wall_seconds": wall}

    def read(self, what: str) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            words = "\n".join(self.log.read_text(errors="replace").splitlines()[-LAST_LINES:])
            raise ContestError(
                f"The contender {self.name} ended with status {status} before {what}; its last "
                f"lines were:\n{words}"
            )
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            raise ContestError(
                f"The contender {self.name} printed {line[:200]!r} in the place of {what}."
            ) from None

    def close(self) -> None:
        """Ends its input, and the process where that does not."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def started(
    job: str, names: Sequence[str], options: argparse.Namespace
) -> Iterator[dict[str, Running]]:
    """The contenders, ready, in the order of their names."""
    with tempfile.TemporaryDirectory() as logs, contextlib.ExitStack() as stack:
        running = {}
        for name in names:
            contender = CONTENDERS[name]
            python = environment(
                contender.environment, contender.requirements, options.environments
            )
            command = [
                python,
                HERE / contender.script,
                "--work",
                options.work.absolute(),
                "--job",
                job,
            ]
            # Not every contender knows of anything but adapters.
            command += ["--tuning", contender.tuning] if contender.tuning != "lora" else []
            print(f"{job}: {name} is warming up", file=sys.stderr)
            running[name] = Running(
                name, command, contender.variables, pathlib.Path(logs) / f"{name}.txt"
            )
            stack.callback(running[name].close)
            running[name].warm_up()
        yield running


def alternate(
    running: Mapping[str, Running], rounds: int, tokens: int
) -> tuple[dict[str, list[dict[str, Any]]], ceiling.Rates | None]:
    """Each contender's steps, in turns, and the best rates of a CPU between rounds."""
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
    rates = []
    for number in range(rounds):
        time.sleep(PAUSE_SECONDS)
        rates += [ceiling.measure()] if work.SIZE.device == "cpu" else []
        for name in list(running) if number % 2 == 0 else reversed(running):
            time.sleep(PAUSE_SECONDS)
            # One that does not count: while a process waits, virtual machines give the memory that
            # it freed to their host, and fetching it back took up to half of a step. In training a
            # step follows a step.
            running[name].step(tokens)
            steps[name].append(running[name].step(tokens))
        seconds = ", ".join(f"{name} {taken[-1]['seconds']:.2f} s" for name, taken in steps.items())
        print(f"round {number + 1} of {rounds}: {seconds}", file=sys.stderr)
    return steps, ceiling.best(rates) if rates else None


def gpu(options: argparse.Namespace) -> dict[str, Any]:
    """The GPU's name and rates (`ceiling_gpu.py`), by perl_jax's environment."""
    python = environment("perl_jax" + SUFFIX, PERL_JAX, options.environments)
    said = subprocess.run(
        [python, HERE / "ceiling_gpu.py"],
        capture_output=True,
        text=True,
        env=os.environ | VARIABLES,
        check=False,
    )
    if said.returncode:
        raise ContestError(
            f"The GPU's rates could not be measured; the last words were:\n{said.stderr[-2000:]}"
        )
    return json.loads(said.stdout.splitlines()[-1])


def play(
    job: str, names: Sequence[str], options: argparse.Namespace, device: dict[str, Any] | None
) -> dict[str, Any]:
    """A job's contest: its raw numbers, for `report.text` and for the JSON file."""
    with started(job, names, options) as running:
        steps, rates = alternate(running, options.rounds, work.TOKENS[job])
        said = {
            name: {
                "ready": running[name].ready,
                "tuning": CONTENDERS[name].tuning,
                "steps": steps[name],
            }
            for name in names
        }
    rates = rates or ceiling.Rates(device["operations"], device["bytes"])
    counted = {
        name: {
            tuning: [dataclasses.asdict(phase) for phase in ceiling.phases(job, tuning, shared)]
            for tuning in ("lora", "full")
        }
        for name, shared in (("phases", True), ("phases_rows_alone", False))
    }
    return {"job": job, "rates": dataclasses.asdict(rates), **counted, "contenders": said}


def chosen(job: str, wanted: Sequence[str]) -> list[str]:
    """The wanted contenders that take part in a job."""
    unknown = sorted(set(wanted) - set(CONTENDERS))
    if unknown:
        raise ContestError(
            f"There is no contender {', '.join(unknown)}; there are {', '.join(CONTENDERS)}."
        )
    return [name for name in wanted if job in CONTENDERS[name].jobs]


def main(
    description: str | None, jobs: Sequence[str], rounds: int, contenders: Sequence[str] = PEERS
) -> None:
    """The command line of a benchmark: its jobs, one after another."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="steps of each contender")
    parser.add_argument("--jobs", default=",".join(jobs), help="comma-separated")
    parser.add_argument(
        "--contenders",
        default=",".join(contenders),
        help="comma-separated; the first is what others are compared with",
    )
    parser.add_argument(
        "--work",
        type=pathlib.Path,
        default=pathlib.Path("runs/contest"),
        help="folder for the model and the rows",
    )
    environments = pathlib.Path("runs/environments")
    parser.add_argument(
        "--environments",
        type=pathlib.Path,
        default=environments,
        help="folder for the contenders' packages",
    )
    parser.add_argument(
        "--installed",
        action="store_true",
        help="no environments: this Python and what is installed for it, for machines without a "
        "network",
    )
    parser.add_argument("--json", type=pathlib.Path, help="file for all numbers")
    options = parser.parse_args()
    options.environments = None if options.installed else options.environments
    try:
        unknown = sorted(set(options.jobs.split(",")) - set(jobs))
        if unknown or options.rounds < 1:
            raise ContestError(f"Jobs must be of {', '.join(jobs)}, rounds 1 or more.")
        work.write(options.work)
        device = gpu(options) if work.SIZE.device == "gpu" else None
        played = {
            "machine": report.machine() | {"gpu": device and device["device"]},
            "size": work.NAME,
            "contests": [],
        }
        print(report.machine_text(played["machine"]))
        for job in options.jobs.split(","):
            names = chosen(job, options.contenders.split(","))
            if not names:
                print(f"{job}: none of these contenders takes part")
                continue
            played["contests"].append(play(job, names, options, device))
            print(report.text(played["contests"][-1]), flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(played, indent=1))
    except ContestError as error:
        sys.exit(str(error))
