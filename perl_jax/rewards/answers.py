r"""Finds the answer in a response: the last number, the last \boxed{}; and compares answers."""

from __future__ import annotations

import collections
import re
import unicodedata
from collections.abc import Callable, Mapping
from decimal import Decimal

# 42, -1,234.50, $5, .5, 2e-3; not the digits of v2 or of 1.2.3's tail.
NUMBER = re.compile(
    r"(?<![\w.])[-+]?[$€£¥]?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?P<exponent>[eE][-+]?\d{1,4}(?!\w))?"
)
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def normalised(text: str, keep_case: bool = False) -> str:
    """Returns a text in one form: Unicode's NFKC, case folded, stripped, single spaces.

    NFKC writes variants of a character alike: full-width digits, ligatures, superscripts.

    Args:
        text: The text.
        keep_case: Whether case is kept.
    """
    text = unicodedata.normalize("NFKC", text)
    if not keep_case:
        # Folding can give characters that NFKC writes differently.
        text = unicodedata.normalize("NFKC", text.casefold())
    return " ".join(text.split())


def _plain(text: str) -> str:
    """Returns a text with its digits and signs as ASCII writes them."""
    return unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-")


def _value(found: re.Match) -> Decimal:
    """Returns the number of a match of `NUMBER`, exactly."""
    sign = "-" if found.group().startswith("-") else ""
    digits = found["digits"].replace(",", "")
    return Decimal(f"{sign}{digits}{found['exponent'] or ''}")


def number_of(text: str) -> Decimal | None:
    """Returns the number that a text is as a whole, such as 1234.5 for ` 1,234.50 `; None if the
    text is no number.
    """
    found = NUMBER.fullmatch(_plain(text).strip())
    return None if found is None else _value(found)


def last_number(text: str) -> Decimal | None:
    """Returns the last number of a text: 1234.5 for `so it is $1,234.50.`; None without one.

    Commas between groups of three digits belong to the number. A minus sign belongs to it if no
    letter or digit is before it: 3 is the last number of 5-3.
    """
    last = collections.deque(NUMBER.finditer(_plain(text)), maxlen=1)
    return _value(last[0]) if last else None


def last_boxed(text: str) -> str | None:
    r"""Returns what is in the last \boxed{} whose braces are closed, as in LaTeX; None without one.

    The last one is the one that begins last: b for \boxed{a \boxed{b}}.
    """
    open_braces: list[int | None] = []  # where the content of a box begins; None for other braces
    best, content = -1, None
    for found in _BRACES.finditer(text):
        token = found.group()
        if token.endswith("{") and (token == "{" or token.startswith("\\boxed")):
            open_braces.append(None if token == "{" else found.end())
        elif token == "}" and open_braces:
            begin = open_braces.pop()
            if begin is not None and begin > best:
                best, content = begin, text[begin : found.start()]
    return content


def same(a: str | Decimal, b: str | Decimal, keep_case: bool) -> bool:
    """Returns whether two answers are equal: as numbers if both are numbers, else in one form
    (`normalised`).

    Args:
        a: A text, or a number.
        b: A text, or a number.
        keep_case: Whether case makes a difference.
    """
    numbers = [number_of(one) if isinstance(one, str) else one for one in (a, b)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    return normalised(str(a), keep_case) == normalised(str(b), keep_case)


EXTRACT: Mapping[str, Callable[[str], str | Decimal | None]] = {
    "last_number": last_number,
    "boxed": last_boxed,
}
