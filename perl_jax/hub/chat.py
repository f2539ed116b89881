"""Chat templates: how a prompt is rendered as a user turn, how the assistant's turn ends, and how a
rendered prompt is split into turns again.
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

# The date that templates get as today's by default. It is fixed, so that a run that is resumed on
# another day has the same token ids.
DATE = "2025-01-01"
_CONTENT = "SENTINELTEXT"
# Texts of a conversation with several turns.
_SYSTEM, _FIRST, _ANSWER, _SECOND = (
    "SENTINELSYSTEM",
    "SENTINELFIRST",
    "SENTINELANSWER",
    "SENTINELSECOND",
)


@dataclasses.dataclass(frozen=True)
class Turns:
    """A rendered prompt, split into its parts.

    The prompt is opening + contents[0] + joints[0] + contents[1] + joints[1] + contents[2] + ... +
    cue.

    Attributes:
        opening: Everything before the user's first words, including a system turn.
        contents: The texts of user and assistant in turn; the first and the last are the user's.
        joints: What the template writes between a user's text and the assistant's answer, and
            between an assistant's text and the user's next one.
        cue: What the template writes after the last user text; it asks the assistant to begin.
    """

    opening: str
    contents: tuple[str, ...]
    joints: tuple[str, str]
    cue: str

    def from_turn(self, turn: int, text: str) -> str:
        """Returns the rendered prompt without the turns before one user turn, and with another text
        in that turn. The opening stays.

        Args:
            turn: The index of the user turn in `contents`, an even number.
            text: The new text of that turn.
        """
        joined = text
        for index, content in enumerate(self.contents[turn + 1 :]):
            joined += self.joints[index % 2] + content
        return self.opening + joined + self.cue


class Chat:
    """Renders prompts with a chat template (Jinja).

    Args:
        inner: The tokenizer, for its special tokens.
        template: The source of the template.
        name: The model's name, for messages.
        date: The date that templates get as today's.

    Attributes:
        before: What the template writes before a user's text.
        after: What it writes after a user's text, with the assistant's cue at the end.
        end: What it writes after an assistant's text, such as `<|im_end|>` and a newline.
        uses_date: Whether the template reads the date.

    Raises:
        UserError: The template cannot render a user turn.
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
            # Templates of models that see images expect a list of message parts.
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
        """Returns a prompt rendered as one user turn, followed by the cue after which the response
        begins.

        Args:
            text: The user's text.

        Raises:
            UserError: The template refuses the text, with the template's own message, or does not
                end within `templates.STEPS` steps.
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
        """Returns whether a prompt is already an output of the template.

        The prompt must end with the assistant's cue. In addition either the cue must contain a
        special token of the tokenizer, which nobody writes by accident, or the prompt must begin as
        the template's outputs do. A plain cue (`Assistant:`) alone proves nothing, because people
        write it themselves.

        Args:
            text: The prompt.
        """
        cue = self.after.strip()
        if not cue or not text.rstrip().endswith(cue):
            return False
        return self._cue_is_special or any(
            opening.strip() and text.startswith(opening) for opening, _ in self._openings()
        )

    def turns(self, text: str) -> Turns | None:
        """Returns a rendered prompt split into its turns, or None if it does not have the form of
        this template's outputs.

        If the template renders no conversations of several turns, the result has one text and empty
        joints.

        Args:
            text: The rendered prompt.
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
            # A template for a single turn.
            return Turns(opening, (rest,), ("", ""), cue)
        while True:
            content, joint, rest = rest.partition(joints[len(contents) % 2])
            contents.append(content)
            if not joint:
                break
        # The last turn must be the user's.
        return Turns(opening, tuple(contents), joints, cue) if len(contents) % 2 == 1 else None

    def _split_cue(self, text: str) -> tuple[str, str] | None:
        """Returns (text before the cue, the rest), or None if there is no cue.

        There is no cue if the template writes none, or if the text, without trailing white space,
        does not end with it. The rest is the cue and all white space after it. If the text also
        has the white space that the template writes before the cue, the rest begins with it.
        """
        bare, cue = text.rstrip(), self.after.strip()
        if not cue or not bare.endswith(cue):
            return None
        at = len(bare) - len(cue)
        space = self.after[: len(self.after) - len(self.after.lstrip())]
        at -= len(space) if text[:at].endswith(space) else 0
        return text[:at], text[at:]

    def _openings(self) -> list[tuple[str, str]]:
        """Returns the beginnings that a rendered prompt can have: without and with a system turn,
        each with and without the bos token.

        Each is a pair: the text before the first words, and the text between the system's words and
        the user's ("" without a system turn).
        """
        openings = [(self.before, ""), *([] if self._system is None else [self._system])]
        bos = self.inner.bos_token or ""
        return openings + [(opening.removeprefix(bos), joint) for opening, joint in openings]

    def _opening_of(self, text: str) -> str | None:
        """Returns everything before the user's first words, including a system turn, or None if the
        text does not begin as the template's outputs do.
        """
        for opening, joint in self._openings():
            if text.startswith(opening):
                said, found, _ = text[len(opening) :].partition(joint) if joint else ("", "", "")
                if found or not joint:
                    return opening + said + found
        return None

    @functools.cached_property
    def _joints(self) -> tuple[str, str] | None:
        """What the template writes between a user's text and the assistant's answer, and between an
        assistant's text and the user's next one.

        None if the template cannot render a conversation of three turns, or begins or ends it
        differently from a single turn.
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
        """What the template writes before a system text, and between the system text and the
        user's; None if it renders no system turns.
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
        """Whether the cue contains a special token of the tokenizer.

        Cached, because transformers rebuilds the dictionary of added tokens at each access.
        """
        cue = self.after.strip()
        return any(
            token.special and token.content.strip() and token.content in cue
            for token in self.inner.added_tokens_decoder.values()
        )

    def _end(self) -> str:
        """Returns what the template writes after an assistant's text; "" if it renders no assistant
        turns.
        """
        # A template for prompts only does not render an answer.
        written = self._tried([("user", "Hello"), ("assistant", _CONTENT)], cue=False)
        return written.rpartition(_CONTENT)[2] if _CONTENT in written else ""

    def _tried(self, turns: list[tuple[str, str]], cue: bool = True) -> str:
        """Returns a rendered conversation, or "" if the template refuses it.

        Args:
            turns: (role, text) of each turn.
            cue: Whether the assistant's cue is appended.

        Raises:
            UserError: The rendering does not end.
        """
        try:
            return self._render(turns, cue)
        except Endless as error:
            raise UserError(self._endless()) from error
        except Exception:  # Jinja and the functions that templates call raise errors of any type.
            return ""

    def _probed(self, turns: list[tuple[str, str]]) -> str:
        """Returns a rendered conversation, or "" if the template fails on contents that are plain
        texts.

        Contents are plain texts at first, and lists of message parts once `_parts` is set. The cue
        is appended.

        Args:
            turns: (role, text) of each turn.

        Raises:
            UserError: The template fails on lists of message parts, or the rendering does not end.
        """
        try:
            return self._render(turns, True)
        except Endless as error:
            raise UserError(self._endless()) from error
        except Exception as error:
            if not self._parts:
                # The template may expect message parts; if not, the second try reports the error.
                return ""
            raise UserError(
                f"The chat template of {self.name} cannot write one user turn: {_reason(error)}."
            ) from error

    def _endless(self) -> str:
        """Returns the error message for a template that does not end."""
        return (
            f"The chat template of {self.name} does not end within {templates.STEPS:,} steps; "
            "give another with --data.template FILE, or none."
        )

    @functools.cached_property
    def _parsed(self) -> Template:
        """The parsed template."""
        return Template(self.template, self.date)

    def _render(self, turns: Sequence[tuple[str, str]], cue: bool) -> str:
        """Returns the rendered conversation.

        Args:
            turns: (role, text) of each turn.
            cue: Whether the assistant's cue is appended.
        """
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
    """Returns the source of the tokenizer's own chat template, or None if it has none.

    Args:
        inner: The tokenizer of transformers.
        name: The model's name, for messages.

    Raises:
        UserError: The tokenizer has several templates, and none of them is called `default`.
    """
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
    """Returns the parts of a text between marks, one more than there are marks; None if a mark is
    missing.

    Args:
        text: The text.
        marks: Texts that must occur in this order; each is left out of the parts.
    """
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found:
            return None
        parts.append(part)
    return [*parts, text]


def _reason(error: Exception) -> str:
    """Returns an error's message on one line without its full stop, or the error's type if it has
    no message.
    """
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _short(text: str) -> str:
    """Returns a text for messages: cut to 40 characters, the last three of them `...`, if it is
    longer.
    """
    return text if len(text) <= 40 else text[:37] + "..."
