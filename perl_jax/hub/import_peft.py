"""`perl-jax import`: reads an adapter written by PEFT into an artefact."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import tyro

from perl_jax.errors import require
from perl_jax.hub import artefacts, peft, verify
from perl_jax.hub.model import TemplateOptions, load_model
from perl_jax.runtime import copies, files
from perl_jax.runtime.outputs import new_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig(TemplateOptions):
    """Read an adapter written by PEFT into an artefact.

    Attributes:
        peft: The folder with adapter_config.json and adapter_model.safetensors.
        to: The artefact's folder to write; it must not exist, unless --overwrite is given.
    """

    peft: tyro.conf.Positional[str]
    to: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_forward("import")


def run_import(config: ImportConfig) -> files.Path:
    """Writes a PEFT adapter as an artefact, reads the artefact back and compares outputs; returns
    its folder.

    The scores of a reward model are used unchanged: its record gets mean 0 and standard deviation
    1. Raises UserError, and leaves nothing, if the folder exists, or the adapter is not supported
    or does not fit the base.
    """
    source = str(files.path_of(config.peft))
    with new_folder(config.to, artefacts.RECORD) as written:
        folder = copies.local_copy(config.peft, ["*.json", "*.safetensors"])
        require(files.is_folder(folder), f"There is no folder {source}.")
        model = load_model(config)
        adapter, offset = peft.read_peft(folder, model.lm.config)
        values: dict[str, Any] = {}
        if adapter.head is not None:
            head = adapter.head | {"bias": jnp.float32(offset)}
            adapter = dataclasses.replace(adapter, head=head)
        role = "policy" if adapter.head is None else peft.head_facts(folder)["role"]
        if role == "reward":
            # Imported scores are used unchanged.
            values = {"score_mean": 0.0, "score_std": 1.0}
        adapter = model.place(adapter)
        artefacts.save_artefact(
            written,
            adapter,
            model.record(role, adapter, metrics={"imported_from": source}, **values),
        )
        again, _ = model.load_role(written, role)
        verify.require_same(
            verify.outputs(model, model.base, adapter),
            verify.outputs(model, model.base, again),
            1e-6,
            "outputs",
        )
    return files.path_of(config.to)
