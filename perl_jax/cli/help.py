"""The beginning of the help texts: groups of commands, and the flags that most runs need."""

from __future__ import annotations

from collections.abc import Collection

# The commands of each group, in the order of the usage text.
GROUPS: dict[str, tuple[str, ...]] = {
    "Train": ("sft", "reward", "dpo", "rl", "base"),
    "Use and measure": ("generate", "score", "evaluate", "best-of", "report"),
    "Artefacts": ("export", "import", "average", "show"),
    "Plan": ("plan",),
}

_MODEL = {"--model": "a Hugging Face folder, or a name on the hub"}
_ROWS = {
    "--data.task": "jsonl (JSON Lines), or PATH.py:NAME for a task made in Python",
    "--data.data-dir": "the file or folder of the rows",
}
_LENGTHS = {
    "--data.max-prompt-length": "tokens of a prompt",
    "--data.max-response-length": "tokens of a response",
}
_TRAINING = {
    **_MODEL,
    "--run": "the run's folder; the same command resumes it",
    **_ROWS,
    **_LENGTHS,
    "--steps": "number of steps",
    "--batch-size": "rows of a step",
    "--optimizer.learning-rate": "default: by the tuning and the model's width",
}
_ADAPTER = {"--lora.rank": "rank of the adapter"}
_REWARD = {
    "--reward": "folders of reward artefacts",
    "--terms": "other rewards: rules, Python functions, judges",
}
# Options of the command line itself, which are no settings.
OPTIONS = {
    "--config": "a YAML or JSON file with settings, such as a run's config.json; flags go first",
    "--overwrite": "replace what the command would refuse to touch: asks; --overwrite yes does not",
}
# The flags that most runs of a command need, with a short explanation each.
FIRST: dict[str, dict[str, str]] = {
    "sft": {**_TRAINING, **_ADAPTER},
    "reward": {**_TRAINING, **_ADAPTER, "--objective": "pairwise, pointwise or regression"},
    "dpo": {
        **_TRAINING,
        "--policy": "the policy artefact to start from",
        "--loss": "dpo, ipo or orpo (comparisons), or kto (labels)",
    },
    "rl": {
        **_MODEL,
        "--run": "the run's folder; the same command resumes it",
        **_ROWS,
        "--policy": "the policy artefact to start from",
        **_REWARD,
        "--algorithm.name": "reinforce, rloo, grpo, ppo, online-dpo, ...",
        "--steps": "number of steps",
        "--batch-size": "responses of a step",
        "--kl.beta": "weight of the KL to the reference",
        "--show-samples": "responses printed at every validation; 0 for none",
    },
    "evaluate": {
        **_MODEL,
        "--run": "the folder that evaluation.json and its samples go to",
        "--policy": "the policy artefact",
        "--baseline": "the artefact to compare with; default: the base",
        **_ROWS,
        **_REWARD,
        "--judge": "reward artefacts that decide wins",
    },
    "best-of": {
        **_MODEL,
        "--policy": "the policy artefact to sample from",
        **_REWARD,
        "--n": "responses to each prompt",
        "--output": "the file to write",
        **_ROWS,
    },
    "generate": {
        **_MODEL,
        "--adapter": "a policy artefact; default: the base",
        "--prompt": "the text to continue",
        "--max-new-tokens": "tokens of the continuation",
        "--temperature": "0: greedy",
    },
    "score": {
        **_MODEL,
        "--adapter": "an artefact of any role; default: the base",
        "--input": "a JSON Lines file with prompt and response",
        "--output": "the file to write; default: standard output",
    },
    "export": {
        **_MODEL,
        "--format": "peft (an adapter) or merged (a whole checkpoint)",
        "--to": "the folder to write",
    },
    "import": {
        **_MODEL,
        "--to": "the artefact to write",
    },
    "average": {
        "--weights": "one number for each; default: the mean",
        **_MODEL,
        "--to": "the artefact to write",
    },
    "base": {**_TRAINING, "--width": "size of the hidden states", "--layers": "number of layers"},
}


def description(name: str, summary: str, options: Collection[str] = ()) -> str:
    """Returns a command's summary, followed by the flags that most runs need and by options of the
    command line, one per line.

    Args:
        name: The command; one that is not in FIRST has no flags here.
        summary: The text of the config's docstring before its attributes.
        options: The keys of OPTIONS that the command has.
    """
    parts = [summary]
    first = FIRST.get(name, {})
    for title, flags in (
        ("Most runs need no more than", first),
        ("Options that are no settings", {option: OPTIONS[option] for option in options}),
    ):
        width = max(map(len, flags), default=0)
        lines = [f"  {flag:<{width}}  {text}" for flag, text in flags.items()]
        parts += ["", title, *lines] if lines else []
    if "--terms" in first:
        # Imported for the commands that have terms alone, because NumPy takes time to import.
        from perl_jax.rewards import compose

        common = ", ".join(compose.COMMON[1:])
        parts += ["", f"Kinds of --terms and their fields, besides {common}"]
        parts += [compose.kinds_text()]
    return "\n".join(parts if len(parts) == 1 else [*parts, "", "All flags:"])
