"""Rewards from a language model that is asked for a score: direct RLAIF (Lee et al. 2023, arXiv
2309.00267).

The model is served by an OpenAI-compatible chat endpoint. Requests use Python's standard library.
huggingface_hub's InferenceClient would send the user's Hugging Face token to an endpoint for which
no key was given, and would refuse a local endpoint when HF_HUB_OFFLINE is set.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import http.client
import itertools
import json
import logging
import math
import os
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from perl_jax.errors import UserError, default_of, one_of, positive, read_by, require
from perl_jax.rewards import checks

TEMPLATE = """\
Rate how good the response to the request below is: helpful, correct, and to the point.

<request>
{prompt}
</request>

<response>
{response}
</response>

Answer with one number from {lowest} (very bad) to {highest} (excellent), and nothing else."""

MODES = ("number", "expected")
ON_FAILURE = ("error", "neutral")
NEUTRAL = 0.5  # the middle of the scale
SHOWN = 120  # characters of an answer that a message quotes
LONGEST_WAIT = 60.0  # seconds between two attempts at most

HINTS = {401: "check the key", 403: "check the key", 404: "check judge.url and judge.model"}

NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)")


class Unreadable(Exception):
    """The judge's answer holds no score; another attempt may give one."""


class Unavailable(Exception):
    """The judge did not answer; another attempt after at least `seconds` may succeed."""

    def __init__(self, reason: str, seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.seconds = seconds


@dataclasses.dataclass(frozen=True)
class Judge:
    """A reward from a judge: (score - lowest) / (highest - lowest), in [0, 1]; one request per
    response.

    Time-outs, lost connections and the statuses 429 and 5xx are retried after a wait that doubles
    each time. An answer without a score is retried at once. Any other status is an error.

    Attributes:
        url: The base URL of the endpoint, in the form of OpenAI's client: http://localhost:8000/v1.
        model: The model's name at the endpoint.
        template: The request's text; {prompt}, {response}, {lowest} and {highest} are filled in.
        lowest: The score that is mapped to reward 0.
        highest: The score that is mapped to reward 1.
        mode: How the score is read. `number` takes the first number of the answer. `expected` takes
            the mean of the whole numbers in [lowest, highest], weighted by their probabilities as
            the answer's first token (the paper's score). With `expected` every score must be a
            single token: where a tokenizer splits 10 into digits, `highest` must be 9.
        api_key_variable: The environment variable that holds the API key; None sends no key.
        timeout_seconds: The longest silence of the server in seconds (not the time for the whole
            answer).
        retries: Further attempts after the first one, for each response.
        backoff_seconds: The wait before the first retry, in seconds; no wait is longer than 60 s.
        concurrency: The number of simultaneous requests.
        temperature: The judge's sampling temperature.
        max_tokens: The longest answer in tokens; a model that reasons before it answers needs far
            more than the default.
        top_logprobs: How many candidate tokens the server returns for each position; used by mode
            `expected`.
        on_failure: What happens when the last attempt gives no score: `error` stops, `neutral`
            counts 0.5 and warns. A judge that cannot be reached is always an error.
    """

    url: str
    model: str
    template: str = TEMPLATE
    lowest: float = 1.0
    highest: float = 10.0
    mode: str = "number"
    api_key_variable: str | None = None
    timeout_seconds: float = 60.0
    retries: int = 3
    backoff_seconds: float = 1.0
    concurrency: int = 8
    temperature: float = 0.0
    max_tokens: int = 16
    top_logprobs: int = 20
    on_failure: str = "error"

    def __post_init__(self) -> None:
        check_url(self.url)
        for field in ("model", "template"):
            checks.text(f"judge.{field}", getattr(self, field))
        holes = [hole for hole in ("{prompt}", "{response}") if hole not in self.template]
        require(
            not holes,
            f"judge.template has no {' and no '.join(holes)}; it must hold {{prompt}} and "
            "{response}.",
        )
        for field in ("lowest", "highest"):
            checks.number(f"judge.{field}", getattr(self, field))
        above = self.lowest < self.highest
        require(
            above,
            f"judge.lowest is {self.lowest:g} and judge.highest {self.highest:g}; the highest "
            "must be above the lowest.",
        )
        one_of("judge.mode", self.mode, MODES)
        one_of("judge.on_failure", self.on_failure, ON_FAILURE)
        if self.api_key_variable is not None:
            name = isinstance(self.api_key_variable, str) and re.fullmatch(
                r"[A-Za-z_]\w*", self.api_key_variable
            )
            # The value is not shown: it may be a key.
            require(
                bool(name),
                "judge.api_key_variable must be the name of an environment variable "
                "(OPENAI_API_KEY), not a key.",
            )
        for field in ("timeout_seconds", "backoff_seconds"):
            positive(f"judge.{field}", getattr(self, field))
        positive("judge.temperature", self.temperature, zero=True)
        checks.count("judge.retries", self.retries, 0)
        for field in ("concurrency", "max_tokens", "top_logprobs"):
            checks.count(f"judge.{field}", getattr(self, field), 1)
        read_by(
            "judge.top_logprobs",
            self.top_logprobs,
            default_of(Judge, "top_logprobs"),
            f"mode {self.mode}",
            ("mode expected",),
        )

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> np.ndarray:
        """Returns the rewards, float64 [n]; sends up to `concurrency` requests at a time.

        Raises UserError for the first response that gets no score; the remaining requests are
        cancelled.
        """
        checks.sequences(prompts, responses, rows)
        key = self.api_key()
        questions = [self.question(*pair) for pair in zip(prompts, responses, strict=True)]
        stop = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(self.concurrency) as pool:
            futures = [
                pool.submit(self.ask, index, text, key, stop)
                for index, text in enumerate(questions)
            ]
            try:
                done, _ = concurrent.futures.wait(
                    futures, return_when=concurrent.futures.FIRST_EXCEPTION
                )
            finally:  # after the first error, or Ctrl-C, the other requests are not needed
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        scores = [future.result() for future in futures if future in done]
        return self.rewards(scores)

    def rewards(self, scores: Sequence[float | None]) -> np.ndarray:
        """Returns scores mapped to [0, 1]: float64 [n]. A score of None becomes 0.5, with a
        warning.
        """
        unread = sum(score is None for score in scores)
        if unread:
            message = "%d of %d answers of the judge held no score; they count %g."
            logging.getLogger(__name__).warning(message, unread, len(scores), NEUTRAL)
        span = self.highest - self.lowest
        return np.array(
            [NEUTRAL if s is None else (s - self.lowest) / span for s in scores], np.float64
        )

    def question(self, prompt: str, response: str) -> str:
        """Returns the template with its four fields filled in; braces in the filled-in texts are
        kept.
        """
        values = {
            "prompt": prompt,
            "response": response,
            "lowest": f"{self.lowest:g}",
            "highest": f"{self.highest:g}",
        }
        # One pass, so that filled-in text is not searched again: a response may hold "{prompt}".
        return re.sub(
            r"\{(prompt|response|lowest|highest)\}",
            lambda hole: values[hole.group(1)],
            self.template,
        )

    def ask(
        self, index: int, question: str, key: str | None, stop: threading.Event
    ) -> float | None:
        """Returns the score of one response.

        Returns None if the judge gave no score and `on_failure` is neutral, or if `stop` is set
        because another response failed. Sets `stop` on any error.
        """
        if stop.is_set():
            return None
        try:
            return self.attempts(index, json.dumps(self.body(question)).encode(), key, stop)
        except BaseException:
            stop.set()
            raise

    def attempts(
        self, index: int, data: bytes, key: str | None, stop: threading.Event
    ) -> float | None:
        """Sends a request up to retries + 1 times and returns the score, or None as `ask` does.

        Raises UserError when all attempts have failed.
        """
        failure: Unreadable | Unavailable | None = None
        for attempt in range(self.retries + 1):
            wait = 0.0
            try:
                choice = first_choice(post(chat_url(self.url), data, key, self.timeout_seconds))
                return READERS[self.mode](choice, self.lowest, self.highest)
            except Unreadable as error:
                failure = error
            except Unavailable as error:
                failure = error
                wait = min(LONGEST_WAIT, max(self.backoff_seconds * 2**attempt, error.seconds))
            if attempt < self.retries and stop.wait(wait):
                return None  # another response has failed, and with it the batch
        if isinstance(failure, Unreadable) and self.on_failure == "neutral":
            return None
        attempts = f"{self.retries + 1} attempt{'s' if self.retries else ''}"
        raise UserError(
            f"The judge at {self.url} gave no score for index {index} in {attempts}: {failure}."
        ) from failure

    def body(self, question: str) -> dict[str, Any]:
        """Returns the JSON body of a chat-completion request."""
        asked = (
            {"logprobs": True, "top_logprobs": self.top_logprobs} if self.mode == "expected" else {}
        )
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            **asked,
        }

    def api_key(self) -> str | None:
        """Returns the API key from the environment, or None if no variable is named; raises
        UserError if it is missing or malformed.
        """
        if self.api_key_variable is None:
            return None
        key = os.environ.get(self.api_key_variable, "").strip()
        require(
            bool(key),
            f"The environment variable {self.api_key_variable} (judge.api_key_variable) is not "
            "set.",
        )
        # Checked here, because the HTTP library would show the key in its error message.
        good = key.isascii() and key.isprintable()
        require(
            good,
            f"The environment variable {self.api_key_variable} is not a key: it holds control or "
            "non-ASCII characters.",
        )
        return key

    def __enter__(self) -> Judge:
        self.api_key()  # reports a missing key before training, not at the first batch
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def check_url(url: Any) -> None:
    """Raises UserError unless `url` is an http or https address without a user name or password."""
    checks.text("judge.url", url)
    example = "such as http://localhost:8000/v1"
    try:
        parts = urllib.parse.urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        whole = False
    plain = url.isascii() and url.isprintable() and " " not in url
    require(
        whole and plain, f"judge.url is {url!r}; it must be an http or https address, {example}."
    )
    bare = "give the address alone and name the key's variable in judge.api_key_variable"
    require("@" not in parts.netloc, f"judge.url holds a user name or a password; {bare}.")


def chat_url(url: str) -> str:
    """Returns the address of chat completions below `url`; a `url` without a path means /v1."""
    parts = urllib.parse.urlsplit(url)
    path = parts.path.rstrip("/") or "/v1"
    path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the key to another host and turn POST into GET."""

    def redirect_request(self, *arguments: Any) -> None:
        """Returns None, which urllib takes for a refusal."""


def post(url: str, data: bytes, key: str | None, seconds: float) -> bytes:
    """Sends a POST request and returns the body of the reply.

    Raises Unavailable if another attempt may succeed, else UserError.
    """
    headers = {
        "Content-Type": "application/json",
        "Accept": "application/json",
        "User-Agent": "perl-jax",
    }
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.build_opener(NoRedirects).open(request, timeout=seconds) as reply:
            return reply.read()
    except urllib.error.HTTPError as error:
        with error:
            refused(error, url, key)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        silent = isinstance(reason, TimeoutError)
        raise Unavailable(
            f"no answer within {seconds:g} s" if silent else f"the connection failed ({reason})"
        ) from error


def refused(error: urllib.error.HTTPError, url: str, key: str | None) -> NoReturn:
    """Raises Unavailable or UserError for an HTTP error status, with the server's message; the key
    is removed from it.
    """
    try:
        said = error.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        said = ""
    said = " ".join((said.replace(key, "(key)") if key else said).split())[:SHOWN]
    reason = f"status {error.code}" + (f", {said!r}" if said else "")
    if error.code == 429 or error.code >= 500:
        after = error.headers.get("Retry-After", "")
        raise Unavailable(reason, float(after) if after.isdecimal() else 0.0) from error
    hint = (
        "it redirects; give the address it leads to"
        if error.code < 400
        else HINTS.get(error.code, "check judge's settings")
    )
    raise UserError(f"The judge at {url} refused the request: {reason}; {hint}.") from error


def first_choice(reply: bytes) -> dict[str, Any]:
    """Returns the first choice of a chat completion; raises UserError if the reply is not one."""
    try:
        choice = json.loads(reply)["choices"][0]
        choice["message"].get("content")
        return choice
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        shown = reply[:SHOWN].decode("utf-8", "replace")
        advice = "check that judge.url is an OpenAI-compatible endpoint"
        raise UserError(
            f"The judge's reply is not a chat completion: {shown!r}; {advice}."
        ) from error


def read_number(choice: Mapping[str, Any], lowest: float, highest: float) -> float:
    """Returns the first number of the answer; raises Unreadable if there is none or it is out of
    range.
    """
    answer = content(choice)
    found = NUMBER.search(answer)
    if found is None or not lowest <= float(found.group()) <= highest:
        cut = " (cut at max_tokens)" if choice.get("finish_reason") == "length" else ""
        problem = (
            "holds no number"
            if found is None
            else f"has {found.group()[:SHOWN]} as its first number, not one"
        )
        raise Unreadable(
            f"the answer {answer[:SHOWN]!r}{cut} {problem} from {lowest:g} to {highest:g}"
        )
    return float(found.group())


def read_expected(choice: Mapping[str, Any], lowest: float, highest: float) -> float:
    """Returns the expected score, sum_s s P(s) / sum_s P(s) (Lee et al. 2023).

    s runs over the whole numbers in [lowest, highest] among the candidates of the answer's first
    token that is not white space. Candidates that differ only in white space count as the same
    number.

    Raises:
        Unreadable: No candidate is a number in range.
        UserError: The model writes a score as two tokens.
    """
    tokens = list(itertools.dropwhile(lambda token: not token["token"].strip(), listed(choice)))
    if len(tokens) > 1 and (tokens[0]["token"].strip() + tokens[1]["token"]).isdecimal():
        pieces = f"{tokens[0]['token']!r} and {tokens[1]['token']!r}"
        advice = "which mode expected cannot read; let judge.highest be 9, or use mode number"
        raise UserError(f"The judge's model writes a score as two tokens, {pieces}, {advice}.")
    weights: dict[float, float] = {}
    for candidate in tokens[0]["top_logprobs"] if tokens else []:
        digits = candidate["token"].strip()
        if digits.isdecimal() and lowest <= float(digits) <= highest:
            weights[float(digits)] = weights.get(float(digits), 0.0) + math.exp(
                min(candidate["logprob"], 0)
            )
    total = sum(weights.values())
    if not total > 0:
        answer = content(choice)[:SHOWN]
        raise Unreadable(
            f"the answer {answer!r} has no number from {lowest:g} to {highest:g} among its likely "
            "first tokens"
        )
    return sum(number * weight for number, weight in weights.items()) / total


def listed(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the answer's tokens with their candidates' log-probabilities; raises UserError if the
    server sent none.
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
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        advice = "use a server that does, or mode number"
        raise UserError(
            f"The judge's server returns no log-probabilities, which mode expected needs; {advice}."
        ) from error


def content(choice: Mapping[str, Any]) -> str:
    """Returns the text of the answer, or "" if there is none (a model that ran out of tokens while
    reasoning).
    """
    answer = choice["message"].get("content")
    return answer if isinstance(answer, str) else ""


READERS: Mapping[str, Callable[[Mapping[str, Any], float, float], float]] = {
    "number": read_number,
    "expected": read_expected,
}
