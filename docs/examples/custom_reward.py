"""A reward of your own: `perl-jax rl ... --terms '[{"kind": "function", "function": "custom_reward.py:brevity"}]'`."""


def brevity(prompts, responses, rows):
    """1 for a response of at most the row's number of words (5 where it has none), less above."""
    limits = [row.get("words", 5) for row in rows]
    return [
        min(1.0, limit / max(len(response.split()), 1))
        for response, limit in zip(responses, limits)
    ]
