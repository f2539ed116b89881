"""TRL's trainers with PEFT, and transformers' generate, as contenders (the protocol is in
`contest.py`).

Claim     What TRL takes for the steps of the contest at the fastest of its settings, its trainers
          and their training_step as they are: RewardTrainer, RLOOTrainer, GRPOTrainer.
Command   python experiments/benchmarks/contest/contender_trl.py --work FOLDER --job reward-equal (a
          line when warm, then one for each line "step" that it reads)
Hardware  2 CPU cores, 24 GiB, partly shared with other work (docs/log/speed_cpu.md)
Time      half a minute to the first line of a reward job, two minutes to that of an RL job
Numbers   seconds a step: reward-equal 4.86, reward-ragged 6.56, rl-model 34.6, rl-function 28.7,
          generate 9.8

What was tried is in `BEST`'s comments; what a step takes beyond the work that was counted:
- A batch of pairs is padded to its longest row; one pair at a time, only to the longer of its two.
- RLOOTrainer computes the log-probabilities of its own samples again before it learns from them.
- Without a GPU the logits of all positions are computed, of prompts as well.
- Padding and eos are kept from being sampled by suppress_tokens, which costs a pass over the
logits.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import contender
import torch
import work
from contender import Parts, Protocol
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer, RewardCommand, RewardTrainer, RLOOConfig, RLOOTrainer

PACKAGES = ("trl", "peft", "transformers", "torch")
WARM_UP = 2
UNSAMPLED = [work.MODEL["pad_token_id"], work.MODEL["eos_token_id"]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """at_once: pairs or responses in one pass of the learner, which adds up the gradients of a
    step's passes.

    attention: transformers' name for it. cache: of keys and values in generation; None is the one
    that grows. merged: adapters added to the base's weights beforehand (the job generate alone).
    threads: None is torch's own choice.
    """

    at_once: int
    attention: str = "sdpa"
    cache: str | None = None
    merged: bool = True
    threads: int | None = None


DEVICE = work.SIZE.platform
DTYPE = getattr(torch, work.SIZE.dtype)
# On a CPU. In seconds of one core, float32: reward-equal 1 pair at a time 8.6, 2 8.8, 4 9.2, 8
# 10.0; ragged 1 10.5, 2 13.4, 8 26; rl-function 2 responses at a time 41.7, 4 41.2, 8 41.6, 32
# 48.2. Of no help: eager attention (+2 % in training, +22 % in generation), a static cache (+5 %),
# torch.compile (training +7 %, generation -2 % after a minute of compiling, with a static cache +40
# %), malloc without mmap or with huge pages (within 4 %), continuous batching (5 times as long).
# Adapters merged: generation -2 %.
BEST = {
    "reward-equal": Settings(at_once=1),
    "reward-ragged": Settings(at_once=1),
    "rl-model": Settings(at_once=4),
    "rl-function": Settings(at_once=4),
    "generate": Settings(at_once=work.PROMPTS * work.SAMPLES),
}
if DEVICE == "cuda":
    # The batch at once: a GPU of 80 GB has room for it, and nine tenths of an RL step are
    # generation.
    BEST = {
        job: dataclasses.replace(
            best, at_once=work.PAIRS if job.startswith("reward") else work.PROMPTS * work.SAMPLES
        )
        for job, best in BEST.items()
    }


def settle() -> None:
    """Waits for what the device still does."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Turns(TrainerCallback):
    """Lets the trainer take its first steps, then one for each that is asked for, and says what it
    took.

    The trainer waits at the end of a step, so that the next one's rows are read within its own
    seconds. rest: the part to which seconds belong that are in no other, None where there are no
    parts.
    """

    def __init__(self, protocol: Protocol, job: str, settings: Settings, rest: str | None):
        self.protocol, self.job, self.settings, self.rest = protocol, job, settings, rest
        self.parts, self.tokens = Parts(settle), 0

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: torch.nn.Module, **_: Any
    ) -> None:
        contender.check_tokens(self.job, self.tokens)
        parts = self.parts.take()
        if state.global_step > WARM_UP:
            self.protocol.report(self.tokens, parts, self.rest)
        self.tokens = 0
        if state.global_step == WARM_UP:
            self.protocol.ready(
                "trl", contender.versions(PACKAGES), describe(self.job, self.settings, model)
            )
        if state.global_step >= WARM_UP:
            control.should_training_stop = not self.protocol.wait()


class CountedReward(RewardTrainer):
    """TRL's trainer, which also counts the tokens it sees."""

    turns: Turns

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], *values: Any, **named: Any
    ) -> Any:
        self.turns.tokens += int(inputs["attention_mask"].sum())
        return super().compute_loss(model, inputs, *values, **named)


class TimedPolicy:
    """Mixed into TRL's online trainers: the seconds of a step's parts, and the tokens sampled."""

    turns: Turns

    def _generate_single_turn(self, *values: Any, **named: Any) -> Any:
        with self.turns.parts.part("generate"):
            return super()._generate_single_turn(*values, **named)

    def _calculate_rewards(
        self, inputs: Any, prompts: list[str], completions: list[str], ids: list[list[int]]
    ) -> torch.Tensor:
        for row in ids:
            self.turns.tokens += contender.check_tokens(self.turns.job, len(row), work.NEW_TOKENS)
        with self.turns.parts.part("score"):
            return super()._calculate_rewards(inputs, prompts, completions, ids)

    def _get_per_token_logps_and_entropies(self, model: Any, *values: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(model, *values, **named)
        without = any(
            module.disable_adapters
            for module in model.modules()
            if isinstance(module, BaseTunerLayer)
        )
        with self.turns.parts.part(
            "reference" if without or model is self.ref_model else "policy again"
        ):
            return super()._get_per_token_logps_and_entropies(model, *values, **named)


class TimedRLOO(TimedPolicy, RLOOTrainer):
    pass


class TimedGRPO(TimedPolicy, GRPOTrainer):
    pass


def describe(job: str, settings: Settings, model: torch.nn.Module) -> str:
    """The settings in a line, with the count of numbers that are trained."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    how = f"{settings.at_once} at a time, {trained:,} trained"
    if job == "generate":
        how = f"adapters {'merged' if settings.merged else 'apart'}"
    cache = "" if job.startswith("reward") else f" {settings.cache or 'growing'} cache,"
    return (
        f"{how}, {settings.attention} attention,{cache} {torch.get_num_threads()} threads, "
        f"{work.SIZE.dtype} on {DEVICE}"
    )


def lora(task: str) -> LoraConfig:
    return LoraConfig(
        task_type=task,
        r=work.RANK,
        lora_alpha=work.ALPHA,
        lora_dropout=0.0,
        target_modules=list(work.TARGETS),
    )


def training(settings: Settings, folder: str, batch: int) -> dict[str, Any]:
    """Arguments of every trainer: one batch a step, nothing logged or saved."""
    return {
        "output_dir": folder,
        "use_cpu": DEVICE == "cpu",
        "bf16": torch.bfloat16 == DTYPE,
        "per_device_train_batch_size": settings.at_once,
        "gradient_accumulation_steps": batch // settings.at_once,
        "max_steps": 10**6,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }


def load(kind: Any, folder: pathlib.Path, settings: Settings, **named: Any) -> PreTrainedModel:
    return kind.from_pretrained(
        folder, dtype=DTYPE, attn_implementation=settings.attention, **named
    )


def train_reward(
    folder: pathlib.Path, job: str, settings: Settings, lora_config: LoraConfig | None, turns: Turns
) -> None:
    with tempfile.TemporaryDirectory() as output:
        config = RewardCommand(
            **training(settings, output, work.PAIRS),
            train_sampling_strategy="sequential",
            pad_to_multiple_of=None,
        )
        trainer = CountedReward(
            model=load(
                AutoModelForSequenceClassification, folder / "model", settings, num_labels=1
            ),
            args=config,
            train_dataset=Dataset.from_list(contender.read_rows(folder, job)),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
            callbacks=[turns],
            peft_config=lora_config,
        )
        trainer.turns = turns
        trainer.train()


def even_words(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return contender.even_words(prompts, completions)


def train_policy(
    folder: pathlib.Path, job: str, settings: Settings, lora_config: LoraConfig | None, turns: Turns
) -> None:
    kind, kind_config = {
        "rl-model": (TimedRLOO, RLOOConfig),
        "rl-function": (TimedGRPO, GRPOConfig),
    }[job]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    reward = even_words
    if job == "rl-model":
        reward = load(
            AutoModelForSequenceClassification, folder / "model", settings, num_labels=1
        ).eval()
    with tempfile.TemporaryDirectory() as output:
        config = kind_config(
            **training(settings, output, work.PROMPTS * work.SAMPLES),
            num_generations=work.SAMPLES,
            max_completion_length=work.NEW_TOKENS,
            temperature=1.0,
            top_k=0,
            beta=work.KL_WEIGHT,
            shuffle_dataset=False,
            cache_implementation=settings.cache,
            generation_kwargs={"suppress_tokens": UNSAMPLED},
        )
        trainer = kind(
            model=load(AutoModelForCausalLM, folder / "model", settings),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(contender.read_rows(folder, job)),
            processing_class=tokenizer,
            reward_processing_classes=AutoTokenizer.from_pretrained(folder / "model"),
            callbacks=[turns],
            peft_config=lora_config,
        )
        trainer.turns = turns
        trainer.train()


def batches(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]
) -> Iterator[dict[str, torch.Tensor]]:
    """Prompts of a batch, each as often as it is sampled from, batch after batch without end."""
    while True:
        for start in range(0, len(rows), work.PROMPTS):
            texts = [
                row["prompt"]
                for row in rows[start : start + work.PROMPTS]
                for _ in range(work.SAMPLES)
            ]
            yield dict(
                tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(DEVICE)
            )


def sample(model: Any, inputs: dict[str, torch.Tensor], config: GenerationConfig) -> int:
    """How many tokens were generated; ValueError where a row has not all of its own."""
    with torch.inference_mode():
        ids = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
    ends = torch.isin(ids, torch.tensor(UNSAMPLED, device=DEVICE)).sum()
    return contender.check_tokens("generate", ids.numel() - int(ends))


def generate(
    folder: pathlib.Path, settings: Settings, lora_config: LoraConfig | None, protocol: Protocol
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = load(AutoModelForCausalLM, folder / "model", settings).to(DEVICE).eval()
    if lora_config is not None:
        model = get_peft_model(model, lora_config).eval()
        model = model.merge_and_unload() if settings.merged else model
    config = GenerationConfig(
        max_new_tokens=work.NEW_TOKENS,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        suppress_tokens=UNSAMPLED,
        pad_token_id=UNSAMPLED[0],
        eos_token_id=UNSAMPLED[1],
        cache_implementation=settings.cache,
    )
    for step, inputs in enumerate(batches(tokenizer, contender.read_rows(folder, "generate"))):
        tokens = sample(model, inputs, config)
        if step + 1 > WARM_UP:
            protocol.report(tokens, {})
        if step + 1 == WARM_UP:
            protocol.ready(
                "trl", contender.versions(PACKAGES), describe("generate", settings, model)
            )
        if step + 1 >= WARM_UP and not protocol.wait():
            return


def main() -> None:
    parser = contender.parser(__doc__, tuple(work.JOBS))
    parser.add_argument(
        "--settings",
        type=json.loads,
        default={},
        help="JSON: fields of Settings in the place of the best ones",
    )
    arguments = parser.parse_args()
    protocol, job, folder = Protocol(), arguments.job, arguments.work
    settings = dataclasses.replace(BEST[job], **arguments.settings)
    protocol.settle = settle
    if DEVICE == "cuda":
        protocol.peak_bytes = torch.cuda.max_memory_allocated
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    reward = job.startswith("reward")
    lora_config = lora("SEQ_CLS" if reward else "CAUSAL_LM") if arguments.tuning == "lora" else None
    if job == "generate":
        generate(folder, settings, lora_config, protocol)
    elif reward:
        train_reward(folder, job, settings, lora_config, Turns(protocol, job, settings, None))
    else:
        train_policy(folder, job, settings, lora_config, Turns(protocol, job, settings, "learn"))


if __name__ == "__main__":
    main()
