"""A task of your own: `perl-jax sft --data.task custom_task.py:SUMS ...`."""

import numpy as np

import perl_jax as pj


def rows(kind, split, config):
    """Sums of two numbers; the last digit of the first decides the split."""
    parts = {"train": range(8), "validation": [8], "test": [9]}[split]
    for a, b in ((10 * tens + last, b) for last in parts for tens in range(3) for b in range(10)):
        prompt, answer = f"{a} + {b} =", f" {a + b}"
        if kind == "demonstrations":
            yield {"prompt": prompt, "response": answer}
        else:
            yield {"prompt": prompt, "answer": answer.strip()}


def gold(prompts, responses):
    """1 for the right sum, else 0."""
    sums = [sum(map(int, prompt.strip(" =").split("+"))) for prompt in prompts]
    return np.array(
        [float(r.strip() == str(s)) for r, s in zip(responses, sums, strict=True)], np.float32
    )


SPLITS = ("train", "validation", "test")
SUMS = pj.Task("sums", rows, {"demonstrations": SPLITS, "prompts": SPLITS}, gold)
