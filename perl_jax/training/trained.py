"""What a training function returns, and how it opens and ends a run's folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from perl_jax.adapters.lora import Adapter
from perl_jax.data.dataset import Dataset
from perl_jax.errors import require
from perl_jax.hub import artefacts
from perl_jax.hub.artefacts import Record
from perl_jax.hub.model import Model
from perl_jax.rewards.models import RewardModel
from perl_jax.runs.folder import is_finished, open_run
from perl_jax.runs.metrics import FILE_NAME, read_metrics
from perl_jax.runs.provenance import Fingerprints
from perl_jax.runs.run import Run
from perl_jax.runtime import files, json_values, trees


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained role.

    Attributes:
        adapter: The role's tree: LoRA leaves and head, or all weights after full tuning.
        record: The record of the role's artefact: base, tuning, step and moments of the scores.
        metrics: One row per step: {"step": step, metric: number, ...}.
        evaluation: Measures on the test rows, by name; empty without test rows.
        others: Further trained roles by name, such as RL's `value`.
        folder: The folder of the role's artefact; None for a run without a folder.
    """

    adapter: Adapter
    record: Record
    metrics: list[dict[str, Any]]
    evaluation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    others: Mapping[str, Adapter] = dataclasses.field(default_factory=dict)
    folder: files.Path | None = None

    def save(self, folder: files.PathLike) -> files.Path:
        """Writes the role as an artefact, which every command reads; returns the folder.

        Args:
            folder: The folder to create, with its parents.

        Raises:
            UserError: If the folder exists already.
        """
        path = files.path_of(folder)
        require(not files.exists(path), f"{path} exists already; give a folder that does not.")
        artefacts.save_artefact(path, self.adapter, self.record)
        return path

    def reward(self, weight: float = 1.0) -> RewardModel:
        """Returns the role as a reward of RL: weight * (score - mean) / standard deviation.

        The mean and the standard deviation are those of the scores of training responses.

        Args:
            weight: The weight in the total reward.

        Raises:
            UserError: If the role is not a reward model.
        """
        require(
            self.record.role == "reward",
            f"A {self.record.role} cannot score responses; train_reward makes a reward model.",
        )
        return RewardModel(self.adapter, self.record, weight)


def open_library_run(
    job: str,
    config: Any,
    run: files.PathLike | Run | None,
    model: Model,
    dataset: Dataset,
    depends_on: Callable[[], Mapping[str, Any]],
) -> Run | None:
    """Returns an opened run, or None for a run without a folder.

    An existing folder is resumed only if the settings (a few, such as `checkpoint_every`, may
    differ), the base, the tokenizer, the rows and the values of `depends_on` have not changed.

    Args:
        job: sft, reward, dpo or rl.
        config: The job's settings.
        run: A folder, which is opened; a run that a command has opened, or None, is returned as it
            is.
        model: The base and its tokenizer.
        dataset: The rows.
        depends_on: Returns JSON values of everything else that decides the run's numbers, by name
            for messages. Called only if a folder is opened.

    Raises:
        UserError: If settings or inputs have changed; the message names them.
    """
    if run is None or isinstance(run, Run):
        return run
    prints: Fingerprints = {
        f"the base {model.name}": json_values.digest(model.fingerprint),
        f"the tokenizer of {model.name}": json_values.digest(model.tokenizer.fingerprint),
        f"the rows of {dataset.name}": json_values.digest(dataset.content()),
        **{name: json_values.digest(value) for name, value in depends_on().items()},
    }
    return open_run(job, config, run, prints)


def content_of(adapter: Adapter | files.PathLike | None) -> Any:
    """Returns a JSON value that identifies a role's content: it differs for other weights or
    settings.

    Args:
        adapter: A role, or the folder of an artefact. None returns None.
    """
    if adapter is None:
        return None
    if not isinstance(adapter, Adapter):
        return artefacts.content_of(files.path_of(adapter))
    settings = None if adapter.config is None else json_values.to_dict(adapter.config)
    return [trees.digests(adapter), settings]


def load_finished(run: Run | None, model: Model, role: str, last: str) -> Trained | None:
    """Returns the result of a finished run; None for an unfinished run or one without a folder.

    Args:
        run: The opened run; None: a run without a folder.
        model: The base.
        role: The name of the trained role.
        last: The name of the file that the run writes last.
    """
    if run is None or not is_finished(run, role, last):
        return None
    adapter, record = model.load_role(run.artefact(role))
    others = {
        path.name: model.load_role(path)[0]
        for path in files.listing(run.artefact(role).parent)
        if path.name != role and files.exists(path / artefacts.RECORD)
    }
    path = run.folder / "evaluation.json"
    evaluation = files.read_json(path) if files.exists(path) else {}
    metrics = read_metrics(run.folder / FILE_NAME)
    return Trained(adapter, record, metrics, evaluation, others, run.artefact(role))
