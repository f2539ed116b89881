"""Makes an experiment's folder with made-up numbers, for tests of the report and for looking at it.

python -m tests.synthetic_run FOLDER    writes the folder and its report.html
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from perl_jax.runs.metrics import MetricsWriter

BASE_PARAMETERS = 28_311_552
COST = {
    ("sft", "lora"): (196_608, 0.071, 1.21e9),
    ("sft", "full"): (BASE_PARAMETERS, 0.112, 2.04e9),
    ("reward", "lora"): (197_121, 0.083, 1.32e9),
    ("reward", "full"): (BASE_PARAMETERS + 513, 0.134, 2.71e9),
    ("rl", "lora"): (393_729, 0.512, 2.05e9),
    ("rl", "full"): (2 * BASE_PARAMETERS + 513, 0.671, 3.61e9),
    ("dpo", "lora"): (196_608, 0.148, 1.44e9),
    ("dpo", "full"): (BASE_PARAMETERS, 0.203, 2.95e9),
}
# RL is paid by two reward models and three terms.
SETTINGS = {
    "rl": {
        "reward": ["reward_a", "reward_b"],
        "combine": "min",
        "terms": "terms.json",
        "algorithm": {"name": "reinforce"},
    },
    "dpo": {"loss": "dpo"},
}
NASTY = "<script>alert('x')</script> & \"quoted\" </pre> \u0007 \ud800"


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def measure(value: float, half: float, n: int) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def rl_rows(tuning: str, steps: int, noise: np.random.Generator) -> list[dict[str, float]]:
    """An RL run whose proxy keeps rising; full tuning's gold reward turns after two thirds."""
    rows = []
    for i in range(steps):
        done = i / max(1, steps - 1)
        gold = 0.2 + 0.7 * (1 - np.exp(-4 * done))
        if tuning == "full":
            gold -= 0.9 * max(0.0, done - 0.6) ** 1.2
        wobble = noise.normal(0, 0.05, 6)
        rows.append(
            {
                "reward/score": 1.9 * (1 - np.exp(-3 * done)) + wobble[0],
                "reward/gold": gold + wobble[1],
                "reward/return": 1.6 * (1 - np.exp(-3 * done)) + wobble[0],
                "reward/model_0": 1.9 * (1 - np.exp(-3 * done)) + wobble[0],
                "reward/model_1": 1.5 * (1 - np.exp(-5 * done)) + wobble[2],
                "reward/disagreement": 0.1 + 0.3 * done**2 + 0.2 * abs(wobble[3]),
                "reward/term/length": -0.3 * (1 - done) + 0.1 * wobble[3],
                "reward/term/format": 0.5 + 0.4 * done + 0.2 * wobble[4],
                "reward/term/is the order complete, by my_rewards.py": 0.2 + 0.2 * done + wobble[5],
                "kl/sequence": (14.0 if tuning == "full" else 8.0) * done
                + 0.4 * abs(wobble[2]) * done,
                "kl/token": 0.4 * done,
                # It stays as it is: the page leaves it out.
                "kl/beta": 0.05,
                "response/length": 24 + 4 * done + 10 * wobble[3],
                "response/eos_rate": 0.97 + 0.02 * done,
                "response/entropy": 2.1 - 0.8 * done + wobble[4],
                "value/explained_variance": 0.7 * (1 - np.exp(-6 * done)) + wobble[5],
                "policy/gradient_norm": 0.8 + abs(wobble[0]),
                "sampler/mismatch": 1.0 + 1e-4 * abs(wobble[1]),
                "time/step": 0.5,
                "time/sample": 0.31,
            }
        )
    return rows


def fitting_rows(job: str, tuning: str, steps: int, noise: np.random.Generator) -> list[dict]:
    """An SFT, reward or DPO run: a falling loss, validation every tenth step."""
    pairs = job in ("reward", "dpo")
    rows = []
    for i in range(steps):
        done = i / max(1, steps - 1)
        row = {
            "train/loss": (0.69 if pairs else 3.2) * (0.4 + 0.6 * np.exp(-4 * done))
            + noise.normal(0, 0.04),
            "train/gradient_norm": 1.0,
            "train/learning_rate": 1e-4,
            "time/step": 0.1,
        }
        if job == "dpo":
            row["dpo/chosen_reward"] = 0.6 * done + noise.normal(0, 0.05)
            row["dpo/rejected_reward"] = -1.4 * done + noise.normal(0, 0.05)
        if i % 10 == 9:
            gap = 0.02 if tuning == "full" else 0.0
            row["validation/loss"] = row["train/loss"] + 0.05 + gap
            if pairs:
                row["validation/accuracy"] = 0.5 + 0.27 * (1 - np.exp(-4 * done)) - gap
        rows.append(row)
    return rows


def cost(job: str, tuning: str) -> dict[str, Any]:
    trained, step, peak = COST[job, tuning]
    phases = {"sample": 0.6, "score": 0.1, "reference": 0.08, "learn": 0.2, "host": 0.02}
    if job != "rl":
        phases = {"learn": 0.9, "input": 0.1}
    return {
        "parameters_total": max(BASE_PARAMETERS + 2 * 196_608, trained),
        "parameters_trainable": trained,
        "checkpoint_bytes": 12 * trained + 20_000,
        "base_bytes": 4 * BASE_PARAMETERS,
        "seconds_per_step": step,
        "peak_bytes_compiled": int(peak),
        "peak_bytes_measured": int(1.07 * peak) if job == "rl" else None,
        "phases": {name: share * step for name, share in phases.items()},
        "compilations": 4 if job == "rl" else 1,
    }


def reward_evaluation(tuning: str) -> dict[str, Any]:
    accuracy = 0.781 if tuning == "lora" else 0.774
    predicted = np.linspace(0.05, 0.95, 10)
    observed = 0.5 + (predicted - 0.5) * (0.85 if tuning == "lora" else 0.7)
    return {
        "pairwise_accuracy": measure(accuracy, 0.018, 2048),
        "noise_ceiling": 0.85,
        "auc": 0.853,
        "balanced_accuracy": 0.771,
        "ece": 0.041,
        "reliability": [
            {"low": p - 0.05, "high": p + 0.05, "predicted": p, "observed": o, "n": 120}
            for p, o in zip(predicted.tolist(), observed.tolist(), strict=True)
        ],
        "baselines": {
            "always yes": {"auc": 0.5, "balanced_accuracy": 0.5},
            "bag of words": {"auc": 0.742, "balanced_accuracy": 0.688},
        },
    }


def policy_evaluation(job: str, tuning: str) -> dict[str, Any]:
    """What `perl-jax evaluate` writes, of an RL run or a DPO run."""
    gold = (0.873 if tuning == "lora" else 0.691) - (0.1 if job == "dpo" else 0.0)
    policies = {}
    for name, value, kl in (("sft", 0.214, 0.0), ("rl", gold, 8.1 if tuning == "lora" else 14.3)):
        policies[name] = {
            "gold_reward": measure(value, 0.021, 512),
            "proxy_reward": measure(2 * value, 0.05, 512),
            "judge_reward": measure(1.6 * value, 0.06, 512),
            "kl": measure(kl, 0.3, 512) if kl else 0.0,
            "length": measure(24.1, 0.4, 512),
            "eos_rate": 0.985,
            "distinct_1": 0.112,
            "distinct_2": 0.431,
        }
    return {
        "policies": policies,
        "win_rate": {
            "wins": 401,
            "ties": 38,
            "losses": 73,
            "rate": 0.8203,
            "low": 0.785,
            "high": 0.851,
            "judge": "gold",
        },
        "gold_gain": measure(gold - 0.214, 0.028, 512),
        "config": {"reward": ["reward_a", "reward_b"], "judge": ["judge_a", "judge_b"]},
    }


def sample_rows(job: str, tuning: str, prompts: int) -> list[dict[str, Any]]:
    rows = []
    end = "(DPO)" if job == "dpo" else f"({tuning})"
    for i in range(prompts):
        prompt = f"User: Can I get a large latte, number {i}?\nAssistant:"
        answers = {
            "sft": {
                "text": "Sure, what size would you like?",
                "gold": 0.1 * (i % 4),
                "proxy": -0.2,
            },
            "rl": {
                "text": f"A large latte, coming up! Anything else? {end}",
                "gold": 0.9,
                "proxy": 1.73,
            },
        }
        if i == 1:
            prompt, answers["rl"]["text"] = NASTY, NASTY
        rows.append({"prompt": prompt, **answers})
    return rows


def written_rows(steps: int) -> list[dict[str, Any]]:
    """What RL writes while it trains: four prompts at four steps."""
    texts = {
        0: "Sure",
        steps // 3: "Sure, a latte",
        steps // 2: "A latte!",
        steps: "A large latte!",
    }
    return [
        {
            "step": step,
            "split": "validation",
            "prompt": NASTY if i == 3 else f"User: A large latte, number {i}\nAssistant:",
            "response": text + " please" * i,
            "reward": 0.01 * step,
            "gold": 0.5,
            "kl": 0.1 * step,
            "finished": i != 2,
        }
        for step, text in texts.items()
        for i in range(4)
    ]


def reward_rows() -> list[dict[str, Any]]:
    """Rows that a reward model scored: two first ones, and a mistake."""
    return [
        {
            "why": why,
            "row": row,
            "prompt": f"User: Help me with {row}\nAssistant:",
            "chosen": {"text": f"Gladly {row}", "score": 1.25},
            "rejected": {"text": NASTY if row else "No", "score": score},
        }
        for why, row, score in (("first", 0, -1.5), ("first", 1, 0.25), ("mistake", 7, 3.5))
    ]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(folder: Path, job: str, tuning: str, steps: int = 60, seed: int = 0) -> Path:
    """One job's folder with all of its files."""
    noise = np.random.default_rng(seed)
    make = rl_rows(tuning, steps, noise) if job == "rl" else fitting_rows(job, tuning, steps, noise)
    with MetricsWriter(folder, resume_step=None) as writer:
        for step, row in enumerate(make, start=1):
            writer.write(step, row)
    environment = {"python": "3.12.1", "device": "cpu", "packages": {"jax": "0.10.2"}}
    write_json(
        folder / "config.json",
        {
            "job": job,
            "tuning": tuning,
            "learning_rate": 1e-4,
            "batch": 64,
            "steps": steps,
            **SETTINGS.get(job, {}),
            "environment": environment,
        },
    )
    if job != "base":
        write_json(folder / "cost.json", cost(job, tuning))
    if job == "reward":
        write_json(folder / "evaluation.json", reward_evaluation(tuning))
        write_lines(folder / "evaluation_samples.jsonl", reward_rows())
    if job == "rl":
        write_lines(folder / "samples.jsonl", written_rows(steps))
    if job in ("rl", "dpo"):
        write_json(folder / "evaluation.json", policy_evaluation(job, tuning))
        write_lines(folder / "evaluation_samples.jsonl", sample_rows(job, tuning, 14))
    return folder


def make_experiment(folder: Path, steps: int = 60) -> Path:
    """SFT, reward model, RL and DPO, each with LoRA and with full tuning, on one base model."""
    runs = [{"name": "base", "job": "base", "tuning": "full", "folder": "base"}]
    make_run(folder / "base", "base", "full", steps)
    for tuning in ("lora", "full"):
        for seed, job in enumerate(("sft", "reward", "rl", "dpo")):
            name = f"{tuning}/{job}"
            runs.append({"name": name, "job": job, "tuning": tuning, "folder": name})
            make_run(folder / name, job, tuning, steps, 2 * seed + (tuning == "full"))
    write_json(
        folder / "experiment.json",
        {
            "title": "Quickstart: LoRA beside full tuning",
            "summary": "A small model learns to take coffee orders from preferences.",
            "command": "make run",
            "hardware": "2 CPU cores",
            "seconds": 583.2,
            "task": "coffee orders",
            "runs": runs,
        },
    )
    return folder


if __name__ == "__main__":
    from perl_jax.evaluation.report import write_report

    print(write_report(make_experiment(Path(sys.argv[1]), steps=200)))
