"""A pretrained story teller, made cheerful: RL with a rule on words, within a stated KL.

Claim     Two minutes of RL on two cores, with an adapter of 17,920 weights and a rule that counts
          cheerful words less sad ones, visibly change what a pretrained Llama of 260,032 weights
          writes, while the KL to it stays near the 8 nats a story that are asked for.
Command   python experiments/stories.py --model FOLDER    # TinyStories "stories260K" (llama2.c), as
          a Hugging Face folder
Hardware  2 CPU cores
Time      3 minutes
Numbers   cheerful less sad words (at most 6 of each counted, as a share of 6) on openings with
          names kept apart: 0.24 before, 0.66 as the best of 8, 0.95 after RL, at 7.6 nats of KL
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import sys

import numpy as np

from perl_jax.data.config import DataConfig
from perl_jax.evaluation.best_of import BestOfConfig, run_best_of
from perl_jax.generation.text import GenerateConfig, run_generate
from perl_jax.objectives.algorithms import AlgorithmConfig
from perl_jax.rewards.shaping import ShapingConfig
from perl_jax.runs.metrics import read_metrics
from perl_jax.runtime import files, platforms
from perl_jax.training.commands import RLCommand, run_rl
from perl_jax.training.rl_config import KLConfig

NAMES = ("Lily", "Tom", "Anna", "Ben", "Mia", "Sam", "Sue", "Max", "Amy", "Tim")
OPENINGS = (
    "Once upon a time, there was a {kind} named {name}.",
    "One day, a {kind} named {name} went to the park.",
    "{name} was a {kind} who lived in a big house.",
    "{name} had a red ball.",
    "One morning, {name} woke up and looked out of the window.",
    "{name} and a friend were walking in the woods.",
    "It was raining, and {name} was at home.",
    "A {kind} named {name} found a box.",
)
KINDS = ("little girl", "little boy", "small dog", "big cat")
CHEERFUL = [
    "happy",
    "happily",
    "smile",
    "smiled",
    "smiles",
    "laugh",
    "laughed",
    "laughing",
    "love",
    "loved",
    "loves",
    "fun",
    "joy",
    "friend",
    "friends",
    "kind",
    "hug",
    "hugged",
    "proud",
    "play",
    "played",
]
SAD = [
    "sad",
    "cry",
    "cried",
    "crying",
    "scared",
    "afraid",
    "hurt",
    "angry",
    "mad",
    "lost",
    "alone",
    "sorry",
    "bad",
]
TERMS = [
    {"kind": "words", "name": "cheerful", "words": CHEERFUL, "most": 6},
    {"kind": "words", "name": "sad", "words": SAD, "most": 6, "weight": -1.0},
]
TOKENS, TARGET = 96, 8.0


def write_prompts(folder: pathlib.Path) -> None:
    """Openings of stories; those of two names are kept for the test."""
    made = [
        (name, opening.format(kind=kind, name=name))
        for name, opening, kind in itertools.product(NAMES, OPENINGS, KINDS)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for split, names in (("train", NAMES[:-2]), ("test", NAMES[-2:])):
        rows = dict.fromkeys(text for name, text in made if name in names)
        files.write_atomically(
            folder / f"{split}.jsonl", "".join(json.dumps({"prompt": text}) + "\n" for text in rows)
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the pretrained model")
    parser.add_argument(
        "--run",
        type=pathlib.Path,
        default=pathlib.Path("runs/stories"),
        help="folder of the experiment",
    )
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    platforms.use_cpu_if_no_accelerator()
    root = arguments.run
    write_prompts(root / "prompts")
    data = DataConfig(
        task="jsonl",
        data_dir=str(root / "prompts"),
        max_prompt_length=40,
        max_response_length=TOKENS,
        bucket_count=1,
    )
    terms = json.dumps(TERMS)
    job = RLCommand(
        model=arguments.model,
        run=str(root / "rl"),
        data=data,
        terms=terms,
        steps=arguments.steps,
        batch_size=64,
        checkpoint_every=20,
        temperature=0.7,
        algorithm=AlgorithmConfig("rloo"),
        kl=KLConfig(target=TARGET, horizon=640),
    )
    policy = run_rl(job)
    measured = {}
    for name, adapter in (("pretrained", None), ("after RL", str(policy))):
        path = root / f"{name.replace(' ', '_')}.jsonl"
        path.unlink(missing_ok=True)
        # By the rule alone: most stories are cut off at their room, and RL was paid for the rule
        # and an end.
        measured[name] = run_best_of(
            BestOfConfig(
                model=arguments.model,
                policy=adapter,
                terms=terms,
                n=8,
                data=data,
                split="test",
                output=str(path),
                shaping=ShapingConfig(missing_eos_penalty=0.0),
            )
        )
    rows = read_metrics(root / "rl" / "metrics.jsonl")
    measured["KL of the last 10 steps"] = float(np.mean([row["kl/sequence"] for row in rows[-10:]]))
    files.write_json(root / "measured.json", measured)
    before, after = measured["pretrained"], measured["after RL"]
    print(
        f"\ncheerful less sad words (at most 6 each, / 6): pretrained {before['mean_score']:.3f}, "
        f"best of 8 {before['score']:.3f}, ",
        end="",
    )
    print(
        f"after RL {after['mean_score']:.3f} at a KL of {measured['KL of the last 10 steps']:.1f} "
        f"nats (asked for: {TARGET:g})\n"
    )
    for prompt in (
        "Amy was a little girl who lived in a big house.",
        "It was raining, and Tim was at home.",
    ):
        for name, adapter in (("pretrained", None), ("after RL", str(policy))):
            (text,) = run_generate(
                GenerateConfig(
                    model=arguments.model,
                    adapter=adapter,
                    prompt=prompt,
                    max_new_tokens=TOKENS,
                    temperature=0.7,
                    seed=1,
                )
            )
            print(f"{name}: {prompt}{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
