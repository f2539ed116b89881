"""Builds HTML: every string is escaped unless this module made it, and every tag is closed."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from perl_jax.evaluation.report.formats import NOT_MEASURED, printable

VOID_TAGS = frozenset({"img", "meta", "br", "hr"})


class Html(str):
    """A string that is already HTML. Other modules make one from literals only."""


def escape(value: object) -> Html:
    """Returns the value as HTML text: special characters escaped, unprintable ones replaced."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(printable(str(value)), quote=True))


def join(parts: Iterable[object], separator: str = "") -> Html:
    """Returns the escaped parts, joined by the separator."""
    return Html(escape(separator).join(escape(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """Returns an HTML element.

        tag("p", "a < b", class_="note") == '<p class="note">a &lt; b</p>'

    Children and attributes that are None are left out. `class_` becomes `class`, and underscores in
    other attribute names become hyphens.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID_TAGS:
        return Html(f"<{name}{written}>")
    inside = join(child for child in children if child is not None)
    return Html(f"<{name}{written}>{inside}</{name}>")


def image(svg: bytes, alt: str) -> Html:
    """Returns an SVG picture embedded in the page as a base64 data URL."""
    address = "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")
    return tag("img", src=address, alt=alt)


def figure(svg: bytes, caption: str, alt: str) -> Html:
    """Returns a picture with its caption."""
    return tag("figure", image(svg, alt), tag("figcaption", caption))


def table(
    caption: str,
    header: Sequence[object],
    rows: Sequence[Sequence[object]],
    text_columns: int = 1,
) -> Html:
    """Returns a table that scrolls sideways on a narrow screen.

    The first `text_columns` columns hold left-aligned text, and the first of them names the row;
    the others hold right-aligned numbers. A row with one cell is a heading across the table.
    """
    head = tag(
        "tr",
        *(
            tag("th", cell, scope="col", class_=None if i < text_columns else "number")
            for i, cell in enumerate(header)
        ),
    )
    body = []
    for row in rows:
        if len(row) == 1:
            group = tag("th", row[0], scope="colgroup", colspan=len(header))
            body.append(tag("tr", group, class_="group"))
            continue
        cells = [tag("th", row[0], scope="row")]
        for i, cell in enumerate(row[1:], start=1):
            missing = not isinstance(cell, Html) and str(cell) in (NOT_MEASURED, "\u2013")
            names = ("" if i < text_columns else "number") + (" missing" if missing else "")
            cells.append(tag("td", cell, class_=names.strip() or None))
        body.append(tag("tr", *cells))
    return tag(
        "div",
        tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body)),
        class_="scroll",
    )


def with_interval(text: str) -> Html:
    """Returns `0.83 (0.80 to 0.86)` with the interval in a lighter span."""
    value, bracket, rest = text.partition(" (")
    return join([value, " ", tag("span", "(" + rest, class_="ci")] if bracket else [value])


def section(identifier: str, title: str, *children: object) -> Html:
    """Returns a section with a heading, or nothing if it has no content."""
    content = [child for child in children if child]
    if not content:
        return Html("")
    return tag("section", tag("h2", title), *content, id=identifier)
