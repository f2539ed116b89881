"""Taskmaster dialogues as text: one renderer for the reward rows and for both dialogue layouts.

A turn is a dictionary in the reward data's form: `{"role": "user" | "agent", "text": ...}`,
`{"role": "agent", "api": {name: arguments}}` or `{"role": "api", "response": {name: values}}`.
Rendered, a turn is two lines, the speaker and what is said; an agent's call begins with `call`:

    user:
    can i get an espresso please
    agent:
    call get_menu_items(query="espresso")
    api:
    get_menu_items(items=[{menu_item_id: "espresso-0001", name: "Espresso"}])
    agent:

A prompt ends in `agent:` and a newline; the response is the one line that follows, so a whole
dialogue is its prompt + response, joined by nothing, and a tokenizer that does not join a newline
to the next line's first word gives the boundary the same tokens in both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

Turn = Mapping[str, object]
CUE = "agent:\n"


def rendered_value(value: object) -> str:
    """JSON with bare keys."""
    if isinstance(value, Mapping):
        return (
            "{" + ", ".join(f"{key}: {rendered_value(item)}" for key, item in value.items()) + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(rendered_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def rendered_call(call: Mapping[str, object]) -> str:
    """`name(key=value, ...)` of `{name: {key: value}}`; other values than mappings stand alone."""
    parts = []
    for name, values in call.items():
        pairs = values.items() if isinstance(values, Mapping) else [("", values)]
        inside = ", ".join(
            f"{key}={rendered_value(item)}" if key else rendered_value(item) for key, item in pairs
        )
        parts.append(f"{name}({inside})")
    return " ".join(parts)


def said(turn: Turn) -> str:
    """What a turn says, on one line (white space within it becomes single spaces)."""
    if "text" in turn:
        content = str(turn["text"])
    elif "api" in turn:
        content = "call " + rendered_call(turn["api"])
    else:
        content = rendered_call(turn["response"])
    return " ".join(content.split())


def rendered(turns: Sequence[Turn]) -> str:
    """The turns as text, each ended by a newline."""
    return "".join(f"{turn['role']}:\n{said(turn)}\n" for turn in turns)


def prompt_of(turns: Sequence[Turn]) -> str:
    """The turns as text, then the cue for the agent."""
    return rendered(turns) + CUE


def group_of(turns: Sequence[Turn]) -> str:
    """What keeps the rows of one dialogue together: the first user turn, letters and digits only.

    Rows are turns and consecutive rows extend one dialogue. The first *two* user turns are no safe
    key: a context with one user turn and its extension with two differ in it.
    """
    first = next((str(turn["text"]) for turn in turns if turn["role"] == "user"), "")
    return " ".join(re.findall(r"\w+", first.lower()))


def responses_of(turns: Sequence[Turn]) -> Iterator[tuple[str, str]]:
    """(prompt, response) of every agent turn that follows a user's first."""
    asked = False
    for index, turn in enumerate(turns):
        asked = asked or turn["role"] == "user"
        if asked and turn["role"] == "agent":
            yield prompt_of(turns[:index]), said(turn)


def parsed(text: str) -> object:
    """JSON of an annotation (raw tabs in its strings are tolerated). ValueError when it is
    broken.
    """
    return json.loads(text, strict=False)


def turns_of_tm4(utterances: Sequence[Mapping]) -> list[Turn]:
    """The turns of a TM-4 dialogue, whose calls are annotations on the *user's* utterance.

    They come after what the user says and before the assistant's next utterance. ValueError when an
    annotation is not JSON, which is so of 19 of upstream's 3,710 dialogues.
    """
    turns: list[Turn] = []
    for utterance in utterances:
        role = "user" if utterance["speaker"] == "user" else "agent"
        turns.append({"role": role, "text": utterance["text"]})
        for note in utterance["annotations"]:
            name, value = note["name"], note["value"]
            if name == "api_call":
                turns.append({"role": "agent", "api": {value: {}}})
            elif name == "api_response":
                turns.append({"role": "api", "response": {value: {}}})
            elif name in ("request", "response"):
                field = "api" if name == "request" else "response"
                (called,) = turns[-1][field]
                turns[-1][field][called] = parsed(value)
    return turns


def turns_of_tm3(utterances: Sequence[Mapping]) -> list[Turn]:
    """The turns of a TM-3 dialogue, whose calls stand in `apis` of an utterance.

    Those on a user's utterance follow it; those on an assistant's were made for it and precede it.
    """
    turns: list[Turn] = []
    for utterance in utterances:
        calls: list[Turn] = []
        for api in utterance.get("apis", ()):
            calls.append({"role": "agent", "api": {api["name"]: api.get("args", {})}})
            calls.append({"role": "api", "response": {api["name"]: api.get("response", {})}})
        if utterance["speaker"] == "user":
            turns += [{"role": "user", "text": utterance["text"]}, *calls]
        else:
            turns += [*calls, {"role": "agent", "text": utterance["text"]}]
    return turns
