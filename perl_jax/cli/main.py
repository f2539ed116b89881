"""The `perl-jax` command: one sub-command per job, with flags made from the job's config."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import pathlib
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

# Silences what TensorFlow's libraries, Orbax and absl print on standard error at import and at each
# checkpoint. Warnings of this package still show.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Transformers warns at import that PyTorch is missing, which this package does not need.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("absl").setLevel(logging.ERROR)
from perl_jax import __version__  # noqa: E402
from perl_jax.cli.help import GROUPS, description  # noqa: E402
from perl_jax.errors import Stopped, TrainingError, UserError, require  # noqa: E402
from perl_jax.runtime import platforms  # noqa: E402

platforms.use_cpu_if_no_accelerator()

import tyro  # noqa: E402


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Write report.html into a run's folder.

    Attributes:
        run: The folder of a job's run or of an experiment.
    """

    run: tyro.conf.Positional[str]


def _done(what: str, path: pathlib.Path) -> None:
    """Prints on standard error what was written and where, from the process that writes."""
    from perl_jax.runtime import hosts

    if hosts.is_writer():
        print(f"{what}: {path}", file=sys.stderr)


def _sft(config: Any) -> None:
    from perl_jax.training.commands import run_sft

    _done("policy", run_sft(config))


def _reward(config: Any) -> None:
    from perl_jax.training.commands import run_reward

    _done("reward", run_reward(config))


def _rl(config: Any) -> None:
    from perl_jax.training.commands import run_rl

    _done("policy", run_rl(config))


def _base(config: Any) -> None:
    from perl_jax.training.base import train_base

    _done("base", train_base(config))


def _evaluate(config: Any) -> None:
    from perl_jax.evaluation.compare import run_evaluate

    _done("evaluation", run_evaluate(config) / "evaluation.json")


def _generate(config: Any) -> None:
    from perl_jax.generation.text import run_generate

    for text in run_generate(config):
        print(text)


def _score(config: Any) -> None:
    from perl_jax.evaluation.score import run_score

    run_score(config)


def _export(config: Any) -> None:
    from perl_jax.hub.export import run_export

    done = run_export(config)
    note = f" ({done.note})" if done.note else ""
    _done(
        f"{config.format} export, read back with outputs within {done.difference:.2g}{note}",
        done.folder,
    )


def _import(config: Any) -> None:
    from perl_jax.hub.import_peft import run_import

    _done("adapter", run_import(config))


def _average(config: Any) -> None:
    from perl_jax.hub.average import run_average

    _done("adapter", run_average(config))


def _show(config: Any) -> None:
    from perl_jax.hub.show import show

    print(show(config))


def _dpo(config: Any) -> None:
    from perl_jax.training.commands import run_dpo

    _done("policy", run_dpo(config))


def _best_of(config: Any) -> None:
    from perl_jax.evaluation.best_of import run_best_of

    means = run_best_of(config)
    _done(
        ", ".join(f"{name} {value:.4g}" for name, value in means.items()),
        pathlib.Path(config.output),
    )


def _report(config: ReportConfig) -> None:
    from perl_jax.evaluation.report import write_report

    _done("report", write_report(pathlib.Path(config.run)))


def _plan(config: Any) -> None:
    import jax

    # A plan needs no accelerator; on a TPU host the chips stay free for running jobs.
    jax.config.update("jax_platforms", "cpu")
    from perl_jax.planning import command, search, text
    from perl_jax.runtime import files

    if config.search:
        plans = search.search(config, say=lambda line: print(line, file=sys.stderr))
        print(text.describe_search(plans))
    else:
        plans = [command.plan(config)]
        print(text.describe(plans[0]))
    if config.json is not None:
        values = [command.as_json(plan) for plan in plans]
        files.write_json(
            pathlib.Path(config.json).expanduser(), values if config.search else values[0]
        )


def _config(name: str) -> type:
    """Returns the config class of a command.

    It is imported on demand, so that the usage text and errors in a command's name come quickly.
    """
    from perl_jax.evaluation import best_of, compare, score
    from perl_jax.generation import text
    from perl_jax.hub import average, export, import_peft, show
    from perl_jax.planning.config import PlanConfig
    from perl_jax.training import base, commands

    return {
        "sft": commands.SFTCommand,
        "reward": commands.RewardCommand,
        "rl": commands.RLCommand,
        "dpo": commands.DPOCommand,
        "best-of": best_of.BestOfConfig,
        "base": base.BaseConfig,
        "evaluate": compare.EvaluateConfig,
        "generate": text.GenerateConfig,
        "score": score.ScoreConfig,
        "report": ReportConfig,
        "export": export.ExportConfig,
        "import": import_peft.ImportConfig,
        "average": average.AverageConfig,
        "show": show.ShowConfig,
        "plan": PlanConfig,
    }[name]


# Commands that can run in several processes together; the others run in one process.
TOGETHER = ("sft", "reward", "rl", "dpo", "best-of", "evaluate", "base")
# The function and the summary of each command.
COMMANDS: dict[str, tuple[Callable[[Any], None], str]] = {
    "sft": (_sft, "fit a policy to demonstrations"),
    "reward": (_reward, "fit a reward model to comparisons, labels or ratings"),
    "rl": (_rl, "improve a policy against rewards, by any of the policy gradients"),
    "dpo": (_dpo, "fit a policy to comparisons without a reward model"),
    "best-of": (_best_of, "the best of N samples by a reward"),
    "evaluate": (_evaluate, "compare a policy with its baseline on held-out prompts"),
    "generate": (_generate, "continue a prompt"),
    "score": (_score, "log-probabilities and rewards of given responses"),
    "report": (_report, "write a run's page"),
    "base": (_base, "train a small base model on the spot"),
    "export": (_export, "write an adapter for PEFT, or merged into a checkpoint"),
    "import": (_import, "read an adapter written by PEFT"),
    "average": (_average, "the weighted sum of adapters"),
    "show": (_show, "what an artefact is"),
    "plan": (_plan, "memory and cost on a TPU slice, by its real compiler"),
}


def _usage() -> str:
    """Returns the commands, grouped by what they are for."""
    width = max(map(len, COMMANDS))
    parts = [
        f"{title}\n" + "\n".join(f"  {name:<{width}}  {COMMANDS[name][1]}" for name in names)
        for title, names in GROUPS.items()
    ]
    usage = "usage: perl-jax COMMAND [options]"
    return "\n\n".join([usage, *parts, "perl-jax COMMAND --help explains every flag."])


def _connect(name: str) -> None:
    """Joins the other processes of a run if the environment names them.

    This must happen before any device is used. Raises UserError for a command that runs in one
    process.
    """
    from perl_jax.runtime import connecting, hosts

    settings = connecting.read_settings(os.environ)
    variables = f"{hosts.CLUSTER} and {', '.join(connecting.EXPLICIT)}"
    alone = f"{name} runs in one process; unset {variables} for it."
    require(settings is None or name in TOGETHER, alone)
    connecting.connect(name, settings)


def _failed(name: str, why: object, status: int) -> int:
    """Prints why a command failed, leaves the other processes, and returns the exit status."""
    from perl_jax.runtime import connecting

    print(f"perl-jax {name}: {why}", file=sys.stderr)
    return connecting.leave(status)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status.

    The statuses are: 0 success; 1 the run failed; 2 the user made an error; 130 interrupted from
    the keyboard; 141 the reader of standard output has closed it; 143 stopped by SIGTERM, with the
    state saved.

    If one of several processes fails, it ends without returning. The other processes cannot go on
    without it, because they wait for it in collective operations.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"perl-jax {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(
            f"perl-jax: there is no command {name!r}; commands: {', '.join(COMMANDS)}.",
            file=sys.stderr,
        )
        return 2
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    run, _ = COMMANDS[name]
    try:
        config_class = _config(name)
        summary = (config_class.__doc__ or "").partition("Attributes:")[0]
        config = tyro.cli(
            config_class,
            prog=f"perl-jax {name}",
            description=description(name, inspect.cleandoc(summary)),
            args=rest,
        )
        _connect(name)
        run(config)
    except UserError as error:
        return _failed(name, error, 2)
    except TrainingError as error:
        return _failed(name, error, 1)
    except Stopped as error:
        print(f"perl-jax {name}: {error}", file=sys.stderr)
        status = 143
    except KeyboardInterrupt:
        return _failed(name, "stopped; the same command resumes from the last checkpoint.", 130)
    except BrokenPipeError:
        # The reader has closed the pipe, as `| head` does. Standard output is replaced, so that
        # nothing is flushed into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        from perl_jax.runtime import connecting, hosts

        if not hosts.connected():
            raise
        if hosts.is_peer_failure(error):
            return _failed(name, connecting.LOST, 1)
        traceback.print_exception(error)
        return _failed(name, "this process failed, and the run with it.", 1)
    else:
        status = 0
    from perl_jax.runtime import connecting

    connecting.disconnect()
    return status
