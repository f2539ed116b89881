"""The SFT job: a policy fitted to demonstrations."""

from __future__ import annotations

import pathlib

import jax

from perl_jax.data.loading import check_context
from perl_jax.data.splits import check_splits
from perl_jax.hub import artefacts
from perl_jax.hub.model import load_model
from perl_jax.objectives import supervised
from perl_jax.runs import folder as folder_lib
from perl_jax.training import cost
from perl_jax.training.configs import SFTConfig
from perl_jax.training.fit import Supervised, begin, fit, validate_policy
from perl_jax.training.roles import fresh_role

SFT = Supervised(
    "sft",
    "policy",
    "demonstrations",
    supervised.sft_objective,
    validate_policy,
    None,
    ("train/loss", "validation/loss"),
)


def run_sft(config: SFTConfig) -> pathlib.Path:
    """The SFT job; returns the artefact's folder. A finished run is left as it is."""
    folder = folder_lib.open_run("sft", config)
    artefact = folder / "adapters" / "policy"
    if folder_lib.finished(artefact, folder / "cost.json"):
        return artefact
    check_splits(config.data, SFT.kind, ("train", "validation"))
    model = load_model(config)
    check_context(model, config.data)
    role = fresh_role(model, config, jax.random.key(config.seed))
    model = model.relieved((role,))
    state, optimizers = begin(model, config, SFT, role)
    del role
    state, timings, program = fit(folder, config, model, state, optimizers, SFT, "train")
    policy = state.roles["policy"]
    artefacts.save_artefact(artefact, policy, model.record("policy", policy, step=int(state.step)))
    cost.write_cost(folder, model, state, {"learn": program}, timings)
    return artefact
