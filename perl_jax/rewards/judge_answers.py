"""Reads a score from a judge's answer: the first number of the text, or the expected score."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from perl_jax.errors import UserError
from perl_jax.rewards.judge_endpoint import Hide, cut

NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)")


class Unreadable(Exception):
    """The judge's answer holds no score; another attempt may give one."""


def first_choice(reply: bytes, hide: Hide = str) -> dict[str, Any]:
    """Returns the first choice of a chat completion, a dictionary with the key `message`.

    Args:
        reply: The body of the server's reply.
        hide: Takes the API key out of a text that a message quotes.

    Raises:
        UserError: The reply is not a chat completion in JSON.
    """
    try:
        choice = json.loads(reply)["choices"][0]
        choice["message"].get("content")
        return choice
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        shown = cut(hide(reply.decode("utf-8", "replace")))
        advice = "check that judge.url is an OpenAI-compatible endpoint"
        raise UserError(
            f"The judge's reply is not a chat completion: {shown!r}; {advice}."
        ) from None


def read_number(
    choice: Mapping[str, Any], lowest: float, highest: float, hide: Hide = str
) -> float:
    """Returns the first number of the judge's answer.

    Args:
        choice: The choice of the chat completion.
        lowest: The lowest allowed score.
        highest: The highest allowed score.
        hide: Takes the API key out of a text that a message quotes.

    Raises:
        Unreadable: The answer has no number, or the first number is not in [lowest, highest].
    """
    answer = content(choice)
    found = NUMBER.search(answer)
    if found is None or not lowest <= float(found.group()) <= highest:
        short = " (cut at max_tokens)" if choice.get("finish_reason") == "length" else ""
        problem = (
            "holds no number"
            if found is None
            else f"has {cut(hide(found.group()))} as its first number, not one"
        )
        raise Unreadable(
            f"the answer {cut(hide(answer))!r}{short} {problem} from {lowest:g} to {highest:g}"
        )
    return float(found.group())


def read_expected(
    choice: Mapping[str, Any], lowest: float, highest: float, hide: Hide = str
) -> float:
    """Returns the expected score, sum_s s P(s) / sum_s P(s) (Lee et al. 2023).

    s runs over the whole numbers in [lowest, highest] among the candidates for the answer's first
    token that is not white space; P(s) is the candidate's probability. Candidates that differ only
    in white space count as the same number.

    Args:
        choice: The choice of the chat completion, with log-probabilities.
        lowest: The lowest score.
        highest: The highest score.
        hide: Takes the API key out of a text that a message quotes.

    Raises:
        Unreadable: No candidate is a number in range.
        UserError: The model writes a score as two tokens, or the server sent no log-probabilities.
    """
    tokens = list(itertools.dropwhile(lambda token: not token["token"].strip(), listed(choice)))
    if len(tokens) > 1 and (tokens[0]["token"].strip() + tokens[1]["token"]).isdecimal():
        pieces = " and ".join(repr(cut(hide(token["token"]))) for token in tokens[:2])
        advice = "which mode expected cannot read; let judge.highest be 9, or use mode number"
        raise UserError(f"The judge's model writes a score as two tokens, {pieces}, {advice}.")
    weights: dict[float, float] = {}
    for candidate in tokens[0]["top_logprobs"] if tokens else []:
        digits = candidate["token"].strip()
        if digits.isdecimal() and lowest <= float(digits) <= highest:
            weights[float(digits)] = weights.get(float(digits), 0.0) + math.exp(
                min(float(candidate["logprob"]), 0)
            )
    total = sum(weights.values())
    if not total > 0:
        answer = cut(hide(content(choice)))
        raise Unreadable(
            f"the answer {answer!r} has no number from {lowest:g} to {highest:g} among its likely "
            "first tokens"
        )
    return sum(number * weight for number, weight in weights.items()) / total


def listed(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the tokens of the answer, each with the keys `token` and `top_logprobs`, a list of
    candidates with `token` and `logprob`.

    Raises UserError if the server sent no log-probabilities.
    """
    try:
        tokens = choice["logprobs"]["content"]
        for token in tokens:
            token["token"].strip()
            [
                (candidate["token"].strip(), float(candidate["logprob"]))
                for candidate in token["top_logprobs"]
            ]
        return tokens
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        advice = "use a server that does, or mode number"
        raise UserError(
            f"The judge's server returns no log-probabilities, which mode expected needs; {advice}."
        ) from None


def content(choice: Mapping[str, Any]) -> str:
    """Returns the text of the answer, or "" if there is none.

    A model whose reasoning reaches the limit of tokens gives no text.
    """
    answer = choice["message"].get("content")
    return answer if isinstance(answer, str) else ""


READERS: Mapping[str, Callable[[Mapping[str, Any], float, float, Hide], float]] = {
    "number": read_number,
    "expected": read_expected,
}
