"""Rewards from a language model that is asked for a score: direct RLAIF (Lee et al. 2023, arXiv
2309.00267).

The model is served by an OpenAI-compatible chat endpoint (`judge_endpoint`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax.errors import COUNT, UserError, default_of, one_of, positive, read_by, require
from perl_jax.rewards import checks
from perl_jax.rewards.judge_answers import READERS, Unreadable, first_choice
from perl_jax.rewards.judge_endpoint import Unavailable, chat_url, check_url, post, without_key
from perl_jax.rewards.judge_transport import Cancelled
from perl_jax.runtime import stopping

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
LONGEST_WAIT = 60.0  # seconds between two attempts at most


@dataclasses.dataclass(frozen=True)
class Judge:
    """A reward from a judge: (score - lowest) / (highest - lowest), in [0, 1]; one request per
    response.

    Time-outs, lost connections and the statuses 429 and 5xx are retried after a wait that doubles
    each time. An answer without a score is retried at once. Any other status is an error, and so is
    a reply of more than 8 MiB.

    No setting may hold a key: an address with a user name, a password or a query is refused. A key
    that the server sends back does not get into messages.

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
        timeout_seconds: The longest time for a whole reply in seconds, from the connection to the
            last byte.
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
            checks.require_text(f"judge.{field}", getattr(self, field))
        holes = [hole for hole in ("{prompt}", "{response}") if hole not in self.template]
        require(
            not holes,
            f"judge.template has no {' and no '.join(holes)}; it must hold {{prompt}} and "
            "{response}.",
        )
        for field in ("lowest", "highest"):
            checks.require_number(f"judge.{field}", getattr(self, field))
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
            positive(f"judge.{field}", getattr(self, field), most=COUNT)
        positive("judge.temperature", self.temperature, zero=True)
        checks.require_count("judge.retries", self.retries, 0)
        for field in ("concurrency", "max_tokens", "top_logprobs"):
            checks.require_count(f"judge.{field}", getattr(self, field), 1)
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
        """Returns the rewards of the responses, float64 [n] in [0, 1]; sends up to `concurrency`
        requests at a time.

        Args:
            prompts: The n prompts as text.
            responses: The n responses as text.
            rows: The rows of the prompts; not read.

        Raises:
            UserError: A response gets no score; the remaining requests are cancelled.
            stopping.Abandoned: The process was told to stop while it waited.
        """
        checks.require_equal_lengths(prompts, responses, rows)
        key = self.api_key()
        questions = [self.question(*pair) for pair in zip(prompts, responses, strict=True)]
        ask = lambda index, stop: self.ask(index, questions[index], key, stop)
        return self.rewards(all_of(ask, len(questions), self.concurrency))

    def rewards(self, scores: Sequence[float | None]) -> np.ndarray:
        """Returns scores mapped from [lowest, highest] to [0, 1]: float64 [n].

        A score of None becomes `NEUTRAL`, 0.5; one warning is logged with the number of these
        scores.
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

        Args:
            prompt: The prompt as text.
            response: The response as text.
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
        """Returns the score of one response, in [lowest, highest].

        Returns None if the judge gave no score and `on_failure` is neutral, or if `stop` is set
        because another response failed. Sets `stop` on any error.

        Args:
            index: The response's index in the batch, for error messages.
            question: The text of the request.
            key: The API key; None sends none.
            stop: Set as soon as a request of the batch has failed.

        Raises:
            UserError: The judge gives no score, or refuses the request.
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
        """Sends a request up to retries + 1 times and returns the score, in [lowest, highest].

        Waits between attempts if the judge is unavailable. Returns None if the judge gave no score
        and `on_failure` is neutral, or as soon as `stop` is set.

        Args:
            index: The response's index in the batch, for error messages.
            data: The JSON body of the request.
            key: The API key; None sends none.
            stop: Set as soon as another request of the batch has failed.

        Raises:
            UserError: All attempts have failed, or the judge refuses the request.
        """
        failure: Unreadable | Unavailable | None = None
        hide = functools.partial(without_key, key)
        for attempt in range(self.retries + 1):
            wait = 0.0
            try:
                reply = post(chat_url(self.url), data, key, self.timeout_seconds, stop)
                return READERS[self.mode](
                    first_choice(reply, hide), self.lowest, self.highest, hide
                )
            except Cancelled:
                return None
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
        ) from None

    def body(self, question: str) -> dict[str, Any]:
        """Returns the JSON body of a chat-completion request, which asks for log-probabilities in
        mode `expected`.

        Args:
            question: The text of the request.
        """
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
        """Returns the API key from the environment variable `api_key_variable`; None if no variable
        is named.

        Raises UserError if the variable is not set, or holds control or non-ASCII characters.
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


def all_of(ask: Callable[[int, threading.Event], Any], count: int, concurrency: int) -> list[Any]:
    """Returns [ask(0, stop), ..., ask(count - 1, stop)], computed by several threads.

    Sets `stop` and raises at the first exception of a call, at Ctrl-C, and when the process is told
    to stop (`stopping`). The other calls are not waited for; each should end soon after `stop` is
    set. Their threads are daemons, so they cannot keep the process alive.

    Args:
        ask: (index, stop) -> the result.
        count: How many results there are.
        concurrency: The largest number of threads.

    Raises:
        stopping.Abandoned: The process was told to stop.
    """
    stop, done, indices, lock = (
        threading.Event(),
        queue.SimpleQueue(),
        iter(range(count)),
        threading.Lock(),
    )

    def work() -> None:
        while not stop.is_set():
            with lock:
                index = next(indices, None)
            if index is None:
                return
            try:
                done.put((index, ask(index, stop), None))
            except BaseException as error:
                stop.set()
                done.put((index, None, error))

    results = [None] * count
    try:
        for number in range(min(count, concurrency)):
            threading.Thread(target=work, name=f"judge {number}", daemon=True).start()
        for _ in range(count):
            index, result, error = stopping.get(done)
            if error is not None:
                raise error
            results[index] = result
    finally:
        stop.set()
    return results
