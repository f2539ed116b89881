"""Every program that a command runs on the devices, by the name under which JAX compiles it.

A new jitted function has to be entered here, and planned: a test compares this table with what the
commands compile, and with the pieces that they are planned from.
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
    """A program that a plan compiles: the name of its piece, what it does, and the commands that
    run it.
    """

    piece: str
    what: str
    commands: tuple[str, ...] = COMMANDS


# How large what an operation outside a program touches can be. rows: a number for each token of a
# batch. leaf: one leaf of an adapter. layer: one layer's matrix, on one device.
Size = Literal["rows", "leaf", "layer"]

PLANNED: dict[str, tuple[Known, ...]] = {
    # Loading.
    "write_piece": (Known("place", "a piece of a leaf from a file into a device's part"),),
    "sample_leaf": (Known("fingerprint", "the elements of a leaf that its fingerprint is of"),),
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
    "on_layer": (
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
    "vacant": (Known("vacant", "with slots: nobody's keys and values", _SLOTS),),
    "admit": (Known("admit", "with slots: prompts read into them", _SLOTS),),
    "decode": (Known("decode", "with slots: some tokens of each row", _SLOTS),),
    "fewer": (Known("fewer", "with slots: the rows that go on, in half as many", _SLOTS),),
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
# With slots, on a CPU and on a GPU alone: the base's layers one by one, attention's projections
# beside each other.
ELSEWHERE = ("part", "fuse")
# Operations that run outside a program, and the sizes that they may have.
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
            "unstack",
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
    """Names of the pieces that a command's plan can have."""
    return {
        known.piece for group in PLANNED.values() for known in group if command in known.commands
    }


def unknown(names: Iterable[str], command: str) -> set[str]:
    """Compiled names that this table does not have for a command."""
    mine = {
        name for name, group in PLANNED.items() if any(command in known.commands for known in group)
    }
    return set(names) - mine - APART.keys() - set(ELSEWHERE)
