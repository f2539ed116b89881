"""A base model in memory, placed on its mesh, with its tokenizer and its roles."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Iterable
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from perl_jax import errors
from perl_jax.adapters import lora
from perl_jax.adapters.lora import Adapter
from perl_jax.adapters.quantise import QuantiseConfig, quantise_leaf
from perl_jax.errors import require
from perl_jax.hub import artefacts, families
from perl_jax.hub import weights as hf_checkpoint
from perl_jax.hub.artefacts import Record
from perl_jax.hub.chat import DATE
from perl_jax.hub.tokenizer import Tokenizer
from perl_jax.models import config, kernels
from perl_jax.models.config import ATTENTION, REMAT, ModelConfig
from perl_jax.models.language_model import LanguageModel, full_weights
from perl_jax.runtime import hosts, sharding, trees
from perl_jax.runtime.platforms import platform_of, without_absent_chips
from perl_jax.runtime.programs import Program, keep_compiled
from perl_jax.runtime.sharding import MeshConfig
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
        return artefacts.base_fingerprint(self.lm.config, self.weights_fingerprint)

    def adapter_shardings(self, abstract: Tree) -> Tree:
        """Where a role or a whole train state lives: full weights like the base, adapters as
        chosen, the rest replicated.
        """
        placed = {f"weights/{name}": place for name, place in self.lm.base_shardings().items()}
        if self.shard_adapters:
            placed |= {f"lora/{name}": place for name, place in self.lm.lora_shardings().items()}
        return sharding.state_shardings(abstract, placed, self.mesh)

    def place(self, tree: Tree) -> Tree:
        """Puts a role or a train state where it lives."""
        return jax.device_put(tree, self.adapter_shardings(tree))

    def relieved(self, roles: Iterable[Adapter]) -> Model:
        """This model without its base, where every role has weights of its own and none reads
        it.
        """
        return (
            dataclasses.replace(self, base=None)
            if all(role.weights is not None for role in roles)
            else self
        )

    @property
    def row_parts(self) -> int:
        """Parts that the rows of a batch are split into."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def shared_prompts(self, rows: int, samples: int) -> int:
        """How many samples of a prompt read one copy of it: all, where whole groups divide over the
        mesh's rows.
        """
        return samples if rows % (samples * self.row_parts) == 0 else 1

    def packs(self, packing: str) -> bool:
        """Whether batches are packed (`DataConfig.packing`)."""
        return packing == "on" or (packing == "auto" and platform_of(self.mesh) in ("cpu", "gpu"))

    def record(
        self,
        role: str,
        adapter: Adapter,
        *,
        step: int = 0,
        metrics: dict[str, Any] | None = None,
        **more: Any,
    ) -> Record:
        """What an artefact of a role on this base says of itself."""
        return artefacts.record_of(
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

    def load_role(
        self, folder: str | pathlib.Path, role: str | None = None
    ) -> tuple[Adapter, Record]:
        """An artefact of this base; refused by name when it belongs to another base or, where
        asked, role.
        """
        adapter, record = artefacts.load_artefact(
            pathlib.Path(folder),
            self.lm,
            weights=self.weights_fingerprint,
            base_name=self.name,
            role=role,
            shardings=self.adapter_shardings,
        )
        known = (
            self.tokenizer.first_fingerprint if record.format == 1 else self.tokenizer.fingerprint
        )
        require(
            record.tokenizer_fingerprint == known,
            f"{folder} was trained with another tokenizer or chat template than that of "
            f"{self.name}; give the folder, the template and the template date it was trained "
            "with.",
        )
        check_turn_end(folder, record, self.tokenizer)
        return adapter, record


def check_turn_end(folder: str | pathlib.Path, record: Record, tokenizer: Tokenizer) -> None:
    """Refuses a reward that was trained with another end of a turn: its scores would be read at a
    token it never saw there.

    Artefacts that state none are of versions that ended every turn with eos.
    """
    if record.role != "reward":
        return
    meant, now = record.turn_end or (tokenizer.eos_id,), tuple(tokenizer.turn_end_ids)
    shown = lambda ids: repr(tokenizer.inner.decode(list(ids)))
    require(
        meant == now,
        f"{folder} learned its scores where a turn ends with {shown(meant)}; with this tokenizer "
        f"and template a turn ends with {shown(now)}: "
        "give the --data.template that it was trained with, or train or import it anew.",
    )


def load_model(model: str | pathlib.Path | ModelOptions, **options: Any) -> Model:
    """Loads a base straight to its place on the mesh.

        load_model("Qwen/Qwen3-0.6B", dtype="bfloat16")

    Args:
        model: A local Hugging Face folder or a hub name, or all options at once.
        options: Fields of `TemplateOptions`, such as dtype, mesh, quantise, template.

    Raises:
        UserError: For a model that is not there, or that the package cannot run.
    """
    if isinstance(model, ModelOptions):
        options = model if not options else dataclasses.replace(model, **options)
    else:
        fields = dataclasses.fields(TemplateOptions)
        known = [field.name for field in fields if field.name != "model"]
        unknown = sorted(set(options) - set(known))
        require(
            not unknown,
            f"load_model has no option {', '.join(unknown)}; it has {', '.join(known)}.",
        )
        options = TemplateOptions(model=str(model), **options)
    without_absent_chips()
    keep_compiled(options.compile_cache)
    folder = hf_checkpoint.find_model(options.model)
    lm, tokenizer = described(options, folder)
    marks: dict[str, bytes] = {}

    def finish(name: str, leaf: jax.Array) -> Tree:
        # The fingerprint is the true base's, whatever becomes of it.
        marks[name] = trees.leaf_mark(name, leaf)
        return quantise_leaf(name, leaf, options.quantise)

    base = hf_checkpoint.load_base(folder, lm.config, lm.base_shardings(), finish=finish)
    return Model(
        str(options.model),
        lm,
        base,
        tokenizer,
        trees.joined_marks(marks),
        options.quantise,
        options.mesh.adapters == "sharded",
    )


def described(options: ModelOptions, folder: pathlib.Path) -> tuple[LanguageModel, Tokenizer]:
    """The functions and the tokenizer of a model in a folder, without its weights.

    Says on standard error which fields of its config.json are passed over.
    """
    if (unread := families.leftovers(folder)) and hosts.is_writer():
        print(
            f"{folder / 'config.json'}: these fields do not change the numbers and are not read: "
            f"{', '.join(unread)}.",
            file=sys.stderr,
        )
    config = families.read_config(
        folder, dtype=options.dtype, param_dtype=options.dtype, remat=options.remat
    )
    mesh = sharding.make_mesh(options.mesh)
    template, date = template_of(options)
    tokenizer = Tokenizer.load(folder, config.vocab_size, template, date)
    asked = date == DATE or (tokenizer.chat is not None and tokenizer.chat.uses_date)
    require(
        asked,
        f"template_date is {date!r}, which no chat template of {options.model} asks for; leave it "
        "out.",
    )
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
    require(
        attention in ("auto", "plain", "blocked"),
        f"attention is {attention!r}; on a CPU it must be auto, plain or blocked.",
    )
    return dataclasses.replace(
        config, unroll=config.layers if config.layers <= _SHALLOW else 1, attention=path
    )


def _choice(config: ModelConfig, mesh: Mesh) -> kernels.Choice:
    return kernels.choose(
        platform_of(mesh),
        config,
        getattr(mesh.devices.flat[0], "compute_capability", None),
        mesh.size,
    )


def attention_paths(lm: LanguageModel) -> dict[str, str]:
    """How attention is computed, and why: `training` (whole sequences, in scoring too) and
    `sampling`.
    """
    path, (best, why) = lm.config.attention, _choice(lm.config, lm.mesh)
    whole = f"{path} ({why if path == best else '--attention asks for it'})"
    sampling = (
        f"prompts {path}, then plain over the cache (one query a row, for which no kernel "
        "is needed)"
    )
    if local := len(lm.config.windowed):
        sampling += (
            f", which holds {lm.config.window} tokens in {local} of {lm.config.layers} layers"
        )
    return {"training": whole, "sampling": sampling}


def say_attention(job: str, lm: LanguageModel) -> None:
    """Prints the attention paths: one line, of the process that writes."""
    if hosts.is_writer():
        print(
            f"{job}: attention: "
            + "; ".join(f"{what}: {path}" for what, path in attention_paths(lm).items())
            + ".",
            file=sys.stderr,
            flush=True,
        )


def weights_program(lm: LanguageModel) -> Program:
    """A base -> the role that full tuning starts from, its weights where the base's are
    (`full_weights`).
    """
    return Program("full_weights", full_weights, out_shardings=Adapter(weights=_base_places(lm)))


def merge_program(lm: LanguageModel) -> Program:
    """(base, adapter) -> a copy of the base with the adapter in it, where the base is.

    Op by op, layers would be taken out of a leaf that is split over devices, each whole onto one of
    them.
    """
    return Program("merged", lora.merge, out_shardings=_base_places(lm))


def _base_places(lm: LanguageModel) -> Tree:
    return trees.map_named(lambda name, _: lm.base_shardings()[name], lm.abstract_base())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The base model and where it computes.

    Attributes:
        model: A local Hugging Face folder or a hub name.
        dtype: Of the frozen base and of activations.
        remat: What the backward pass computes again (less memory, more time): none, dots (all but
            the
            products with weights) or full (whole layers).
        attention: Which path whole sequences take: auto is splash on TPUs, cudnn on GPUs where it
            can be,
            and XLA's own operations elsewhere: blocked (queries in blocks) on one CPU device and on
            GPUs, plain on several CPU devices. A run prints the path and why it is taken.
        quantise: Keep the frozen base's matrices in 8 or 4 bits.
        mesh: Devices along each axis of the mesh.
        compile_cache: A folder that keeps compiled programs for later processes; None: what
            JAX_COMPILATION_CACHE_DIR says, or nothing is kept.
    """

    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["auto", "plain", "blocked", "splash", "cudnn"] = "auto"
    quantise: QuantiseConfig = QuantiseConfig()
    mesh: MeshConfig = MeshConfig()
    compile_cache: str | None = None

    def __post_init__(self) -> None:
        errors.one_of("dtype", self.dtype, config.DTYPES)
        errors.one_of("remat", self.remat, REMAT)
        errors.one_of("attention", self.attention, ("auto", *ATTENTION))

    def check_forward(self, command: str) -> None:
        """UserError for options of the backward pass in a command that has none."""
        errors.unread(self, ("remat",), command, ("training",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateOptions(ModelOptions):
    """What commands that read a tokenizer, and have no data options, are told of its chat template.

    Attributes:
        template: auto (the tokenizer's chat template), none, or a file with a Jinja template.
        template_date: What a template gets that asks for today's date.
    """

    template: str = "auto"
    template_date: str = DATE
