# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Reinforcement learning from human feedback on one chip, with perl_jax
#
# This notebook trains a small chat model to answer people the way they prefer, and then to answer
# in fewer words. It takes three steps, each of which trains a small adapter over one frozen model:
#
# 1. **SFT** fits an adapter to answers that people preferred.
# 2. **A reward model** learns to tell preferred answers from others.
# 3. **RL** samples answers, scores them, and moves the adapter towards higher scores.
#
# The rows are real: questions to an assistant, each with the answer that a person preferred and the
# one that they did not (Bai et al. 2022, *Training a Helpful and Harmless Assistant*, MIT licence).
# The model is SmolLM2-135M-Instruct. In Colab or Kaggle choose a TPU or a GPU as the runtime. A CPU
# works too; give it smaller numbers in the settings below, such as a fifth of the steps and a
# `batch_size` of 8.

# %% [markdown]
# ## Install
#
# `SOURCE` is where perl_jax comes from: the address of the repository in which you found this
# notebook, such as `git+https://HOST/OWNER/perl_jax`, or a folder with a copy of it. If perl_jax is
# installed already, nothing happens here.

# %%
import importlib.util
import pathlib
import shutil
import subprocess
import sys

SOURCE = "git+https://HOST/OWNER/perl_jax"

if importlib.util.find_spec("perl_jax") is None:
    tpu = pathlib.Path("/dev/accel0").exists() or pathlib.Path("/dev/vfio/0").exists()
    accelerator = "[tpu]" if tpu else "[cuda]" if shutil.which("nvidia-smi") else ""
    package = f"perl_jax{accelerator} @ {SOURCE}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)

# %% [markdown]
# ## Settings
#
# Change these to train longer or on a model of your own. `model` is a name on the Hugging Face hub
# or a folder. The environment variable `PERL_JAX_NOTEBOOK` may hold other values as JSON.

# %%
import gzip
import html
import json
import os

import jax
import matplotlib.pyplot as plt
from huggingface_hub import hf_hub_download
from IPython.display import HTML, display

import perl_jax as pj

SETTINGS = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "rows": None,  # a file like the one that is downloaded; None: download it
    "train": 320,  # rows
    "held_out": 64,
    "prompt": 128,  # tokens
    "response": 80,
    "sft_steps": 60,
    "reward_steps": 120,
    "rl_steps": 40,
    "batch_size": 32,
} | json.loads(os.environ.get("PERL_JAX_NOTEBOOK", "{}"))

print(f"perl_jax {pj.__version__} on {jax.devices()}")

# %% [markdown]
# ## Rows
#
# A row is a dictionary. Each task reads the columns that it needs: SFT `prompt` and `response`, the
# reward model `prompt`, `chosen` and `rejected`, RL `prompt`. Only dialogues with one question and
# short answers are kept. The last rows are held out: they choose the best step, and show what was
# learned.

# %%
HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "


def comparison(line):
    """Returns a row of a line of the file; None for several questions or a long answer."""
    dialogue = json.loads(line)
    prompt, _, chosen = dialogue["chosen"].rpartition(ASSISTANT)
    same, _, rejected = dialogue["rejected"].rpartition(ASSISTANT)
    lengths = [len(answer.split()) for answer in (chosen, rejected)]
    if prompt != same or ASSISTANT in prompt or min(lengths) == 0 or max(lengths) > 50:
        return None
    return {
        "prompt": prompt.removeprefix(HUMAN).strip(),
        "chosen": chosen.strip(),
        "rejected": rejected.strip(),
    }


path = SETTINGS["rows"] or hf_hub_download(
    "Anthropic/hh-rlhf", "helpful-base/test.jsonl.gz", repo_type="dataset"
)
with gzip.open(path, "rt", encoding="utf-8") as lines:
    found = [row for line in lines if (row := comparison(line)) is not None]

train, held_out = found[: SETTINGS["train"]], found[-SETTINGS["held_out"] :]
demonstrations = [{"prompt": row["prompt"], "response": row["chosen"]} for row in train]
questions = [{"prompt": row["prompt"]} for row in train]
print(f"{len(found)} comparisons, of which {len(train)} are trained on. The first one:")
for name, text in train[0].items():
    print(f"  {name:<9} {text[:100]}")

# %% [markdown]
# ## The model
#
# One frozen copy of the weights serves every role. On an accelerator they are in bfloat16.

# %%
model = pj.load_model(
    SETTINGS["model"], dtype="float32" if jax.default_backend() == "cpu" else "bfloat16"
)
shared = {
    "data": pj.DataConfig(
        max_prompt_length=SETTINGS["prompt"], max_response_length=SETTINGS["response"]
    ),
    "batch_size": SETTINGS["batch_size"],
}

# %% [markdown]
# ## 1. SFT

# %%
sft = pj.train_sft(model, demonstrations, pj.SFTConfig(steps=SETTINGS["sft_steps"], **shared))

# %% [markdown]
# ## 2. A reward model
#
# The accuracy is the share of held-out comparisons in which the preferred answer gets the higher
# score. People agree with each other on about 7 of 10 such comparisons; a model of this size is
# right a little more often than chance.

# %%
judge = pj.train_reward(
    model,
    train,
    pj.RewardConfig(steps=SETTINGS["reward_steps"], evaluate_every=20, **shared),
    validation=held_out,
)

# %% [markdown]
# ## 3. RL
#
# A reward may also be a Python function of prompts, responses and rows. This one prefers short
# answers: 0 for an empty answer, or for one of 40 words and more, and up to 1 for a few words. RLOO
# samples four answers to each question and compares each with the other three. A KL term keeps the
# policy near the SFT adapter.


# %%
def brief(prompts, responses, rows):
    """Returns 1 - words / 40 for each response, at least 0; 0 for an empty one."""
    words = [len(response.split()) for response in responses]
    return [max(0.0, 1 - count / 40) if count else 0.0 for count in words]


tuned = pj.train_rl(
    model,
    questions,
    pj.RLConfig(
        algorithm="rloo",
        steps=SETTINGS["rl_steps"],
        evaluate_every=10,
        validation_prompts=16,
        **shared,
    ),
    policy=sft.adapter,
    rewards=[judge.reward(weight=0.5), pj.reward(brief, weight=2.0)],
    validation=[{"prompt": row["prompt"]} for row in held_out],
)

# %% [markdown]
# ## What was learned
#
# Every training function returns one row of numbers for each step.


# %%
def curve(axis, trained, metric, label):
    """Draws a metric over the steps that measured it."""
    rows = [(row["step"], row[metric]) for row in trained.metrics if metric in row]
    axis.plot(*zip(*rows, strict=True), marker="." if len(rows) < 20 else "", label=label)


figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 3.6), layout="constrained")
curve(left, sft, "train/loss", "SFT")
left.set(title="SFT: loss", xlabel="step", ylabel="nats a token")
curve(middle, judge, "train/accuracy", "training batch")
curve(middle, judge, "validation/accuracy", "held out")
middle.set(title="Reward model: accuracy", xlabel="step", ylabel="share of comparisons")
middle.legend()
curve(right, tuned, "reward/score", "sampled in training")
curve(right, tuned, "validation/reward", "held out")
right.set(title="RL: reward", xlabel="step", ylabel="reward")
right.legend()
plt.show()

# %% [markdown]
# The answers to held-out questions, before and after RL, with the score of `brief`:

# %%
asked = [row["prompt"] for row in held_out[:4]]
answers = {
    name: pj.generate(
        model, adapter, asked, max_new_tokens=SETTINGS["response"], temperature=0.7, seed=1
    )
    for name, adapter in (("SFT", sft.adapter), ("RL", tuned.adapter))
}


def cell(text, score=None):
    """Returns a cell of the table, in which line breaks stay."""
    note = "" if score is None else f"<br><small>brief: {score:.2f}</small>"
    style = "text-align:left; vertical-align:top; white-space:pre-wrap"
    return f'<td style="{style}">{html.escape(text.strip())}{note}</td>'


lines = ["<tr><th>question</th><th>after SFT</th><th>after RL</th></tr>"]
for question, *both in zip(asked, *answers.values(), strict=True):
    scored = "".join(cell(text, brief([], [text], [])[0]) for text in both)
    lines.append(f"<tr>{cell(question)}{scored}</tr>")
display(HTML(f"<table>{''.join(lines)}</table>"))

# %% [markdown]
# ## Take it with you
#
# The adapter is a few megabytes. PEFT and vLLM read this folder; `pj.train_sft(..., run="FOLDER")`
# keeps checkpoints too, and the same call continues from them.

# %%
pj.export_peft(model, tuned, "tuned_adapter")
size = sum(file.stat().st_size for file in pathlib.Path("tuned_adapter").rglob("*"))
print(f"tuned_adapter: {size / 1e6:.1f} MB")

# %% [markdown]
# ## Next
#
# - **Your own rows**: put them into `train`, or read a file with `perl-jax sft --data.task jsonl`.
# - **Other algorithms**: `pj.RLConfig(algorithm="grpo")`, `"ppo"`, `"online-dpo"` and others; or
#   `pj.train_dpo`, which needs no reward model (DPO, IPO, ORPO, and KTO on thumbs up and down).
# - **Larger models**: `pj.load_model("Qwen/Qwen3-0.6B", dtype="bfloat16")`; all devices are used.
# - The documentation has pages on algorithms, rewards, data formats and several machines.
