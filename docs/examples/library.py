"""SFT, a reward model and RL on rows in memory: `python library.py MODEL`."""

import sys

import perl_jax as pj


def exact(prompts, responses, rows):
    """1 for a response that begins with the row's answer, else 0."""
    return [
        float(r.strip().startswith(row["answer"])) for r, row in zip(responses, rows, strict=True)
    ]


model = pj.load_model(sys.argv[1])
sums = [(f"{a} + {b} =", f" {a + b}.") for a in range(10) for b in range(10)]
demonstrations = [{"prompt": p, "response": r} for p, r in sums]
comparisons = [{"prompt": p, "chosen": r, "rejected": " I do not know."} for p, r in sums]
questions = [{"prompt": p, "answer": r.strip(" .")} for p, r in sums]

shared = {"data": pj.DataConfig(max_prompt_length=32, max_response_length=8), "batch_size": 20}
sft = pj.train_sft(model, demonstrations, pj.SFTConfig(steps=60, **shared))
judge = pj.train_reward(model, comparisons, pj.RewardConfig(steps=20, **shared))
tuned = pj.train_rl(
    model,
    questions,
    pj.RLConfig(algorithm="rloo", steps=5, **shared),
    policy=sft.adapter,
    rewards=[judge.reward(weight=0.5), pj.reward(exact)],
    on_step=lambda row: print(row["step"], row["reward/score"]),
)
print(pj.generate(model, tuned.adapter, ["3 + 5 ="], max_new_tokens=8))
pj.export_peft(model, tuned, "tuned_adapter")
