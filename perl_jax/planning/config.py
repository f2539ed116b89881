"""The settings of `perl-jax plan`."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

from perl_jax import errors
from perl_jax.adapters.lora import LoRAConfig
from perl_jax.adapters.quantise import QuantiseConfig
from perl_jax.data.config import DataConfig
from perl_jax.evaluation.best_of import BestOfConfig
from perl_jax.evaluation.compare import EvaluateConfig
from perl_jax.evaluation.score import ScoreConfig
from perl_jax.generation.text import GenerateConfig
from perl_jax.hub.export import ExportConfig
from perl_jax.hub.model import ModelOptions
from perl_jax.models.config import REMAT
from perl_jax.objectives.algorithms import AlgorithmConfig
from perl_jax.runtime.sharding import MeshConfig
from perl_jax.training.commands import (
    DPOCommand,
    RewardCommand,
    RLCommand,
    SFTCommand,
    TrainingCommand,
)
from perl_jax.training.optimizers import OptimizerConfig

JOBS: dict[str, type[TrainingCommand]] = {
    "sft": SFTCommand,
    "reward": RewardCommand,
    "dpo": DPOCommand,
    "rl": RLCommand,
}
# Commands that train nothing; they read artefacts of the planned tuning and lora.
READING: dict[str, type[ModelOptions]] = {
    "evaluate": EvaluateConfig,
    "best-of": BestOfConfig,
    "generate": GenerateConfig,
    "score": ScoreConfig,
    "export": ExportConfig,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Compile a job's real programs for a TPU slice, without a TPU and without weights.

    Prints each program's peak memory per chip by component, its operations, and its collectives
    with their bytes.

    Attributes:
        job: The job to plan: sft, reward, dpo or rl. Or the command to plan: evaluate, best-of,
            generate, score or export, with artefacts of the given tuning and lora.
        model: A known model's name (gemma2-9b, llama3.1-70b, ...) or a folder with its config.json.
        topology: The slice, as generation:shape in chips, such as v4:2x2x1, v5e:4x4, v5p:2x2x2,
            v6e:2x4 or 7x:2x2x1.
        mesh: The devices along each mesh axis, as data=2,fsdp=4,tensor=2. None puts all devices on
            fsdp.
        adapters: replicated puts a whole copy of each adapter on every device; sharded splits
            adapters like the weights they adapt.
        tuning: lora trains adapters, full trains all weights.
        dtype: The dtype of the frozen base and of activations. Full tuning trains float32 weights.
        remat: What the backward pass recomputes: none, dots (everything except products with
            weights) or full (whole layers).
        attention: The attention path for whole sequences; auto is splash.
        quantise: Store the frozen base's matrices in 8 or 4 bits.
        lora: The adapter's rank and targets.
        optimizer: The optimizer, whose state is part of the memory.
        algorithm: The algorithm of rl.
        loss: The objective of dpo.
        batch: Demonstrations, comparisons or episodes per update, over all devices. For evaluate,
            best-of and score: rows at a time. For generate: continuations. export has no batch.
        microbatches: How many parts the batch is split into; they are computed one after the other.
        prompt_length: The prompt's length in tokens; every row is planned at full length.
        response_length: The response's length in tokens.
        effort: How hard the compiler optimises. quick takes a sixth of the time; its peaks are
            within 5 % of those of full. Only full gives the compiler's estimate of seconds.
        search: Try meshes, remat and microbatches, and list the layouts that fit, fastest first.
        json: A file to which the plan is also written as JSON.
    """

    job: Literal["sft", "reward", "dpo", "rl", "evaluate", "best-of", "generate", "score", "export"]
    model: str
    topology: str
    mesh: str | None = None
    adapters: Literal["replicated", "sharded"] = "replicated"
    tuning: Literal["lora", "full"] = "lora"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Literal["none", "dots", "full"] = "full"
    attention: Literal["auto", "plain", "splash"] = "auto"
    quantise: QuantiseConfig = QuantiseConfig()
    lora: LoRAConfig = LoRAConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    loss: Literal["dpo", "ipo", "kto", "orpo"] = "dpo"
    batch: int = 128
    microbatches: int = 1
    prompt_length: int = 512
    response_length: int = 128
    effort: Literal["quick", "full"] = "quick"
    search: bool = False
    json: str | None = None

    def __post_init__(self) -> None:
        errors.in_range(self)
        errors.one_of("job", self.job, (*JOBS, *READING))
        errors.one_of("remat", self.remat, REMAT)
        errors.one_of("effort", self.effort, ("quick", "full"))
        fixed = not self.search or self.mesh is None
        errors.require(fixed, "search tries meshes; leave mesh out, or search.")
        read = self.job == "rl" or self.algorithm == AlgorithmConfig()
        errors.require(read, f"algorithm.* is for the job rl; job is {self.job!r}: leave it out.")
        errors.read_by("loss", self.loss, "dpo", f"the job {self.job}", ("the job dpo",))
        if self.tuning == "full" and self.job != "rl":
            errors.unread(self, ("adapters",), "tuning full", ("tuning lora", "rl"))
        if self.job in READING:
            errors.unread(
                self, ("microbatches", "optimizer", "remat", "search"), self.job, tuple(JOBS)
            )
        self.mesh_config(1)
        self.job_config()

    def mesh_config(self, devices: int) -> MeshConfig:
        """Returns the mesh for `devices` devices; raises UserError if the text of `mesh` is
        malformed.

        `devices` is used only if `mesh` is None: all of them are then along fsdp.
        """
        if self.mesh is None:
            return MeshConfig(data=1, fsdp=devices, adapters=self.adapters)
        texts = self.mesh.split(",")
        found = [re.fullmatch(r"(data|fsdp|tensor)=(\d+)", text.strip()) for text in texts]
        parts = [part for part in found if part]
        errors.require(
            parts == found, f"mesh is {self.mesh!r}; write it as data=2,fsdp=4,tensor=2."
        )
        return MeshConfig(**{part[1]: int(part[2]) for part in parts}, adapters=self.adapters)

    def job_config(self) -> ModelOptions:
        """Returns the config of the planned job, as its own command would build it; paths of
        artefacts and runs are the placeholder "-".
        """
        if self.job in READING:
            return self._reading_config()
        data = DataConfig(
            max_prompt_length=self.prompt_length, max_response_length=self.response_length
        )
        more: dict[str, Any] = (
            {"reward": ("-",), "algorithm": self.algorithm} if self.job == "rl" else {}
        )
        if self.job == "dpo":
            more = {"loss": self.loss}
        return JOBS[self.job](
            run="-",
            model=self.model,
            tuning=self.tuning,
            dtype=self.dtype,
            remat=self.remat,
            quantise=self.quantise,
            lora=self.lora,
            optimizer=self.optimizer,
            data=data,
            batch_size=self.batch,
            microbatches=self.microbatches,
            **more,
        )

    def _reading_config(self) -> ModelOptions:
        """Returns the config of a command that trains nothing; paths of artefacts and files are the
        placeholder "-".
        """
        base: dict[str, Any] = {"model": self.model, "dtype": self.dtype, "quantise": self.quantise}
        data = DataConfig(
            max_prompt_length=self.prompt_length, max_response_length=self.response_length
        )
        lengths = {
            "max_prompt_length": self.prompt_length,
            "max_response_length": self.response_length,
        }
        more: dict[str, Any] = {
            "evaluate": {
                "run": "-",
                "policy": "-",
                "reward": ("-",),
                "data": data,
                "batch_size": self.batch,
            },
            "best-of": {
                "policy": "-",
                "reward": ("-",),
                "output": "-",
                "data": data,
                "batch_size": self.batch,
            },
            "generate": {
                "prompt": "-" * self.prompt_length,
                "adapter": "-",
                "max_new_tokens": self.response_length,
                "samples": self.batch,
            },
            "score": {"input": "-", "adapter": "-", "batch_size": self.batch, **lengths},
            "export": {
                "adapter": "-",
                "format": "merged" if self.quantise.kind == "none" else "peft",
                "to": "-",
            },
        }[self.job]
        return READING[self.job](**base, **more)
