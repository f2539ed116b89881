"""Trains small bases from random weights, for quickstarts and tests that download nothing.

A decoder is trained on a task's `corpus` rows and saved as a Hugging Face folder, which every
command takes as --model. Pre-training at scale is not a purpose of this package.
"""

from __future__ import annotations

import dataclasses

import jax

from perl_jax import errors
from perl_jax.data.dataset import Dataset, of_task
from perl_jax.data.loading import check_context
from perl_jax.data.tasks import TaskLike, task_of
from perl_jax.hub.attention_path import for_devices
from perl_jax.hub.model import Model, weights_program
from perl_jax.hub.tokenizer import Tokenizer, train_bpe, word_tokenizer
from perl_jax.hub.weights import save_base
from perl_jax.models.config import ModelConfig
from perl_jax.models.language_model import LanguageModel
from perl_jax.objectives import supervised
from perl_jax.runs.folder import exist, is_finished, open_run
from perl_jax.runs.owner import owned
from perl_jax.runtime import files, hosts, sharding, trees
from perl_jax.runtime.outputs import check_writable, filled_folder
from perl_jax.runtime.programs import use_compilation_cache
from perl_jax.runtime.seeds import random_key
from perl_jax.training import cost
from perl_jax.training.commands import TrainingCommand
from perl_jax.training.fit import Supervised, begin, supervised_loop, validate_policy
from perl_jax.training.loop import train


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig(TrainingCommand):
    """A decoder's shape and how long to train it.

    Attributes:
        model: The folder that the base is saved to.
        tuning: full, because a base is trained from random weights.
        width: Size of the hidden states.
        ffn_width: Hidden size of the feed-forward layers.
        layers: Number of layers.
        heads: Query heads; they must divide the width.
        kv_heads: Key and value heads; they must divide the query heads.
        vocab_size: Size of the byte-level BPE trained on the corpus; a task with a closed
            vocabulary uses its words instead.
    """

    tuning: str = "full"
    width: int = 128
    ffn_width: int = 256
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    vocab_size: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.require(
            self.tuning == "full",
            f"tuning is {self.tuning!r}; a base is trained from nothing, so it must be 'full'.",
        )
        errors.require(
            self.width % self.heads == 0,
            f"width is {self.width}; it must be a multiple of heads, {self.heads}.",
        )
        self.check_headless("base")
        # No base is loaded that could be quantised, and the new tokenizer has no chat template.
        errors.unread(
            self,
            ("quantise.kind", "data.template", "data.template_date"),
            "base",
            ("sft", "reward", "rl", "dpo"),
        )


CORPUS = Supervised(
    "base",
    "policy",
    "corpus",
    supervised.sft_objective,
    validate_policy,
    None,
    ("train/loss", "validation/loss"),
)


def _task(config: BaseConfig) -> TaskLike:
    """Returns the task of the corpus.

    Raises UserError if `vocab_size` is set and the task has a closed vocabulary, which replaces it.
    """
    task = task_of(config.data)
    if task.vocabulary is not None:
        errors.unread(
            config,
            ("vocab_size",),
            f"the task {task.name}, whose words are its vocabulary,",
            ("a task with any words",),
        )
    return task


def _tokenizer(config: BaseConfig, task: TaskLike, dataset: Dataset) -> Tokenizer:
    """Returns a tokenizer: the words of a task with a closed vocabulary, or a BPE of the corpus.

    Args:
        config: Has the vocabulary's size.
        task: The task of the corpus.
        dataset: The corpus, read for a BPE only.
    """
    if task.vocabulary is not None:
        return word_tokenizer(list(task.vocabulary))
    return train_bpe((row["text"] for row in dataset.rows("train")), config.vocab_size)


def train_base(config: BaseConfig) -> files.Path:
    """Trains a base and writes it as a Hugging Face folder, `config.model`; returns that folder.

    A finished base is left as it is. Raises UserError if the folder holds a model that this run did
    not train.
    """
    with owned(config.run):
        task = _task(config)
        run = open_run("base", config)
        folder, target = run.folder, files.path_of(config.model)
        if exist(target / "config.json"):
            if is_finished(run, None, "cost.json"):
                return target
            same = run.replaces is None or run.replaces.get("model") == config.model
            ours = same and exist(folder / "checkpoints")
            errors.require(
                ours,
                f"{target} already holds a model that this run did not train; give another --model "
                "folder.",
            )
        if hosts.is_writer():
            check_writable(target / "config.json")
        dataset = of_task(config.data, CORPUS.kind, ("train", "validation"))
        use_compilation_cache(config.compile_cache)
        tokenizer = _tokenizer(config, task, dataset)
        shape = ModelConfig(
            vocab_size=-(-len(tokenizer) // 8) * 8,
            width=config.width,
            ffn_width=config.ffn_width,
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.width // config.heads,
            max_positions=config.data.max_prompt_length + config.data.max_response_length,
            dtype=config.dtype,
            remat=config.remat,
        )
        mesh = sharding.make_mesh(config.mesh)
        lm = LanguageModel(for_devices(shape, mesh, config.attention), mesh)
        shardings = lm.base_shardings()
        initial = lm.init_base(random_key(config.seed))
        base = trees.map_named(lambda name, leaf: jax.device_put(leaf, shardings[name]), initial)
        model = Model(str(target), lm, base, tokenizer, trees.fingerprint(base))
        check_context(model, config.data)
        role = weights_program(lm)(base)
        state, optimizers = begin(model, config, CORPUS, role)
        del initial, base, role
        loop, program = supervised_loop(model, dataset, "train", config, CORPUS, state, optimizers)
        state, timings, _ = train(config, state, loop, run)
        weights = hosts.fetch(state.roles["policy"].weights)
        if hosts.is_writer():
            _save(target, shape, weights, tokenizer)
        hosts.barrier("base written")
        cost.write_cost(folder, model, state, {"learn": program}, timings)
        return target


def _save(target: files.Path, shape: ModelConfig, weights, tokenizer: Tokenizer) -> None:
    """Writes a model's folder: tokenizer and weights first, and `config.json` last.

    So the presence of `config.json` shows that the folder is complete.

    Args:
        target: The folder; created with its parents. An earlier base of the same run is replaced.
        shape: The decoder's config.
        weights: The weights of the base, on the host.
        tokenizer: The tokenizer.
    """
    with filled_folder(target, "config.json") as folder:
        tokenizer.save(folder)
        save_base(folder, shape, weights, tokenizer.token_ids())
