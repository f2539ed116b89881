"""A chat template at work: how a prompt is written as one user turn, how the assistant's turn ends,
what a rendered prompt is made of.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from perl_jax.errors import UserError, require
from perl_jax.hub import templates
from perl_jax.hub.templates import Endless, Template

# Templates that ask for today's date get this one unless told otherwise: a run that goes on
# tomorrow has the same ids.
DATE = "2025-01-01"
_CONTENT = "SENTINELTEXT"
# Of a conversation with several turns.
_SYSTEM, _FIRST, _ANSWER, _SECOND = (
    "SENTINELSYSTEM",
    "SENTINELFIRST",
    "SENTINELANSWER",
    "SENTINELSECOND",
)


@dataclasses.dataclass(frozen=True)
class Turns:
    """A rendered prompt, taken apart: opening, contents joined by what the template writes between
    turns, cue.

    contents: of the user and the assistant in turn; the user's are first and last. opening:
    everything before them, a system turn included.
    """

    opening: str
    contents: tuple[str, ...]
    joints: tuple[str, str]
    cue: str

    def begun(self, turn: int, text: str) -> str:
        """The prompt from a turn of the user on, with another text in that turn."""
        joined = text
        for place, content in enumerate(self.contents[turn + 1 :]):
            joined += self.joints[place % 2] + content
        return self.opening + joined + self.cue


class Chat:
    """Renders prompts with one Jinja template.

    before, after: what the template writes around a user's text, the assistant's cue at its end.
    end: what the template writes after the assistant's words, such as `<|im_end|>` and a newline.
    uses_date: whether the template reads the date.
    UserError where the template cannot write one user turn.
    """

    def __init__(
        self, inner: PreTrainedTokenizerBase, template: str, name: str, date: str = DATE
    ) -> None:
        self.inner, self.template, self.name = inner, template, name
        try:
            self.date = datetime.date.fromisoformat(date)
        except ValueError as error:
            raise UserError(f"template_date is {date!r}; it must look like {DATE}.") from error
        self._parts = False
        written = self._probed([("user", _CONTENT)])
        if _CONTENT not in written:
            # Templates of models that see images go through a message's parts.
            self._parts = True
            written = self._probed([("user", _CONTENT)])
        require(
            _CONTENT in written,
            f"The chat template of {name} leaves the user's text out; give another with "
            "--data.template FILE, or none.",
        )
        self.before, _, self.after = written.partition(_CONTENT)
        self.end = self._end()
        self.uses_date = "strftime_now" in template or "date_string" in template

    def prompt(self, text: str) -> str:
        """The rendered user turn, up to where the response begins. UserError names what the
        template says.
        """
        try:
            return self._render([("user", text)], True)
        except Endless as error:
            raise UserError(
                f"The chat template of {self.name} does not end within {templates.STEPS:,} steps "
                f"for the prompt {_short(text)!r}."
            ) from error
        except Exception as error:
            raise UserError(
                f"The chat template of {self.name} refuses the prompt {_short(text)!r}: "
                f"{_reason(error)}."
            ) from error

    def is_rendered(self, text: str) -> bool:
        """Whether a prompt already is what the template makes.

        It ends with the assistant's cue, and either the cue holds one of the tokenizer's special
        tokens, which nobody writes by accident, or the prompt begins as the template does. A cue in
        plain words (`Assistant:`) alone says nothing: people write that themselves.
        """
        cue = self.after.strip()
        if not cue or not text.rstrip().endswith(cue):
            return False
        return self._cue_is_special or any(
            opening.strip() and text.startswith(opening) for opening, _ in self._openings()
        )

    def turns(self, text: str) -> Turns | None:
        """A rendered prompt taken apart; None where it is not made as this template makes
        conversations.
        """
        found, joints = self._split_cue(text), self._joints
        if found is None:
            return None
        rest, cue = found
        opening = self._opening_of(rest)
        if opening is None:
            return None
        rest, contents = rest[len(opening) :], []
        if joints is None:
            # A template that writes one turn alone.
            return Turns(opening, (rest,), ("", ""), cue)
        while True:
            content, joint, rest = rest.partition(joints[len(contents) % 2])
            contents.append(content)
            if not joint:
                break
        # The user has the last word.
        return Turns(opening, tuple(contents), joints, cue) if len(contents) % 2 == 1 else None

    def _split_cue(self, text: str) -> tuple[str, str] | None:
        """(what is before the cue, the cue as it is in the text)."""
        bare, cue = text.rstrip(), self.after.strip()
        if not cue or not bare.endswith(cue):
            return None
        at = len(bare) - len(cue)
        space = self.after[: len(self.after) - len(self.after.lstrip())]
        at -= len(space) if text[:at].endswith(space) else 0
        return text[:at], text[at:]

    def _openings(self) -> list[tuple[str, str]]:
        """What a rendered prompt may begin with, bos or not: (before the first words, between a
        system's words and the user's; empty: these are the user's).
        """
        openings = [(self.before, ""), *([] if self._system is None else [self._system])]
        bos = self.inner.bos_token or ""
        return openings + [(opening.removeprefix(bos), joint) for opening, joint in openings]

    def _opening_of(self, text: str) -> str | None:
        """All that is before the user's first words, the system's words included; None: it begins
        as no prompt does.
        """
        for opening, joint in self._openings():
            if text.startswith(opening):
                said, found, _ = text[len(opening) :].partition(joint) if joint else ("", "", "")
                if found or not joint:
                    return opening + said + found
        return None

    @functools.cached_property
    def _joints(self) -> tuple[str, str] | None:
        """What the template writes between the user's words and the assistant's, and back; None
        where it cannot, or not evenly.
        """
        written = self._tried([("user", _FIRST), ("assistant", _ANSWER), ("user", _SECOND)])
        parts = _split_at(written, (_FIRST, _ANSWER, _SECOND))
        if (
            parts is None
            or (parts[0], parts[3]) != (self.before, self.after)
            or not (parts[1] and parts[2])
        ):
            return None
        return parts[1], parts[2]

    @functools.cached_property
    def _system(self) -> tuple[str, str] | None:
        """What the template writes before a system's words, and between those and the user's; None
        where it takes none.
        """
        written = self._tried([("system", _SYSTEM), ("user", _FIRST)])
        parts = _split_at(written, (_SYSTEM, _FIRST))
        return (
            None
            if parts is None or parts[2] != self.after or not parts[1]
            else (parts[0], parts[1])
        )

    @functools.cached_property
    def _cue_is_special(self) -> bool:
        """Whether the cue holds a special token. Found once: transformers makes the dictionary of
        added tokens anew at each reading.
        """
        cue = self.after.strip()
        return any(
            token.special and token.content.strip() and token.content in cue
            for token in self.inner.added_tokens_decoder.values()
        )

    def _end(self) -> str:
        # A template for prompts alone says nothing of an answer's end.
        written = self._tried([("user", "Hello"), ("assistant", _CONTENT)], cue=False)
        return written.rpartition(_CONTENT)[2] if _CONTENT in written else ""

    def _tried(self, turns: list[tuple[str, str]], cue: bool = True) -> str:
        """A conversation as the template writes it; empty where it refuses. UserError where it does
        not end.
        """
        try:
            return self._render(turns, cue)
        except Endless as error:
            raise UserError(self._endless()) from error
        except Exception:  # Jinja, and functions that templates call, raise anything.
            return ""

    def _probed(self, turns: list[tuple[str, str]]) -> str:
        """`_render`; UserError for whatever the template raises."""
        try:
            return self._render(turns, True)
        except Endless as error:
            raise UserError(self._endless()) from error
        except Exception as error:
            if not self._parts:
                # Perhaps it wants parts; if not, the second try says what is wrong.
                return ""
            raise UserError(
                f"The chat template of {self.name} cannot write one user turn: {_reason(error)}."
            ) from error

    def _endless(self) -> str:
        return (
            f"The chat template of {self.name} does not end within {templates.STEPS:,} steps; "
            "give another with --data.template FILE, or none."
        )

    @functools.cached_property
    def _parsed(self) -> Template:
        return Template(self.template, self.date)

    def _render(self, turns: Sequence[tuple[str, str]], cue: bool) -> str:
        wrapped = lambda text: [{"type": "text", "text": text}] if self._parts else text
        messages = [{"role": role, "content": wrapped(text)} for role, text in turns]
        variables = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": cue,
            **self.inner.special_tokens_map,
        }
        return self._parsed.render(
            messages=messages, date_string=self.date.strftime("%d %b %Y"), **variables
        )


def template_of(inner: PreTrainedTokenizerBase, name: str) -> str | None:
    """The tokenizer's own template; UserError where it has several and none is the default."""
    found = inner.chat_template
    if not isinstance(found, dict):
        return found or None
    names = ", ".join(sorted(found))
    require(
        "default" in found,
        f"The tokenizer of {name} has chat templates called {names} and no default; write the one "
        "to use to a file and give --data.template FILE.",
    )
    return found["default"]


def _split_at(text: str, marks: Sequence[str]) -> list[str] | None:
    """The text cut at each mark, in this order; None where one is missing."""
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found:
            return None
        parts.append(part)
    return [*parts, text]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
