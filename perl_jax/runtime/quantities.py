"""Formats numbers, counts and sizes as text."""

from __future__ import annotations

import math

MINUS = "\u2212"


def signed(text: str, value: float) -> str:
    """Returns `text` with the sign of `value` (+ or a true minus) in front; without a sign if the
    text shows zero.

    Args:
        text: The text of abs(value), as it is rounded.
        value: The value.
    """
    if not any(c in "123456789" for c in text):
        return text
    return f"{MINUS if value < 0 else '+'}{text}"


def plain(value: float, decimals: int) -> str:
    """Returns the value with fixed decimals, and with a true minus sign if it is negative; a
    rounded zero has no sign.
    """
    text = f"{abs(value):.{decimals}f}"
    return signed(text, value).replace("+", "")


def significant(value: float, digits: int = 3) -> str:
    """Returns the value with `digits` significant digits: 0.0123, 4.57.

    Digits before the decimal point are never dropped: 1235. Values below 1e-4 or from 1e7 on are
    written with an exponent.
    """
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if -5 < size < 7:
        return plain(value, max(0, digits - 1 - size))
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", MINUS)


def count(value: float) -> str:
    """Returns a count (parameters, tokens, rows) with three significant digits: `512`, `40.2 k`,
    `28.3 M`, `7.24 G`.
    """
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{significant(value / size)} {unit}"
    return f"{value:.0f}"


def size_of(bytes_: float) -> str:
    """Returns a number of bytes in decimal units: `310 kB`, `1.24 GB`."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(bytes_) >= size:
            return f"{significant(bytes_ / size)} {unit}"
    return f"{bytes_:.0f} B"
