"""A table of every program that a command runs on the devices, by the name under which JAX compiles
it.

A new jitted function must be entered here, and planned. A test compares the table with what the
commands compile, and with the pieces of their plans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

TRAINING = ("sft", "reward", "dpo", "rl")
_SLOTS = ("rl", "evaluate", "best-of")
COMMANDS = (*TRAINING, "evaluate", "best-of", "generate", "score", "export")


@dataclasses.dataclass(frozen=True)
class Known:
    """A program that a plan compiles.

    Attributes:
        piece: The name of its `Piece` in the plan.
        what: What it computes.
        commands: The commands that run it.
    """

    piece: str
    what: str
    commands: tuple[str, ...] = COMMANDS


# The largest array that an operation outside a program touches. rows: a number for each token of a
# batch. leaf: one leaf of an adapter. layer: one layer's matrix, on one device.
Size = Literal["rows", "leaf", "layer"]

PLANNED: dict[str, tuple[Known, ...]] = {
    # Loading.
    "write_piece": (
        Known("place", "writes a piece of a leaf, read from a file, into a device's part"),
    ),
    "sample_leaf": (Known("fingerprint", "the elements of a leaf that its fingerprint covers"),),
    "quantised": (Known("quantise", "a leaf of the base in fewer bits"),),
    "content_sums": (
        Known("checksums", "of a leaf that is saved, restored or loaded from an artefact"),
    ),
    # First values.
    "full_weights": (Known("full_weights", "full tuning's float32 weights, of a base", TRAINING),),
    "merged": (
        Known(
            "merged",
            "full tuning's start from an adapter: a copy of the base with it",
            ("dpo", "rl"),
        ),
    ),
    "begin": (Known("begin", "a copy of the roles, and the optimizers' first states", TRAINING),),
    "apply_to_layer": (
        Known("first values", "DoRA's magnitudes and PiSSA's pairs, of one layer", TRAINING),
    ),
    # A step.
    "learn": (Known("learn", "the update", TRAINING),),
    "reference": (
        Known("reference", "the reference's log-probabilities of comparisons", ("dpo",)),
    ),
    "sample": (
        Known(
            "sample",
            "responses, a whole batch at a time",
            ("rl", "evaluate", "best-of", "generate"),
        ),
    ),
    "merge": (
        Known(
            "merge",
            "with slots, in float32: a copy of the matrices that an adapter changes",
            _SLOTS,
        ),
    ),
    "vacant": (Known("vacant", "with slots: an empty cache", _SLOTS),),
    "admit": (Known("admit", "with slots: reads prompts into them", _SLOTS),),
    "decode": (Known("decode", "with slots: samples some tokens of each row", _SLOTS),),
    "fewer": (
        Known("fewer", "with slots: moves the unfinished rows into half as many slots", _SLOTS),
    ),
    "reward": (Known("reward", "scores of responses", ("rl", "evaluate", "best-of")),),
    "logprobs": (
        Known("logprobs", "of responses, by the policy and by the reference", ("rl", "evaluate")),
    ),
    "values": (Known("values", "of the states before each token", ("rl",)),),
    "assemble": (Known("assemble", "experience from what was measured on rollouts", ("rl",)),),
    "dealt": (Known("dealt", "the rows of each of several updates", ("rl",)),),
    "refresh": (Known("refresh", "the policy as the next reference", ("rl",)),),
    "measure": (Known("measure", "log-probabilities and scores of given responses", ("score",)),),
    # Measuring.
    "validate": (
        Known("validate", "sums of the objective over held-out rows", ("sft", "reward", "dpo")),
    ),
    "score": (
        Known("score", "scores of validation and test rows", ("reward",)),
        Known("score", "of an export and of the role that it was made of", ("export",)),
    ),
    "implicit": (Known("implicit", "implicit rewards of the test split", ("dpo",)),),
    "logits": (Known("logits", "of an export and of the role that it was made of", ("export",)),),
    "hidden": (
        Known(
            "hidden",
            "hidden states that tell how much of an adapter a merged export keeps",
            ("export",),
        ),
    ),
}
# Continuous batching on a GPU only: fuses the attention projections.
ELSEWHERE = ("fuse",)
# Operations that run outside a program -> the largest array that they may touch.
APART: dict[str, Size] = {
    **dict.fromkeys(
        ("copy", "convert_element_type", "broadcast_in_dim", "_uniform", "_normal", "true_divide"),
        "leaf",
    ),
    **dict.fromkeys(
        (
            "_threefry_seed",
            "_threefry_fold_in",
            "_threefry_split",
            "stage",
            "_reduce_sum",
            "_reduce_any",
            "_where",
            "clip",
            "subtract",
            "stack",
            "reshape",
            "slice",
        ),
        "rows",
    ),
    **dict.fromkeys(("add", "multiply", "matmul", "dynamic_slice", "squeeze"), "layer"),
}


def planned_for(command: str) -> set[str]:
    """Returns the names of the pieces that the plan of a command, such as `rl`, can have."""
    return {
        known.piece for group in PLANNED.values() for known in group if command in known.commands
    }


def unknown(names: Iterable[str], command: str) -> set[str]:
    """Returns those of the compiled programs' names that the tables of this module do not list for
    a command.

    Args:
        names: The names under which JAX compiled programs and operations.
        command: The command that was run, such as `rl`.
    """
    mine = {
        name for name, group in PLANNED.items() if any(command in known.commands for known in group)
    }
    return set(names) - mine - APART.keys() - set(ELSEWHERE)
