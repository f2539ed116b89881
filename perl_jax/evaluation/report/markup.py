"""HTML by construction: every string is escaped unless it was built here, every tag is closed."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from perl_jax.evaluation.report.formats import NOT_MEASURED, printable

VOID_TAGS = frozenset({"img", "meta", "br", "hr"})


class Html(str):
    """A string that is HTML already. Only this module makes one from anything but a literal."""


def escape(value: object) -> Html:
    """Text as HTML, with what cannot be printed replaced."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(printable(str(value)), quote=True))


def join(parts: Iterable[object], separator: str = "") -> Html:
    """The parts escaped, one after the other."""
    return Html(escape(separator).join(escape(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """`tag("p", "a < b", class_="note")` == `<p class="note">a &lt; b</p>`.

    Children that are None are left out; attributes that are None too. `class_` is `class`, and
    underscores in other names become hyphens.
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
    """An SVG picture inside the page, as a base64 data address."""
    address = "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")
    return tag("img", src=address, alt=alt)


def figure(svg: bytes, caption: str, alt: str) -> Html:
    """A picture with its caption."""
    return tag("figure", image(svg, alt), tag("figcaption", caption))


def table(
    caption: str,
    header: Sequence[object],
    rows: Sequence[Sequence[object]],
    text_columns: int = 1,
) -> Html:
    """A table that scrolls sideways on a narrow screen.

    The first `text_columns` columns are left-aligned text and the first names its row; the others
    are right-aligned numbers. A row of one cell is a heading across the table.
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
    """`0.83 (0.80 to 0.86)` as a value with its bracket in a lighter span of its own."""
    value, bracket, rest = text.partition(" (")
    return join([value, " ", tag("span", "(" + rest, class_="ci")] if bracket else [value])


def section(identifier: str, title: str, *children: object) -> Html:
    """A section with a heading; empty when it has no content."""
    content = [child for child in children if child]
    if not content:
        return Html("")
    return tag("section", tag("h2", title), *content, id=identifier)
