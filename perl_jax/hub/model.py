"""A base model in memory: its functions, weights, tokenizer and mesh; it loads and places roles."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from perl_jax.adapters import combine
from perl_jax.adapters.full import full_weights
from perl_jax.adapters.lora import Adapter
from perl_jax.adapters.quantise import QuantiseConfig, quantise_leaf
from perl_jax.errors import in_range, one_of, require, unread
from perl_jax.hub import artefacts, config_json, weights
from perl_jax.hub.artefacts import Record
from perl_jax.hub.attention_path import for_devices
from perl_jax.hub.chat import DATE
from perl_jax.hub.tokenizer import Tokenizer
from perl_jax.models import config
from perl_jax.models.config import ATTENTION, REMAT
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import files, hosts, progress, sharding, trees
from perl_jax.runtime.platforms import platform_of, use_cpu_if_no_accelerator
from perl_jax.runtime.programs import Program, use_compilation_cache
from perl_jax.runtime.sharding import MeshConfig
from perl_jax.types import Tree


@dataclasses.dataclass(frozen=True)
class Model:
    """A frozen base model, with all that training, sampling and scoring need of it.

    Attributes:
        name: The model's folder or hub name.
        lm: The model's functions and its mesh.
        base: The base weights; None if no role reads them.
        tokenizer: The tokenizer with its chat template.
        weights_fingerprint: Identifies the base weights before quantisation (`trees.fingerprint`).
        quantise: How the base is quantised.
        shard_adapters: Whether adapters are sharded like the base's matrices, rather than
            replicated.
    """

    name: str
    lm: LanguageModel
    base: Tree
    tokenizer: Tokenizer
    weights_fingerprint: str
    quantise: QuantiseConfig = QuantiseConfig()
    shard_adapters: bool = False

    @property
    def mesh(self) -> Mesh:
        """The mesh of devices."""
        return self.lm.mesh

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the base model: its weights and the config fields that affect
        its outputs.
        """
        return artefacts.base_fingerprint(self.lm.config, self.weights_fingerprint)

    def adapter_shardings(self, abstract: Tree) -> Tree:
        """Returns the shardings of a role or a train state, as a tree like it.

        Full weights are sharded like the base, LoRA parameters too if `shard_adapters` is True; all
        other leaves are replicated.

        Args:
            abstract: A role or a train state, of arrays or of their shapes.
        """
        placed = {f"weights/{name}": stored for name, stored in self.lm.base_shardings().items()}
        if self.shard_adapters:
            placed |= {f"lora/{name}": stored for name, stored in self.lm.lora_shardings().items()}
        return sharding.state_shardings(abstract, placed, self.mesh)

    def place(self, tree: Tree) -> Tree:
        """Puts a role or a train state on the devices and returns it, with the shardings of
        `adapter_shardings`.
        """
        return jax.device_put(tree, self.adapter_shardings(tree))

    def relieved(self, roles: Iterable[Adapter]) -> Model:
        """Returns this model with `base` None if every role has weights of its own, else this
        model.

        The memory of the base is freed when no other model refers to it.

        Args:
            roles: The roles that will be computed.
        """
        return (
            dataclasses.replace(self, base=None)
            if all(role.weights is not None for role in roles)
            else self
        )

    @property
    def row_parts(self) -> int:
        """The number of parts that the rows of a batch are split into over the mesh."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def shared_prompts(self, rows: int, samples: int) -> int:
        """Returns how many samples of a prompt share one copy of the prompt's tokens.

        It is `samples` if each of the `row_parts` (data x fsdp) gets whole prompts with all their
        samples, else 1.

        Args:
            rows: The number of responses in a batch.
            samples: The number of samples per prompt.
        """
        return samples if rows % (samples * self.row_parts) == 0 else 1

    def packs(self, packing: str) -> bool:
        """Returns whether batches are packed.

        Args:
            packing: on, off, or auto, which packs on CPUs and GPUs (`DataConfig.packing`).
        """
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
        """Returns the record of an artefact of a role on this base.

        Args:
            role: policy, reward or value.
            adapter: The role's tree.
            step: The training step that the role is from.
            metrics: Metrics at that step; None for no metrics.
            more: Further fields of `Record`, such as score_mean.
        """
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

    def load_role(self, folder: files.PathLike, role: str | None = None) -> tuple[Adapter, Record]:
        """Returns (adapter, record) of an artefact; the adapter is placed on the mesh.

        Args:
            folder: The artefact's folder.
            role: The role that the artefact must have; None accepts any.

        Raises:
            UserError: The artefact belongs to another base or tokenizer, has another role, or is
                damaged.
        """
        adapter, record = artefacts.load_artefact(
            files.path_of(folder),
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


def check_turn_end(folder: files.PathLike, record: Record, tokenizer: Tokenizer) -> None:
    """Raises UserError for a reward model that was trained with other ids at the end of a turn.

    Its scores would be read at a token at which it was not trained. Artefacts without recorded ids
    are from versions that ended every turn with eos. Other roles are not checked.

    Args:
        folder: The artefact's folder, for the message.
        record: Its record.
        tokenizer: The model's tokenizer.
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


def load_model(
    model: files.PathLike | ModelOptions,
    ready: Callable[[Model], None] | None = None,
    **options: Any,
) -> Model:
    """Loads a base model from disk directly onto its devices and returns it with its tokenizer.

        load_model("Qwen/Qwen3-0.6B", dtype="bfloat16")

    Uses the CPU if there is no accelerator, and the compilation cache that the options name.

    Args:
        model: A local folder in Hugging Face's format, a hub name, or all options in one object.
        ready: Called before the weights are read, with a model that lacks them: for checks that
            need the tokenizer and the config alone. None: nothing is called.
        options: Fields of `TemplateOptions`, such as dtype, mesh, quantise, template.

    Raises:
        UserError: There is no such model, its config is not supported, its weights are damaged, or
            an option is unknown.
    """
    if isinstance(model, ModelOptions):
        settings = model if not options else dataclasses.replace(model, **options)
    else:
        fields = dataclasses.fields(TemplateOptions)
        known = [field.name for field in fields if field.name != "model"]
        unknown = sorted(set(options) - set(known))
        require(
            not unknown,
            f"load_model has no option {', '.join(unknown)}; it has {', '.join(known)}.",
        )
        settings = TemplateOptions(model=str(model), **options)
    use_cpu_if_no_accelerator()
    use_compilation_cache(settings.compile_cache)
    folder = weights.find_model(settings.model)
    lm, tokenizer = described(settings, folder)
    sharded = settings.mesh.adapters == "sharded"
    if ready is not None:
        ready(Model(str(settings.model), lm, None, tokenizer, "", settings.quantise, sharded))
    marks: dict[str, bytes] = {}

    def finish(name: str, leaf: jax.Array) -> Tree:
        """Records a leaf's fingerprint and returns the leaf as it is held."""
        # Before quantisation: the fingerprint identifies the unquantised base.
        marks[name] = trees.leaf_mark(name, leaf)
        return quantise_leaf(name, leaf, settings.quantise)

    with progress.activity(f"loading {settings.model}"):
        base = weights.load_base(folder, lm.config, lm.base_shardings(), finish=finish)
    return Model(
        str(settings.model),
        lm,
        base,
        tokenizer,
        trees.fingerprint_of_marks(marks),
        settings.quantise,
        sharded,
    )


def described(options: ModelOptions, folder: pathlib.Path) -> tuple[LanguageModel, Tokenizer]:
    """Returns the functions and the tokenizer of a model in a folder, without its weights.

    Prints to standard error which fields of its config.json are ignored.

    Args:
        options: The model's options. The chat template is read from their field `data`, if there is
            one, else from the options themselves.
        folder: The model's folder.

    Raises:
        UserError: The config or the tokenizer is not supported, or the template date is not read by
            the chat template.
    """
    if (ignored := config_json.leftovers(folder)) and hosts.is_writer():
        print(
            f"{folder / 'config.json'}: these fields do not affect outputs and are ignored: "
            f"{', '.join(ignored)}.",
            file=sys.stderr,
        )
    config = config_json.read_config(
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
    """Returns (chat template, template date): the fields `template` and `template_date` of
    `options.data`, or of `options` if there is no field `data`.

    Missing fields give auto and `DATE`.
    """
    source = getattr(options, "data", options)
    return getattr(source, "template", "auto"), getattr(source, "template_date", DATE)


def weights_program(lm: LanguageModel) -> Program:
    """Returns the compiled program base -> Adapter with full weights in float32, from which full
    tuning starts (`full_weights`).
    """
    return Program("full_weights", full_weights, out_shardings=Adapter(weights=_base_shardings(lm)))


def merge_program(lm: LanguageModel) -> Program:
    """Returns the compiled program (base, adapter) -> the base weights with the adapter merged in,
    with the shardings of the base.
    """
    # Without compilation each layer, taken out of a sharded leaf, would be put as a whole on one
    # device.
    return Program("merged", combine.merge, out_shardings=_base_shardings(lm))


def _base_shardings(lm: LanguageModel) -> Tree:
    """Returns the shardings of the base weights, as a tree like them."""
    return trees.map_named(lambda name, _: lm.base_shardings()[name], lm.abstract_base())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The base model and how it is computed.

    Attributes:
        model: The base model: a folder in Hugging Face's format, on a disk or in a bucket
            (gs://BUCKET/PATH), or a hub name (NAME or NAME@REVISION).
        dtype: The dtype of the frozen base and of activations.
        remat: What the backward pass recomputes to save memory: none, dots (everything except
            products with weights) or full (whole layers).
        attention: The attention path for whole sequences. auto picks splash on TPUs, cudnn on GPUs
            where it is supported, and otherwise XLA operations: blocked (in blocks of queries) on
            GPUs and a single CPU device, plain on several CPU devices. Each run prints its path and
            the reason.
        quantise: Store the frozen base's matrices in 8 or 4 bits.
        mesh: The number of devices along each axis of the mesh.
        compile_cache: A folder, on a disk or in a bucket, that keeps compiled programs for later
            processes. None uses JAX_COMPILATION_CACHE_DIR, or keeps none if that is not set.
    """

    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["auto", "plain", "blocked", "splash", "cudnn"] = "auto"
    quantise: QuantiseConfig = QuantiseConfig()
    mesh: MeshConfig = MeshConfig()
    compile_cache: str | None = None

    def __post_init__(self) -> None:
        in_range(self)
        one_of("dtype", self.dtype, config.DTYPES)
        one_of("remat", self.remat, REMAT)
        one_of("attention", self.attention, ("auto", *ATTENTION))

    def check_forward(self, command: str) -> None:
        """Raises UserError if `remat`, an option of the backward pass, is set.

        Args:
            command: The name of a command that computes no gradients, for the message.
        """
        unread(self, ("remat",), command, ("training",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateOptions(ModelOptions):
    """The model options and the chat template, for commands that read no data set.

    Attributes:
        template: The chat template: auto (the tokenizer's own), none, or the path of a Jinja file.
        template_date: The date (YYYY-MM-DD) that templates get as today's.
    """

    template: str = "auto"
    template_date: str = DATE
