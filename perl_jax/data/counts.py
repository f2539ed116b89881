"""Says in sentences how many rows were cut, for the log and the report; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping


def said_of(facts: Mapping[str, float], prompt_limit: int, response_limit: int) -> list[str]:
    """Returns sentences that say how many texts of a split were cut, and how many pairs have equal
    responses.

    Returns [] if nothing was cut, no prompt was already rendered, no pair is equal and all
    responses are complete.

    Args:
        facts: The numbers of `tokenise.TokenRows.facts`; a missing one counts as 0.
        prompt_limit: max_prompt_length, in tokens.
        response_limit: max_response_length, in tokens.
    """
    count, sentences = lambda name: int(facts.get(name, 0)), []
    rows, parts = count("rows"), []
    if prompts := count("cut_prompts"):
        templates = bool(count("cut_prompts_template_whole") or count("rendered"))
        kept = (
            f"; the chat template stays whole in {count('cut_prompts_template_whole')} of them"
            if templates
            else ""
        )
        parts.append(
            f"{prompts} prompts lost their beginning (max_prompt_length {prompt_limit}{kept})"
        )
    parts += [
        f"{found} {what} responses lost their end (max_response_length {response_limit})"
        for what in ("chosen", "rejected")
        if (found := count(f"cut_{what}"))
    ]
    if found := count("cut_response"):
        parts.append(f"{found} responses lost their end (max_response_length {response_limit})")
    if found := count("cut_texts"):
        parts.append(
            f"{found} texts lost their end (max_prompt_length + max_response_length "
            f"{prompt_limit + response_limit})"
        )
    if count("cut"):
        sentences.append(f"{count('cut')} of {rows} rows were cut to fit: {', '.join(parts)}.")
    if count("rendered"):
        sentences.append(
            f"{count('rendered')} of {rows} prompts came rendered by a chat template and were not "
            "rendered again."
        )
    if found := count("unfinished"):
        sentences.append(
            f"{found} of {rows} responses are not finished: no token that ends a turn follows them."
        )
    equal, after = count("equal_pairs"), count("equal_after_cutting")
    if equal or after:
        sentences.append(
            f"{equal} of {rows} pairs have equal responses, {after} more are equal after cutting: "
            "they count in no accuracy."
        )
    return sentences
