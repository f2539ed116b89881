"""Fits a role to rows: the supervised loop that SFT, reward models, DPO and small bases share.

RL shares the first state (`initial_state`) and the program of its updates (`learn_program`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from perl_jax.adapters.lora import Adapter
from perl_jax.data.dataset import Dataset
from perl_jax.data.loading import load_batches, noted
from perl_jax.data.pipeline import Batches, with_progress
from perl_jax.hub.model import Model
from perl_jax.models.microbatches import summed_microbatches
from perl_jax.runtime import sharding
from perl_jax.runtime.hosts import to_host
from perl_jax.runtime.programs import SHAPES, Program
from perl_jax.runtime.seeds import random_key
from perl_jax.training import step
from perl_jax.training.configs import TrainingConfig
from perl_jax.training.loop import Loop
from perl_jax.training.optimizers import Optimizers, make_optimizer
from perl_jax.training.start import say_start
from perl_jax.training.state import TrainState, init_state
from perl_jax.types import Tree


def learn_program(
    model: Model,
    config: TrainingConfig,
    objective: step.Objective,
    state: TrainState,
    optimizers: Optimizers,
    updates: int = 1,
) -> Program:
    """Returns the compiled program of a step's updates: (state, base, batch) -> (state, metrics).

    The state is donated; base and batch are not. The new state has the shardings of the old one.

    Args:
        model: The base and its mesh.
        config: Settings; only the number of microbatches is read.
        objective: What is minimised.
        state: A state of the run; only shapes are read.
        optimizers: One for each trained role, by name.
        updates: Number of updates from one batch. With more than one the program has a fourth
            argument: the rows of each update (`step.train_epochs`).
    """
    update = step.train_step if updates == 1 else step.train_epochs
    shardings = (model.adapter_shardings(state), sharding.replicated(model.mesh))
    return Program(
        "learn",
        functools.partial(update, objective, optimizers, config.microbatches),
        donate=(0,),
        out_shardings=shardings,
        # Batches of each padded length may be packed or not.
        limit=SHAPES,
    )


def initial_state(
    model: Model,
    config: TrainingConfig,
    roles: dict[str, Adapter],
    optimizers: Optimizers,
    frozen: Mapping[str, Adapter] | None = None,
    controls: Mapping[str, float] | None = None,
) -> TrainState:
    """Returns the state of step 0 on the mesh. It shares no arrays with the given roles.

    Args:
        model: The base and its mesh.
        config: Settings; only the seed is read, which the state's key is made from.
        roles: The roles to train, by name.
        optimizers: One for each trained role, by name.
        frozen: Roles that the job reads but does not train, by name. None: there are none.
        controls: Initial values of the numbers that the loop adapts (the KL's coefficient), by
            name. None: there are none.
    """
    key = jax.random.key_data(jax.random.fold_in(random_key(config.seed), 1))
    given = (
        model.place(roles),
        model.place(dict(frozen or {})),
        jax.device_put(np.asarray(key), sharding.replicated(model.mesh)),
    )
    return begin_program(model, optimizers, controls, *given)(*given)


def begin_program(
    model: Model,
    optimizers: Optimizers,
    controls: Mapping[str, float] | None,
    roles: Tree,
    frozen: Tree,
    key: jax.Array | jax.ShapeDtypeStruct,
) -> Program:
    """Returns the program (roles, frozen roles, key data) -> the state of step 0.

    The program is compiled at its first call. `controls` are constants in it; roles and key are its
    arguments.

    Args:
        model: Has the mesh that the state is placed on.
        optimizers: One for each trained role, by name.
        controls: Initial values of the numbers that the loop adapts, by name; None: there are none.
        roles: The roles to train, by name; only shapes and dtypes are read.
        frozen: The frozen roles, by name; only shapes and dtypes are read.
        key: Key data, uint32; only shape and dtype are read.
    """

    def make(roles: dict[str, Adapter], frozen: dict[str, Adapter], data: jax.Array) -> TrainState:
        return init_state(roles, optimizers, jax.random.wrap_key_data(data), frozen, controls)

    shardings = model.adapter_shardings(jax.eval_shape(make, roles, frozen, key))
    return Program("begin", make, out_shardings=shardings, limit=1)


# state -> the means over the held-out rows: `loss` and the objective's logs (`held_out_loss`).
HeldOut = Callable[[TrainState], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Supervised:
    """What distinguishes one supervised job from another.

    Attributes:
        job: The name that messages begin with.
        role: The name of the trained role.
        kind: The kind of rows that the job trains on, one of `data.store.KINDS`.
        objective: (lm, roles by name, base or None, batch, key or None) -> (loss, logs by name),
            each a LossSum.
        validate: (model, held-out loss, state, held-out batches, result of `truth` or None) -> the
            validation metrics.
        best: The validation metric whose best step is kept (higher is better); None: the last step
            is.
        shown: Names of the metrics on the progress line.
        prepare: (model, state, batch) -> the batch that the objective reads; None: the batch as it
            is.
        truth: (rows, name of the data set, split) -> an array [rows] that `validate` compares
            scores with; None: there is no such array.
        others: Whether each labelled row comes with the response of another row
            (`data.mismatched`).
    """

    job: str
    role: str
    kind: str
    objective: Callable
    validate: Callable[[Model, HeldOut, TrainState, Batches, np.ndarray | None], dict[str, float]]
    best: str | None
    shown: tuple[str, ...]
    prepare: Callable[[Model, TrainState, Tree], Tree] | None = None
    truth: Callable[[Any, str, str], np.ndarray] | None = None
    others: bool = False

    def ready(self, model: Model, state: TrainState, batch: Tree) -> Tree:
        """Returns a batch on the mesh's devices, in the form that the objective reads."""
        batch = sharding.put_batch(batch, model.mesh)
        return batch if self.prepare is None else self.prepare(model, state, batch)


def begin(
    model: Model,
    config: TrainingConfig,
    job: Supervised,
    role: Adapter,
    frozen_roles: Mapping[str, Adapter] | None = None,
) -> tuple[TrainState, Optimizers]:
    """Returns the state that the training of one role begins with, and the role's optimizer by
    name.

    The state copies the role: delete the given role afterwards, or its weights are on the devices
    twice.

    Args:
        model: The base and its mesh.
        config: Settings of the job.
        job: Names the trained role.
        role: The initial values of the trained role.
        frozen_roles: Roles that the job reads but does not train, by name. None: there are none.
    """
    optimizers = {
        job.role: make_optimizer(
            config.optimizer, config.steps, config.tuning, model.lm.config.width
        )
    }
    return initial_state(model, config, {job.role: role}, optimizers, frozen_roles), optimizers


def supervised_loop(
    model: Model,
    dataset: Dataset,
    split: str,
    config: TrainingConfig,
    job: Supervised,
    state: TrainState,
    optimizers: Optimizers,
) -> tuple[Loop, Program]:
    """Returns the loop that trains a role on a split of labelled rows, and the update's program.

    With a validation split, its rows are measured every `config.evaluate_every` steps, and the step
    with the best `job.best` is kept. Prints a summary of the job (`start.say_start`).

    Args:
        model: The base and its mesh.
        dataset: Has the rows.
        split: The split to train on.
        config: Settings of the job.
        job: The role, the objective and the validation.
        state: The state of step 0 (`begin`); only its shapes and shardings are read.
        optimizers: One for each trained role, by name.
    """
    seed, size, parts = config.seed, config.batch_size, config.microbatches
    batches = load_batches(model, dataset, split, config.data, size, seed, parts, others=job.others)
    objective = functools.partial(job.objective, model.lm)
    program = learn_program(model, config, objective, state, optimizers)
    base = None if config.tuning == "full" else model.base
    step_of_job = functools.partial(advance, model, base, job, program)
    facts = noted(dataset, split, config.data, batches)
    read = {split: batches}
    validate = best = None
    if "validation" in dataset.splits:
        best = job.best
        held_out = load_batches(
            model, dataset, "validation", config.data, size, None, parts, others=job.others
        )
        facts |= noted(dataset, "validation", config.data, held_out)
        read["validation"] = held_out
        measure = held_out_program(model, config, job)
        rows = dataset.rows("validation")
        truth = None if job.truth is None else job.truth(rows, dataset.name, "validation")
        loss = lambda state: held_out_loss(model, job, measure, state, held_out)
        validate = lambda state: (job.validate(model, loss, state, held_out, truth), [])
    say_start(job.job, model, dataset, config, state, read)
    return Loop(job.job, step_of_job, iter(batches), validate, best, job.shown, facts), program


def advance(
    model: Model,
    base: Tree | None,
    job: Supervised,
    program: Program,
    state: TrainState,
    batch: Tree,
) -> tuple[TrainState, dict[str, Any], dict[str, float]]:
    """Makes one step: puts the batch on the devices, updates the role, fetches the metrics.

    Args:
        model: The base and its mesh.
        base: The base's weights; None in full tuning.
        job: Prepares the batch.
        program: The compiled `step.train_step`.
        state: Of step s; it is donated.
        batch: A batch of rows, on the host.

    Returns:
        The state of step s + 1, the metrics of `step.train_step` as Python numbers, and no phases:
        {}.
    """
    state, metrics = program(state, base, job.ready(model, state, batch))
    return state, {name: value.item() for name, value in to_host(metrics).items()}, {}


def held_out_program(model: Model, config: TrainingConfig, job: Supervised) -> Program:
    """Returns the compiled program (roles by name, base or None, batch) -> (loss, logs by name).

    The loss and each log are LossSums over the batch, computed without dropout, in as many
    microbatches as the update. The base is None in full tuning.
    """
    return Program(
        "validate",
        functools.partial(
            _held_out, functools.partial(job.objective, model.lm), config.microbatches
        ),
        limit=SHAPES,
    )


def _held_out(
    objective: Callable, microbatches: int, roles: dict, frozen: Tree, batch: Tree
) -> tuple:
    """Returns the objective's loss and logs on one batch, computed without dropout.

    The loss and each log are LossSums: total and weight, added over the microbatches and not yet
    divided.

    Args:
        objective: (roles, frozen, batch, key or None) -> (loss, logs by name), each a LossSum.
        microbatches: Number of parts that the batch is computed in, one after the other.
        roles: The trained roles, by name.
        frozen: The base's weights; None in full tuning.
        batch: The batch that the objective reads.
    """
    return summed_microbatches(
        lambda part: objective(roles, frozen, part, None), batch, microbatches
    )


def held_out_loss(
    model: Model, job: Supervised, measure: Program, state: TrainState, batches: Batches
) -> dict[str, float]:
    """Returns the means over all held-out rows: `loss`, and each of the objective's logs by its
    name.

    Totals and weights are added over all batches and divided once. A mean without weight is 0.

    Args:
        model: The base and its mesh.
        job: Prepares the batches.
        measure: The compiled `held_out_program`.
        state: The state whose roles are measured.
        batches: All held-out batches.
    """
    frozen = model.base if any(role.weights is None for role in state.roles.values()) else None
    sums: dict[str, list[float]] = {}
    for batch in with_progress(batches, "validating"):
        loss, logs = to_host(measure(state.roles, frozen, job.ready(model, state, batch)))
        for name, part in {"loss": loss, **logs}.items():
            total = sums.setdefault(name, [0.0, 0.0])
            total[0], total[1] = total[0] + float(part.total), total[1] + float(part.weight)
    return {name: total / weight if weight > 0 else 0.0 for name, (total, weight) in sums.items()}


def validate_policy(
    model: Model, held_out: HeldOut, state: TrainState, batches: Batches, truth: None
) -> dict[str, float]:
    """Returns `validation/loss` and, for preference objectives, `validation/accuracy`.

    The accuracy is the mean of the objective's `train/accuracy` over the held-out rows.

    Args:
        model: Not read.
        held_out: state -> the means over the held-out rows.
        state: The state to measure.
        batches: Not read.
        truth: Not read.
    """
    found = held_out(state)
    accuracy = {"validation/accuracy": found["train/accuracy"]} if "train/accuracy" in found else {}
    return {"validation/loss": found["loss"], **accuracy}
