"""A reward of your own, as a term of `perl-jax rl --terms TERMS`, where TERMS is the text

    [{"kind": "function", "function": "custom_reward.py:brevity"}]

or a file with it. In Python: `pj.train_rl(..., rewards=[pj.reward(brevity)])`.
"""


def brevity(prompts, responses, rows):
    """Returns 1 for a response of at most the row's number of words (5 if the row has none).

    For a longer response it returns limit / number of words.
    """
    limits = [row.get("words", 5) for row in rows]
    return [
        min(1.0, limit / max(len(response.split()), 1))
        for response, limit in zip(responses, limits, strict=True)
    ]
