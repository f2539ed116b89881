"""The `perl-jax` command: one sub-command per job, with flags made from the job's config."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
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
logging.getLogger("absl").setLevel(logging.CRITICAL)
from perl_jax import __version__  # noqa: E402
from perl_jax.cli.help import GROUPS, description  # noqa: E402
from perl_jax.cli.interrupts import Interrupts  # noqa: E402
from perl_jax.errors import (  # noqa: E402
    Interrupted,
    Occupied,
    Stopped,
    TrainingError,
    UserError,
    require,
)
from perl_jax.runtime import platforms  # noqa: E402

platforms.use_cpu_if_no_accelerator()

import tyro  # noqa: E402

from perl_jax.cli import config_file  # noqa: E402


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Write report.html into a run's folder.

    Attributes:
        run: The folder of a job's run or of an experiment.
    """

    run: tyro.conf.Positional[str]


def _report(config: ReportConfig) -> str:
    """Writes report.html into the folder `config.run`; returns the page's path."""
    # Imported for this command alone, because Matplotlib takes long to import.
    from perl_jax.evaluation.report import write_report

    return write_report(config.run)


def _plan(config: Any) -> None:
    """Plans a job without an accelerator; prints the plan, and writes it as JSON if asked to.

    With `config.search` it prints the plans of several layouts, and each try on standard error.
    """
    import jax

    # A plan needs no accelerator; on a TPU host the chips stay free for running jobs.
    jax.config.update("jax_platforms", "cpu")
    from perl_jax.planning import command, search, text
    from perl_jax.runtime import files, outputs

    if config.json is not None:
        outputs.check_writable(config.json)
    if config.search:
        plans = search.search(config, say=lambda line: print(line, file=sys.stderr))
        print(text.describe_search(plans))
    else:
        plans = [command.plan(config)]
        print(text.describe(plans[0]))
    if config.json is not None:
        values = [command.as_json(plan) for plan in plans]
        files.write_json(config.json, values if config.search else values[0])


def _command(name: str) -> tuple[type, Callable[[Any], Any]]:
    """Returns the config class of a command and the function that runs such a config.

    Both are imported on demand, so that the usage text and an error in the command's name come
    quickly.

    Args:
        name: A key of COMMANDS.
    """
    from perl_jax.evaluation import best_of, compare, score
    from perl_jax.generation import text
    from perl_jax.hub import average, export, import_peft, show
    from perl_jax.planning.config import PlanConfig
    from perl_jax.training import base, commands

    return {
        "sft": (commands.SFTCommand, commands.run_sft),
        "reward": (commands.RewardCommand, commands.run_reward),
        "rl": (commands.RLCommand, commands.run_rl),
        "dpo": (commands.DPOCommand, commands.run_dpo),
        "best-of": (best_of.BestOfConfig, best_of.run_best_of),
        "base": (base.BaseConfig, base.train_base),
        "evaluate": (compare.EvaluateConfig, compare.run_evaluate),
        "generate": (text.GenerateConfig, text.run_generate),
        "score": (score.ScoreConfig, score.run_score),
        "report": (ReportConfig, _report),
        "export": (export.ExportConfig, export.run_export),
        "import": (import_peft.ImportConfig, import_peft.run_import),
        "average": (average.AverageConfig, average.run_average),
        "show": (show.ShowConfig, show.show),
        "plan": (PlanConfig, _plan),
    }[name]


def _print_result(name: str, config: Any, result: Any) -> None:
    """Prints what the function of a command returned.

    Texts go to standard output. What was written and where goes to standard error, from the first
    process only.

    Args:
        name: The command, a key of COMMANDS.
        config: The command's config.
        result: The value returned by the function that `_command` names; None prints nothing.
    """
    from perl_jax.runtime import hosts

    if result is None:
        return
    match name:
        case "generate":
            for text in result:
                print(text)
            return
        case "show":
            print(result)
            return
        case "evaluate":
            what, path = "evaluation", result / "evaluation.json"
        case "best-of":
            what = ", ".join(f"{measure} {value:.4g}" for measure, value in result.items())
            path = config.output
        case "export":
            note = f" ({result.note})" if result.note else ""
            what = (
                f"{config.format} export, read back with outputs within "
                f"{result.difference:.2g}{note}"
            )
            path = result.folder
        case "import" | "average":
            what, path = "adapter", result
        case "sft" | "dpo" | "rl":
            what, path = "policy", result
        case _:
            what, path = name, result
    if hosts.is_writer():
        print(f"{what}: {path}", file=sys.stderr)


# Commands that can run in several processes together; the others run in one process.
TOGETHER = ("sft", "reward", "rl", "dpo", "best-of", "evaluate", "base")
# Commands whose settings can come from a file; the others have arguments without a name.
FROM_FILES = (
    "sft",
    "reward",
    "dpo",
    "rl",
    "base",
    "generate",
    "score",
    "evaluate",
    "best-of",
    "plan",
)
# Commands that refuse to touch what is there already.
OVERWRITING = (*GROUPS["Train"], "best-of", "export", "import", "average")
# The summary of each command.
COMMANDS: dict[str, str] = {
    "sft": "fit a policy to demonstrations",
    "reward": "fit a reward model to comparisons, labels or ratings",
    "rl": "improve a policy against rewards, by a policy gradient or online DPO",
    "dpo": "fit a policy to preferences without a reward model: DPO, IPO, KTO, ORPO",
    "best-of": "the best of N samples by a reward",
    "evaluate": "compare a policy with its baseline on held-out prompts",
    "generate": "continue a prompt",
    "score": "log-probabilities and rewards of given responses",
    "report": "write a run's page",
    "base": "train a small base model on the spot",
    "export": "write an adapter for PEFT, or merged into a checkpoint",
    "import": "read an adapter written by PEFT",
    "average": "the weighted sum of adapters",
    "show": "what an artefact is",
    "plan": "memory and cost on a TPU slice, by its real compiler",
}


def _usage() -> str:
    """Returns the usage text: all commands with their summaries, in groups."""
    width = max(map(len, COMMANDS))
    parts = [
        f"{title}\n" + "\n".join(f"  {name:<{width}}  {COMMANDS[name]}" for name in names)
        for title, names in GROUPS.items()
    ]
    usage = "usage: perl-jax COMMAND [options]"
    return "\n\n".join([usage, *parts, "perl-jax COMMAND --help explains every flag."])


def _config(name: str, config_class: type, arguments: list[str]) -> Any:
    """Returns the config of a command line; a file given by `--config` has its defaults.

    Args:
        name: The command.
        config_class: Its config's class.
        arguments: The flags.

    Raises:
        UserError: The file cannot be read or does not fit the command, or settings do not fit each
            other.
        SystemExit: A flag is wrong, or --help is asked for.
    """
    source = None
    if name in FROM_FILES:
        source, arguments = config_file.take(arguments)
    summary = (config_class.__doc__ or "").partition("Attributes:")[0]
    return tyro.cli(
        config_class,
        prog=f"perl-jax {name}",
        description=description(
            name,
            inspect.cleandoc(summary),
            [
                option
                for option, names in (("--config", FROM_FILES), ("--overwrite", OVERWRITING))
                if name in names
            ],
        ),
        args=arguments,
        default=None if source is None else config_file.read_defaults(name, config_class, source),
    )


def _connect(name: str) -> None:
    """Joins the other processes of a run if environment variables name them.

    This must happen before any device is used.

    Args:
        name: The command.

    Raises:
        UserError: If there are several processes and the command is one that runs in one process.
    """
    from perl_jax.runtime import connecting, hosts

    settings = connecting.read_settings(os.environ)
    variables = f"{hosts.CLUSTER} and {', '.join(connecting.EXPLICIT)}"
    alone = f"{name} runs in one process; unset {variables} for it."
    require(settings is None or name in TOGETHER, alone)
    connecting.connect(name, settings)


def _failed(name: str, why: object, status: int) -> int:
    """Prints why a command failed and leaves the run's other processes; returns the exit status.

    One of several connected processes ends here, without returning.

    Args:
        name: The command.
        why: The message, or an error with it.
        status: The exit status.
    """
    from perl_jax.runtime import connecting

    print(f"perl-jax {name}: {why}", file=sys.stderr)
    return connecting.leave(status)


def _unexpected(name: str, error: Exception) -> int:
    """Prints why a command failed, judged by an error of any type; returns the exit status.

    The loss of another process comes first, because it can lie beneath any other error. An error of
    which nothing is known is raised again in a process that is alone.

    Args:
        name: The command.
        error: The error.
    """
    from perl_jax.runtime import connecting, faults, hosts

    if hosts.connected() and hosts.is_peer_failure(error):
        return _failed(name, connecting.LOST, 1)
    if isinstance(error, UserError):
        passing = isinstance(error, faults.FileError) and error.passing
        return _failed(name, error, 1 if passing else 2)
    # Disks and buckets also fail where this package calls a library.
    fault = faults.sentence(error)
    if fault is not None:
        return _failed(name, fault, 1)
    if isinstance(error, MemoryError) or str(error).startswith("RESOURCE_EXHAUSTED"):
        why = (str(error).strip() or "no memory is left").splitlines()[0][:300]
        return _failed(
            name, f"out of memory ({why}); smaller batches or shorter lengths need less.", 1
        )
    if not hosts.connected():
        raise error
    traceback.print_exception(error)
    return _failed(name, "this process failed, and the run with it.", 1)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status.

    The statuses are: 0 success; 1 the run failed; 2 the user made an error; 130 stopped by Ctrl-C
    (in a training loop with the state saved, unless it came twice); 141 the reader of standard
    output has closed it; 143 stopped by SIGTERM, with the state saved.

    If one of several processes fails, it ends without returning. The other processes cannot
    continue without it, because they wait for it in collective operations.

    Args:
        arguments: The command's name and its flags; None: those of this process.
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
    if rest in (["-V"], ["--version"]):
        print(f"perl-jax {__version__}")
        return 0
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    interrupts = Interrupts(name, resumes=name in GROUPS["Train"])
    try:
        with interrupts:
            config_class, run = _command(name)
            # Imported here, because it imports much.
            from perl_jax.cli import overwrite

            mode, rest = overwrite.take(rest) if name in OVERWRITING else (None, rest)
            config = _config(name, config_class, rest)
            _connect(name)
            with overwrite.overwriting(name, mode):
                result = run(config)
            _print_result(name, config, result)
    except Occupied as error:
        instead = ", or --overwrite to replace what is there." if name in OVERWRITING else "."
        return _failed(name, str(error).removesuffix(".") + instead, 2)
    except TrainingError as error:
        return _failed(name, error, 1)
    except Stopped as error:
        print(f"perl-jax {name}: {error}", file=sys.stderr)
        status = 143
    except Interrupted as error:
        print(f"perl-jax {name}: {error}", file=sys.stderr)
        status = 130
    except KeyboardInterrupt:
        return _failed(name, interrupts.sentence, 130)
    except BrokenPipeError:
        # The reader has closed the pipe, as `| head` does. Standard output is replaced, so that
        # nothing is flushed into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        return _unexpected(name, error)
    else:
        status = 0
    from perl_jax.runtime import connecting

    try:
        connecting.disconnect()
    except Exception as error:
        return _unexpected(name, error)
    return status
