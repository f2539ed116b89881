"""`perl-jax show`: describes an artefact in readable lines."""

from __future__ import annotations

import dataclasses
import json

import tyro

from perl_jax.hub import artefacts
from perl_jax.runtime import files


@dataclasses.dataclass(frozen=True)
class ShowConfig:
    """Describe an artefact: role, adapter, size, base, training step, metrics.

    Attributes:
        adapter: The artefact's folder.
    """

    adapter: tyro.conf.Positional[str]


def show(config: ShowConfig) -> str:
    """Returns the artefact's record and its size on disk as text, one `NAME VALUE` per line; raises
    UserError if the folder holds no artefact.
    """
    folder = files.path_of(config.adapter)
    record = artefacts.read_record(folder)
    settings = {} if record.lora is None else dataclasses.asdict(record.lora)
    kind = (
        ", ".join(
            f"{name} {value}" for name, value in settings.items() if value not in (None, "", False)
        )
        or "every weight"
    )
    lines = {
        "role": record.role + (" (with its scalar head)" if record.has_head else ""),
        "tuning": f"{record.tuning}: {kind}",
        "scaling": record.scaling if record.lora else None,
        "size": f"{files.folder_bytes(folder) / 2**20:,.2f} MiB on disk",
        "base": f"{record.base_name}, fingerprint {record.base_fingerprint}",
        "tokenizer": f"fingerprint {record.tokenizer_fingerprint}",
        "base held in": None
        if record.quantise.kind == "none"
        else f"{record.quantise.kind}, block {record.quantise.block or 'none'}",
        "frozen beneath": None
        if record.under is None
        else ", ".join(f"{name} rank {rank}" for name, rank in record.under.items()),
        "step": f"{record.step:,}",
        "normalisation": None
        if record.score_mean is None
        else f"(raw - {record.score_mean:.4g}) / {record.score_std:.4g}",
        "metrics": json.dumps(record.metrics) if record.metrics else None,
    }
    return "\n".join(f"{name:<15}{value}" for name, value in lines.items() if value is not None)
