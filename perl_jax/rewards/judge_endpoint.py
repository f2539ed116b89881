"""Sends a judge's requests to an OpenAI-compatible chat endpoint, and keeps its key secret.

Requests use Python's standard library. huggingface_hub's InferenceClient would send the user's
Hugging Face token to an endpoint for which no key was given, and would refuse a local endpoint when
HF_HUB_OFFLINE is set.
"""

from __future__ import annotations

import functools
import http.client
import json
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

from perl_jax.errors import UserError, require
from perl_jax.rewards import checks
from perl_jax.rewards.judge_transport import LARGEST_REPLY, Budget, TooLarge, beginning, send

SHOWN = 120  # characters of an answer that a message quotes
HINTS = {401: "check the key", 403: "check the key", 404: "check judge.url and judge.model"}
# The query parameters that an address may have; the value of any other may be a key.
PARAMETERS = ("api-version", "api_version", "version")
_READ = 2**16  # bytes of an error's body that are read

Hide = Callable[[str], str]  # a text of the server -> the text without the key


class Unavailable(Exception):
    """The judge did not answer; another attempt after a wait may succeed.

    Attributes:
        seconds: The shortest wait that the server asks for, in seconds.
    """

    def __init__(self, reason: str, seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.seconds = seconds


def cut(text: str) -> str:
    """Returns the first `SHOWN` characters of a text, as messages quote it."""
    return text[:SHOWN]


def without_key(key: str | None, text: str) -> str:
    """Returns a text of the server with (key) in place of the API key, which it may echo.

    The key is found as it is, as JSON writes it and as addresses write it. The beginning of the key
    at the end of the text is replaced too, because a longer text may have been cut there.

    Args:
        key: The API key; None if there is none.
        text: The text.
    """
    if key is None:
        return text
    forms = {key, json.dumps(key)[1:-1], urllib.parse.quote(key), urllib.parse.quote(key, safe="")}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "(key)")
        parts = (form[:size] for size in range(len(form) - 1, 3, -1))
        part = next((part for part in parts if text.endswith(part)), None)
        text = text if part is None else text.removesuffix(part) + "(key)"
    return text


def check_url(url: Any) -> None:
    """Raises UserError unless `url` is an http or https address without anything that may be a key.

    A user name, a password, a fragment and every query parameter but `PARAMETERS` are refused,
    because a run's settings are written to its folder. The message does not show them.
    """
    checks.require_text("judge.url", url)
    shown = bare_url(url)
    example = "such as http://localhost:8000/v1"
    try:
        parts = urllib.parse.urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        whole = False
    plain = url.isascii() and url.isprintable() and " " not in url
    require(
        whole and plain, f"judge.url is {shown!r}; it must be an http or https address, {example}."
    )
    advice = "give the address alone and name the key's variable in judge.api_key_variable"
    require("@" not in parts.netloc, f"judge.url holds a user name or a password; {advice}.")
    given = [pair.partition("=")[0] for pair in re.split("[&;]", parts.query) if pair]
    require(
        all(name in PARAMETERS for name in given) and not parts.fragment,
        f"judge.url {shown} has a query or a fragment, which may be a key; {advice} (a query may "
        f"have {', '.join(PARAMETERS)}).",
    )


def bare_url(url: str) -> str:
    """Returns an address, even a malformed one, without user name, password, query and fragment."""
    address = re.split(r"[?#]", url, maxsplit=1)[0]
    user, at, place = address.rpartition("@")
    scheme = re.match(r"(?i)https?://", user)
    return place if not at or scheme is None else scheme[0] + place


def chat_url(url: str) -> str:
    """Returns the address to which requests for chat completions go.

    It is `url` with `/chat/completions` at the end of its path, unless the path already ends so. A
    `url` without a path gets the path `/v1` first.
    """
    parts = urllib.parse.urlsplit(url)
    path = parts.path.rstrip("/") or "/v1"
    path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def post(
    url: str, data: bytes, key: str | None, seconds: float, stop: threading.Event | None = None
) -> bytes:
    """Sends a POST request with a JSON body and returns the body of the reply. Redirects are
    refused.

    Args:
        url: The address.
        data: The JSON body.
        key: The API key, sent as a bearer token; None sends none.
        seconds: The longest time from the connection to the end of the reply, in seconds.
        stop: Set when the reply is not wanted any more; None waits in any case.

    Raises:
        Unavailable: The connection failed, the reply took too long, or the status is 429 or 5xx;
            another attempt may succeed.
        UserError: The status is any other error, or the reply is too large.
        Cancelled: `stop` was set.
    """
    headers = {
        "Content-Type": "application/json",
        "Accept": "application/json",
        "User-Agent": "perl-jax",
    }
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, data, headers)
    hide = functools.partial(without_key, key)
    # `from None`: a traceback would show the texts of the server, which may hold the key.
    try:
        return send(request, Budget(seconds, stop or threading.Event()))
    except urllib.error.HTTPError as error:
        with error:
            failure = refusal(error, bare_url(url), hide)
        raise failure from None
    except TooLarge:
        raise UserError(
            f"The judge at {bare_url(url)} sent a reply of more than {LARGEST_REPLY // 2**20} MiB; "
            "check that judge.url is an OpenAI-compatible endpoint."
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        late = isinstance(reason, TimeoutError)
        said = cut(" ".join(hide(str(reason)).split())) or type(reason).__name__
        raise Unavailable(
            f"no answer within {seconds:g} s" if late else f"the connection failed ({said})"
        ) from None


def refusal(error: urllib.error.HTTPError, url: str, hide: Hide) -> Unavailable | UserError:
    """Returns the exception for an HTTP error status, with the server's message.

    It is Unavailable for the statuses 429 and 5xx, and UserError for any other.

    Args:
        error: The HTTP error.
        url: The address, for the message.
        hide: Takes the key out of a text.
    """
    said = cut(" ".join(hide(beginning(error, _READ).decode("utf-8", "replace")).split()))
    reason = f"status {error.code}" + (f", {said!r}" if said else "")
    if error.code == 429 or error.code >= 500:
        after = error.headers.get("Retry-After", "")
        return Unavailable(reason, float(after) if after.isdecimal() else 0.0)
    hint = (
        "it redirects; give the address it leads to"
        if 300 <= error.code < 400
        else HINTS.get(error.code, "check judge's settings")
    )
    return UserError(f"The judge at {url} refused the request: {reason}; {hint}.")
