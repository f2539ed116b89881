"""Supervised fine-tuning: a policy fitted to demonstrations."""

from __future__ import annotations

from collections.abc import Iterable

from perl_jax.adapters.lora import Adapter
from perl_jax.data.dataset import Dataset, Row, of_rows
from perl_jax.data.loading import check_context
from perl_jax.hub import artefacts
from perl_jax.hub.model import Model
from perl_jax.objectives import supervised
from perl_jax.runs.owner import owned
from perl_jax.runs.run import Run
from perl_jax.runtime import files
from perl_jax.runtime.seeds import random_key
from perl_jax.training import cost
from perl_jax.training.configs import SFTConfig
from perl_jax.training.fit import Supervised, begin, supervised_loop, validate_policy
from perl_jax.training.loop import OnStep, train
from perl_jax.training.roles import fresh_role
from perl_jax.training.trained import Trained, content_of, load_finished, open_library_run

SFT = Supervised(
    "sft",
    "policy",
    "demonstrations",
    supervised.sft_objective,
    validate_policy,
    None,
    ("train/loss", "validation/loss"),
)


def train_sft(
    model: Model,
    rows: Iterable[Row] | Dataset,
    config: SFTConfig | None = None,
    *,
    validation: Iterable[Row] = (),
    frozen: Adapter | files.PathLike | None = None,
    run: files.PathLike | Run | None = None,
    on_step: OnStep | None = None,
) -> Trained:
    """Returns a policy trained on demonstrations; the loss is the mean of -log p over response
    tokens.

    Args:
        model: The base (`load_model`).
        rows: Rows with `prompt` and `response`, or an opened data set.
        config: Settings; None: the defaults.
        validation: Rows whose loss is measured every `config.evaluate_every` steps.
        frozen: An adapter, or the folder of one, that stays unchanged beneath the fresh one. None:
            there is none.
        run: A folder for checkpoints, metrics and the artefact, or an opened run. The same call
            continues from the last checkpoint, bit for bit; a finished run is read and not trained
            again. None: nothing is written.
        on_step: Called after each step with the row {"step": step, metric: number, ...}, on the
            process that writes. None: nothing is called.

    Raises:
        UserError: For rows or settings that do not fit.
        TrainingError: For NaN or infinity.
    """
    config = config or SFTConfig()
    with owned(run):
        dataset = of_rows(SFT.kind, rows, validation)
        depends_on = lambda: {"the frozen adapter": content_of(frozen)}
        run = open_library_run("sft", config, run, model, dataset, depends_on)
        if done := load_finished(run, model, "policy", "cost.json"):
            return done
        check_context(model, config.data)
        role = fresh_role(model, config, random_key(config.seed), frozen)
        model = model.relieved((role,))
        state, optimizers = begin(model, config, SFT, role)
        del role
        loop, program = supervised_loop(model, dataset, "train", config, SFT, state, optimizers)
        state, timings, metrics = train(config, state, loop, run, on_step)
        policy = state.roles["policy"]
        record = model.record("policy", policy, step=int(state.step))
        if run is None:
            return Trained(policy, record, metrics)
        artefacts.save_artefact(run.artefact("policy"), policy, record)
        cost.write_cost(run.folder, model, state, {"learn": program}, timings)
        return Trained(policy, record, metrics, folder=run.artefact("policy"))
