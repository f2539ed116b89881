"""Sends a judge's requests to an OpenAI-compatible chat endpoint.

Requests use Python's standard library. huggingface_hub's InferenceClient would send the user's
Hugging Face token to an endpoint for which no key was given, and would refuse a local endpoint when
HF_HUB_OFFLINE is set.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, NoReturn

from perl_jax.errors import UserError, require
from perl_jax.rewards import checks

SHOWN = 120  # characters of an answer that a message quotes
HINTS = {401: "check the key", 403: "check the key", 404: "check judge.url and judge.model"}


class Unavailable(Exception):
    """The judge did not answer; another attempt after a wait may succeed.

    Attributes:
        seconds: The shortest wait that the server asks for, in seconds.
    """

    def __init__(self, reason: str, seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.seconds = seconds


def check_url(url: Any) -> None:
    """Raises UserError unless `url` is an http or https address without a user name or password."""
    checks.require_text("judge.url", url)
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
    """Returns the address to which requests for chat completions go.

    It is `url` with `/chat/completions` at the end of its path, unless the path already ends so. A
    `url` without a path gets the path `/v1` first.
    """
    parts = urllib.parse.urlsplit(url)
    path = parts.path.rstrip("/") or "/v1"
    path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the key to another host and turn POST into GET."""

    def redirect_request(self, *arguments: Any) -> None:
        """Returns None, which urllib takes for a refusal."""


def post(url: str, data: bytes, key: str | None, seconds: float) -> bytes:
    """Sends a POST request with a JSON body and returns the body of the reply. Redirects are
    refused.

    Args:
        url: The address.
        data: The JSON body.
        key: The API key, sent as a bearer token; None sends none.
        seconds: The longest silence of the server in seconds.

    Raises:
        Unavailable: The connection failed, the server was silent, or the status is 429 or 5xx;
            another attempt may succeed.
        UserError: The status is any other error.
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
    """Raises an exception for an HTTP error status, with the server's message.

    Args:
        error: The HTTP error.
        url: The address, for the message.
        key: The API key, which is removed from the server's message; None if none was sent.

    Raises:
        Unavailable: The status is 429 or 5xx.
        UserError: Any other status.
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
