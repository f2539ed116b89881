"""`perl-jax average`: writes the weighted sum of adapters as an artefact."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tyro

from perl_jax.adapters import combine
from perl_jax.errors import listed, require
from perl_jax.hub import artefacts
from perl_jax.hub.model import TemplateOptions, load_model
from perl_jax.runtime import files, trees
from perl_jax.runtime.outputs import new_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class AverageConfig(TemplateOptions):
    """Write the weighted sum of adapters of one base and one role as an artefact.

    Attributes:
        adapters: The artefacts.
        weights: One weight per artefact; None weighs all equally, with a sum of 1.
        to: The artefact's folder to write; it must not exist, unless --overwrite is given.
    """

    adapters: tyro.conf.Positional[tuple[str, ...]]
    weights: tuple[float, ...] | None = None
    to: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_forward("average")


def run_average(config: AverageConfig) -> files.Path:
    """Writes the weighted sum of adapters as an artefact and returns its folder.

    The mean and the standard deviation that normalise reward models' scores are summed with the
    same weights. Raises UserError, and writes nothing, if the folder exists, or if roles, numbers
    of weights or adapters do not fit together.
    """
    number = len(config.adapters)
    require(number > 0, "Give at least one adapter to average.")
    weights = config.weights or (1 / number,) * number
    require(
        bool(np.isfinite(weights).all()), f"The weights are {weights}; they must be finite numbers."
    )
    require(
        len(weights) == number,
        f"There are {number} adapters and {len(weights)} weights; give one weight for each.",
    )
    with new_folder(config.to, artefacts.RECORD) as written:
        model = load_model(config)
        adapters, records = zip(*map(model.load_role, config.adapters), strict=True)
        roles = sorted({record.role for record in records})
        require(
            len(roles) == 1, f"Adapters of different roles ({', '.join(roles)}) cannot be averaged."
        )
        values: dict[str, Any] = {}
        if roles == ["reward"]:
            # The summed head gives the weighted sum of the scores before normalisation, so its
            # moments are weighted sums too.
            mean, std = (
                float(np.dot(weights, part))
                for part in zip(*((r.score_mean, r.score_std) for r in records), strict=True)
            )
            require(
                std > 0,
                f"The weights {weights} give the averaged score a standard deviation that is not "
                "above 0.",
            )
            values = {"score_mean": mean, "score_std": std}
        adapter = model.place(combine.average(adapters, weights, model.lm.config.layers))
        wrong = trees.not_finite(adapter)
        require(
            not wrong,
            f"The weighted sum is NaN or infinite in {listed(wrong)}; the weights are {weights}.",
        )
        metrics = {"averaged": list(config.adapters), "weights": list(weights)}
        artefacts.save_artefact(
            written, adapter, model.record(roles[0], adapter, metrics=metrics, **values)
        )
    return files.path_of(config.to)
