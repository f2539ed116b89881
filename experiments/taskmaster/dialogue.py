"""Renders Taskmaster dialogues as text: the reward rows, and the dialogues of TM-3 and TM-4.

A turn is a dictionary in the form of the reward rows: `{"role": "user" | "agent", "text": ...}`,
`{"role": "agent", "api": {name: arguments}}` or `{"role": "api", "response": {name: values}}`.
A rendered turn is two lines: the speaker and the content. A call by the agent begins with `call`:

    user:
    can i get an espresso please
    agent:
    call get_menu_items(query="espresso")
    api:
    get_menu_items(items=[{menu_item_id: "espresso-0001", name: "Espresso"}])
    agent:

A prompt ends with `agent:` and a newline; the response is the line that follows. So prompt +
response is the text of the dialogue. A tokenizer whose tokens never join a newline to the next
line's first word therefore gives prompt and response the same ids as the whole dialogue.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

Turn = Mapping[str, object]
# Ends a prompt: the agent speaks next.
CUE = "agent:\n"


def rendered_value(value: object) -> str:
    """Returns a value as JSON whose keys have no quotes."""
    if isinstance(value, Mapping):
        return (
            "{" + ", ".join(f"{key}: {rendered_value(item)}" for key, item in value.items()) + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(rendered_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def rendered_call(call: Mapping[str, object]) -> str:
    """Returns a call {name: {key: value}} as `name(key=value, ...)`; several calls are separated by
    spaces.

    Values that are no mapping are written alone: {name: value} becomes `name(value)`.
    """
    parts = []
    for name, values in call.items():
        pairs = values.items() if isinstance(values, Mapping) else [("", values)]
        inside = ", ".join(
            f"{key}={rendered_value(item)}" if key else rendered_value(item) for key, item in pairs
        )
        parts.append(f"{name}({inside})")
    return " ".join(parts)


def said(turn: Turn) -> str:
    """Returns the content of a turn on one line: its text, or its call or the API's response as
    `rendered_call` writes it.

    Runs of white space become single spaces. A call by the agent begins with `call`.
    """
    if "text" in turn:
        content = str(turn["text"])
    elif "api" in turn:
        content = "call " + rendered_call(turn["api"])
    else:
        content = rendered_call(turn["response"])
    return " ".join(content.split())


def rendered(turns: Sequence[Turn]) -> str:
    """Returns the turns as text; each turn ends with a newline."""
    return "".join(f"{turn['role']}:\n{said(turn)}\n" for turn in turns)


def prompt_of(turns: Sequence[Turn]) -> str:
    """Returns the turns as text, followed by the cue for the agent."""
    return rendered(turns) + CUE


def group_of(turns: Sequence[Turn]) -> str:
    """Returns the group of a dialogue's rows: the words of its first user turn in lower case.

    All contexts of one dialogue begin with that turn. The first two user turns would not do: a
    context that ends after one user turn and its extension by a second would be of two groups.
    """
    first = next((str(turn["text"]) for turn in turns if turn["role"] == "user"), "")
    return " ".join(re.findall(r"\w+", first.lower()))


def responses_of(turns: Sequence[Turn]) -> Iterator[tuple[str, str]]:
    """Yields (prompt, response) for every agent turn after the first user turn; the prompt is
    all turns before it, with the cue.
    """
    asked = False
    for index, turn in enumerate(turns):
        asked = asked or turn["role"] == "user"
        if asked and turn["role"] == "agent":
            yield prompt_of(turns[:index]), said(turn)


def parsed(text: str) -> object:
    """Returns the JSON value of an annotation, whose strings may contain raw tabs.

    Raises ValueError for text that is not JSON.
    """
    return json.loads(text, strict=False)


def turns_of_tm4(utterances: Sequence[Mapping]) -> list[Turn]:
    """Returns the turns of a TM-4 dialogue, whose calls are annotations on the user's utterance.

    The calls follow what the user says and precede the assistant's next utterance.

    Args:
        utterances: The utterances, with the keys `speaker`, `text` and `annotations`.

    Raises:
        ValueError: An annotation is not JSON (19 of upstream's 3,710 dialogues have one).
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
    """Returns the turns of a TM-3 dialogue, whose calls are in the field `apis` of an utterance.

    Calls of a user's utterance follow it. Calls of an assistant's utterance precede it, because the
    assistant made them before it spoke.

    Args:
        utterances: The utterances, with the keys `speaker`, `text` and, if there are calls, `apis`.
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
