"""A chat template at work: how a prompt is written as one user turn, and how the assistant's turn ends."""

from __future__ import annotations

import datetime
import re
import threading
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from perl_jax.config import UserError, require

# Templates that ask for today's date get this one unless told otherwise: a run that goes on tomorrow has the same ids.
DATE = "2025-01-01"
# A template that needs longer for two short turns never ends.
_SECONDS = 10.0
_CONTENT = "SENTINELTEXT"
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


class Chat:
    """Renders prompts with one Jinja template.

    end: what the template writes after the assistant's words, such as `<|im_end|>` and a newline.
    uses_date: whether the template reads the date.
    UserError where the template cannot write one user turn.
    """

    def __init__(self, inner: PreTrainedTokenizerBase, template: str, name: str, date: str = DATE) -> None:
        self.inner, self.template, self.name = inner, template, name
        try:
            self.date = datetime.date.fromisoformat(date)
        except ValueError as error:
            raise UserError(f"template_date is {date!r}; it must look like {DATE}.") from error
        # transformers' own strftime_now gives today's date and cannot be replaced from outside.
        self._dated = _TODAY.sub(lambda call: repr(self.date.strftime(call[2])), template)
        fixed = "strftime_now(" not in re.sub(r"\s+\(", "(", self._dated)
        require(fixed, f"The chat template of {name} asks for today's date in a format that it computes; write the format as a text in strftime_now('...'), so that the date can be a run's own.")
        self._parts = False
        written = self._probed([("user", _CONTENT)])
        if _CONTENT not in written:
            # Templates of models that see images go through a message's parts.
            self._parts = True
            written = self._probed([("user", _CONTENT)])
        require(_CONTENT in written, f"The chat template of {name} leaves the user's text out; give another with --data.template FILE, or none.")
        self.before, _, self.after = written.partition(_CONTENT)
        self.end = self._end()
        self.uses_date = "strftime_now" in template or "date_string" in template

    def prompt(self, text: str) -> str:
        """The rendered user turn, up to where the response begins. UserError names what the template says."""
        try:
            return self._render([("user", text)], True)
        except Exception as error:
            raise UserError(f"The chat template of {self.name} refuses the prompt {_short(text)!r}: {_reason(error)}.") from error

    def is_rendered(self, text: str) -> bool:
        """Whether a prompt already is what the template makes: it ends with the assistant's cue."""
        cue = self.after.strip()
        return bool(cue) and text.rstrip().endswith(cue)

    def _end(self) -> str:
        try:
            written = self._probed([("user", "Hello"), ("assistant", _CONTENT)], cue=False)
        except UserError:
            # A template for prompts alone says nothing of an answer's end.
            return ""
        return written.rpartition(_CONTENT)[2] if _CONTENT in written else ""

    def _probed(self, turns: list[tuple[str, str]], cue: bool = True) -> str:
        """`_render` in bounded time; UserError for whatever the template raises."""
        try:
            return _bounded(lambda: self._render(turns, cue))
        except TimeoutError as error:
            raise UserError(f"The chat template of {self.name} did not end within {_SECONDS:.0f} s; give another with --data.template FILE, or none.") from error
        # Jinja, and functions that templates call, raise anything.
        except Exception as error:
            if not self._parts and cue:
                # Perhaps it wants parts; if not, the second try says what is wrong.
                return ""
            raise UserError(f"The chat template of {self.name} cannot write one user turn: {_reason(error)}.") from error

    def _render(self, turns: list[tuple[str, str]], cue: bool) -> str:
        wrapped = lambda text: [{"type": "text", "text": text}] if self._parts else text
        messages = [{"role": role, "content": wrapped(text)} for role, text in turns]
        settings = {"add_generation_prompt": cue, "tokenize": False, "date_string": self.date.strftime("%d %b %Y")}
        return self.inner.apply_chat_template(messages, chat_template=self._dated, **settings)


def template_of(inner: PreTrainedTokenizerBase, name: str) -> str | None:
    """The tokenizer's own template; UserError where it has several and none is the default."""
    found = inner.chat_template
    if not isinstance(found, dict):
        return found or None
    names = ", ".join(sorted(found))
    require("default" in found, f"The tokenizer of {name} has chat templates called {names} and no default; write the one to use to a file and give --data.template FILE.")
    return found["default"]


def _bounded(render: Callable[[], str]) -> str:
    """What render returns or raises; TimeoutError where it goes on for too long (its thread then ends with the process)."""
    found: dict[str, Any] = {}

    def work() -> None:
        try:
            found["text"] = render()
        except BaseException as error:  # Handed to the caller.
            found["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    if thread.is_alive():
        raise TimeoutError
    if "error" in found:
        raise found["error"]
    return found["text"]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
