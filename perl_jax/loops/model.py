"""A base model in memory, placed on its mesh, with its tokenizer and its roles."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from perl_jax import checkpoint, hosts, lora, sharding, trees
from perl_jax.checkpoint import Record
from perl_jax.config import UserError, require
from perl_jax.data.tasks import DataOptions
from perl_jax.hf import checkpoint as hf_checkpoint
from perl_jax.hf import families
from perl_jax.hf.chat import DATE
from perl_jax.hf.tokenizer import Tokenizer
from perl_jax.lora import Adapter, LoRAConfig
from perl_jax.loops.jobs import DataConfig, JobConfig, ModelOptions
from perl_jax.models import kernels
from perl_jax.models.config import ModelConfig
from perl_jax.models.language_model import LanguageModel, full_weights
from perl_jax.quantise import QuantiseConfig, quantise_leaf
from perl_jax.platforms import platform_of
from perl_jax.programs import Program, keep_compiled
from perl_jax.types import Tree


_SHALLOW = 8


@dataclasses.dataclass(frozen=True)
class Model:
    """Everything frozen that a job needs: the functions, the weights, the tokenizer, the mesh."""

    name: str
    lm: LanguageModel
    base: Tree
    tokenizer: Tokenizer
    weights_fingerprint: str
    quantise: QuantiseConfig = QuantiseConfig()
    shard_adapters: bool = False

    @property
    def mesh(self) -> Mesh:
        return self.lm.mesh

    @property
    def fingerprint(self) -> str:
        """Of the base: its weights and what the model makes of them."""
        return checkpoint.base_fingerprint(self.lm.config, self.weights_fingerprint)

    def adapter_shardings(self, abstract: Tree) -> Tree:
        """Where a role or a whole train state lives: full weights like the base, adapters as chosen, the rest replicated."""
        placed = {f"weights/{name}": place for name, place in self.lm.base_shardings().items()}
        if self.shard_adapters:
            placed |= {f"lora/{name}": place for name, place in self.lm.lora_shardings().items()}
        return sharding.state_shardings(abstract, placed, self.mesh)

    def place(self, tree: Tree) -> Tree:
        """Puts a role or a train state where it lives."""
        return jax.device_put(tree, self.adapter_shardings(tree))

    def relieved(self, roles: Iterable[Adapter]) -> Model:
        """This model without its base, where every role has weights of its own and none reads it."""
        return dataclasses.replace(self, base=None) if all(role.weights is not None for role in roles) else self

    @property
    def row_parts(self) -> int:
        """Parts that the rows of a batch are split into."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def shared_prompts(self, rows: int, samples: int) -> int:
        """How many samples of a prompt read one copy of it: all, where whole groups divide over the mesh's rows."""
        return samples if rows % (samples * self.row_parts) == 0 else 1

    def packs(self, packing: str) -> bool:
        """Whether batches are packed (`DataConfig.packing`)."""
        return packing == "on" or packing == "auto" and platform_of(self.mesh) in ("cpu", "gpu")

    def record(self, role: str, adapter: Adapter, *, step: int = 0, metrics: dict[str, Any] | None = None, **more: Any) -> Record:
        """What an artefact of a role on this base says of itself."""
        return checkpoint.record_of(
            adapter,
            role=role,
            base_name=self.name,
            base_fingerprint=self.fingerprint,
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            step=step,
            metrics=metrics or {},
            quantise=self.quantise,
            turn_end=tuple(self.tokenizer.turn_end_ids),
            **more,
        )

    def load_role(self, folder: str | pathlib.Path, role: str | None = None) -> tuple[Adapter, Record]:
        """An artefact of this base; refused by name when it belongs to another base or, where asked, role."""
        adapter, record = checkpoint.load_artefact(
            pathlib.Path(folder), self.lm, weights=self.weights_fingerprint, base_name=self.name, role=role, shardings=self.adapter_shardings
        )
        known = self.tokenizer.first_fingerprint if record.format == 1 else self.tokenizer.fingerprint
        require(
            record.tokenizer_fingerprint == known,
            f"{folder} was trained with another tokenizer or chat template than that of {self.name}; give the folder, the template and the template date it was trained with.",
        )
        check_turn_end(folder, record, self.tokenizer)
        return adapter, record


def check_turn_end(folder: str | pathlib.Path, record: Record, tokenizer: Tokenizer) -> None:
    """Refuses a reward that was trained with another end of a turn: its scores would be read at a token it never saw there.

    Artefacts that state none are of versions that ended every turn with eos.
    """
    if record.role != "reward":
        return
    meant, now = record.turn_end or (tokenizer.eos_id,), tuple(tokenizer.turn_end_ids)
    shown = lambda ids: repr(tokenizer.inner.decode(list(ids)))
    require(
        meant == now,
        f"{folder} learned its scores where a turn ends with {shown(meant)}; with this tokenizer and template a turn ends with {shown(now)}: "
        "give the --data.template that it was trained with, or train or import it anew.",
    )


def load_model(options: ModelOptions) -> Model:
    """Loads a base straight to its place on the mesh."""
    keep_compiled(options.compile_cache)
    folder = hf_checkpoint.find_model(options.model)
    lm, tokenizer = described(options, folder)
    marks: dict[str, bytes] = {}

    def finish(name: str, leaf: jax.Array) -> Tree:
        # The fingerprint is the true base's, whatever becomes of it.
        marks[name] = trees.leaf_mark(name, leaf)
        return quantise_leaf(name, leaf, options.quantise)

    base = hf_checkpoint.load_base(folder, lm.config, lm.base_shardings(), finish=finish)
    return Model(str(options.model), lm, base, tokenizer, trees.joined_marks(marks), options.quantise, options.mesh.adapters == "sharded")


def described(options: ModelOptions, folder: pathlib.Path) -> tuple[LanguageModel, Tokenizer]:
    """The functions and the tokenizer of a model in a folder, without its weights.

    Says on standard error which fields of its config.json are passed over.
    """
    if (unread := families.leftovers(folder)) and hosts.is_writer():
        print(f"{folder / 'config.json'}: these fields do not change the numbers and are not read: {', '.join(unread)}.", file=sys.stderr)
    config = families.read_config(folder, dtype=options.dtype, param_dtype=options.dtype, remat=options.remat)
    mesh = sharding.make_mesh(options.mesh)
    template, date = template_of(options)
    tokenizer = Tokenizer.load(folder, config.vocab_size, template, date)
    asked = date == DATE or (tokenizer.chat is not None and tokenizer.chat.uses_date)
    require(asked, f"template_date is {date!r}, which no chat template of {options.model} asks for; leave it out.")
    return LanguageModel(for_devices(config, mesh, options.attention), mesh), tokenizer


def template_of(options: ModelOptions) -> tuple[str, str]:
    """(template, date for it): of a job's data, or of a command that has no data."""
    source = getattr(options, "data", options)
    return getattr(source, "template", "auto"), getattr(source, "template_date", DATE)


def for_devices(config: ModelConfig, mesh: Mesh, attention: str = "auto") -> ModelConfig:
    """The config as the mesh's devices run it best, or with the attention path that is asked for.

    On a CPU shallow models have their layers inlined. `kernels.choose` says what attends.
    """
    path = _choice(config, mesh).path if attention == "auto" else attention
    if platform_of(mesh) != "cpu":
        return dataclasses.replace(config, attention=path)
    require(attention in ("auto", "plain", "blocked"), f"attention is {attention!r}; on a CPU it must be auto, plain or blocked.")
    return dataclasses.replace(config, unroll=config.layers if config.layers <= _SHALLOW else 1, attention=path)


def _choice(config: ModelConfig, mesh: Mesh) -> kernels.Choice:
    return kernels.choose(platform_of(mesh), config, getattr(mesh.devices.flat[0], "compute_capability", None), mesh.size)


def attention_paths(lm: LanguageModel) -> dict[str, str]:
    """How attention is computed, and why: `training` (whole sequences, in scoring too) and `sampling`."""
    path, (best, why) = lm.config.attention, _choice(lm.config, lm.mesh)
    whole = f"{path} ({why if path == best else '--attention asks for it'})"
    sampling = f"prompts {path}, then plain over the cache (one query a row, for which no kernel is needed)"
    if local := len(lm.config.windowed):
        sampling += f", which holds {lm.config.window} tokens in {local} of {lm.config.layers} layers"
    return {"training": whole, "sampling": sampling}


def say_attention(job: str, lm: LanguageModel) -> None:
    """Prints the attention paths: one line, of the process that writes."""
    if hosts.is_writer():
        print(f"{job}: attention: " + "; ".join(f"{what}: {path}" for what, path in attention_paths(lm).items()) + ".", file=sys.stderr, flush=True)


def data_options(config: DataConfig) -> DataOptions:
    """The data layer's options of a job."""
    return DataOptions(
        data_dir=config.data_dir, seed=config.data_seed, train_size=config.train_size, evaluation_size=config.evaluation_size
    )


def fresh_role(model: Model, config: JobConfig, key: jax.Array) -> Adapter:
    """The trainable tree a job starts from: a LoRA adapter equal to the base, or all its weights."""
    if config.tuning == "full":
        _require_dense(config)
        return weights_program(model.lm)(model.base)
    fresh = model.lm.init_adapter(key, config.lora, model.base)
    if config.stack_on is None:
        return fresh
    frozen, record = model.load_role(config.stack_on)
    require(record.tuning == "lora", f"{config.stack_on} is fully tuned; only an adapter can lie under another.")
    return lora.stack(frozen, fresh, model.lm.config.layers)


def starting_role(model: Model, config: JobConfig, folder: str | None, key: jax.Array) -> Adapter:
    """A role that goes on from a policy artefact, in the job's tuning.

    Adapters go on as they are (rank and targets are the artefact's); full tuning from an adapter
    begins with a derived merged copy. An adapter cannot go on from fully tuned weights: those are
    another base, and have to be given as one.
    """
    if folder is None:
        return fresh_role(model, config, key)
    adapter, record = model.load_role(folder, "policy")
    if config.tuning == record.tuning:
        check_adapter(folder, record, config.lora)
        return adapter
    if config.tuning == "lora":
        raise UserError(f"{folder} is fully tuned; an adapter needs a frozen base: use --tuning full, or start from an adapter.")
    _require_dense(config)
    return weights_program(model.lm)(merge_program(model.lm)(model.base, adapter))


def weights_program(lm: LanguageModel) -> Program:
    """A base -> the role that full tuning starts from, its weights where the base's are (`full_weights`)."""
    return Program("full_weights", full_weights, out_shardings=Adapter(weights=_base_places(lm)))


def merge_program(lm: LanguageModel) -> Program:
    """(base, adapter) -> a copy of the base with the adapter in it, where the base is.

    Op by op, layers would be taken out of a leaf that is split over devices, each whole onto one of them.
    """
    return Program("merged", lora.merge, out_shardings=_base_places(lm))


def _base_places(lm: LanguageModel) -> Tree:
    return trees.map_named(lambda name, _: lm.base_shardings()[name], lm.abstract_base())


def check_adapter(folder: str, record: Record, given: LoRAConfig) -> None:
    """Raises UserError when a setting in `--lora` differs from the adapter that the run continues from.

    A config cannot tell its defaults from values that were given; one that is the default is taken as not given.
    """
    if record.lora is None:
        return
    defaults, decided = vars(LoRAConfig()), vars(record.lora)
    for name, wanted in vars(given).items():
        found = decided[name]
        require(
            wanted in (found, defaults[name]),
            f"lora.{name} is {wanted!r}; {folder}, which this run goes on from, has {found!r}: leave it out, or begin a fresh adapter with --stack-on.",
        )


def _require_dense(config: JobConfig) -> None:
    require(config.quantise.kind == "none", "Full tuning trains the base's weights; quantise.kind must be none.")


def check_context(model: Model, config: DataConfig) -> None:
    """Refuses lengths that the model has no positions for."""
    room = model.lm.config.max_positions
    tail = len(model.tokenizer.tail_ids)
    total = config.max_prompt_length + config.max_response_length + tail
    end = f" (with {tail} for the end of the chat template's turn)" if tail else ""
    require(
        total <= room,
        f"max_prompt_length + max_response_length is {total}{end}; {model.name} has {room} positions.",
    )


def host(tree: Tree) -> Tree:
    """Device arrays, whole, as numpy arrays on this host; with several hosts all of them have to ask."""
    return jax.tree.map(np.asarray, jax.device_get(hosts.whole(tree)))
