"""Builds HTML: every string is escaped unless this module made it, and every tag is closed."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from perl_jax.evaluation.report.formats import NOT_MEASURED, printable

VOID_TAGS = frozenset({"img", "meta", "br", "hr"})


class Html(str):
    """A string that is already HTML and is not escaped again. Other modules make one from literals
    only.
    """


def escape(value: object) -> Html:
    """Returns the value as HTML text: special characters escaped, unprintable ones replaced by
    U+FFFD.

    Html is returned as it is.
    """
    if isinstance(value, Html):
        return value
    return Html(html.escape(printable(str(value)), quote=True))


def join(parts: Iterable[object], separator: str = "") -> Html:
    """Returns the parts, each escaped unless it is Html, joined by the escaped separator."""
    return Html(escape(separator).join(escape(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """Returns an HTML element.

        tag("p", "a < b", class_="note") == '<p class="note">a &lt; b</p>'

    `class_` becomes `class`, and underscores in other attribute names become hyphens.

    Args:
        name: The element's name; an element of `VOID_TAGS` has no children.
        children: The content, escaped unless it is Html; None is left out.
        attributes: The attributes; None is left out.
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
    """Returns an img element with the SVG embedded as a base64 data URL and the text alternative
    `alt`.
    """
    address = "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")
    return tag("img", src=address, alt=alt)


def figure(svg: bytes, caption: str, alt: str) -> Html:
    """Returns a picture with its caption.

    Args:
        svg: The picture.
        caption: The text below it; "" shows none.
        alt: The text alternative for those who do not see the picture.
    """
    return tag("figure", image(svg, alt), tag("figcaption", caption))


def table(
    caption: str,
    header: Sequence[object],
    rows: Sequence[Sequence[object]],
    text_columns: int = 1,
) -> Html:
    """Returns a table that scrolls sideways on a narrow screen, under its caption and beside its
    first column, which stay.

    Args:
        caption: The text below the table.
        header: The heading of each column.
        rows: The cells, escaped unless they are Html. The first cell names the row. A row with one
            cell is a heading across the table.
        text_columns: How many columns, from the left, hold left-aligned text; the others hold
            right-aligned numbers.
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
        tag(
            "div",
            tag("table", tag("thead", head), tag("tbody", *body), aria_label=caption),
            class_="scroll",
            tabindex="0",
        ),
        tag("p", caption, class_="caption"),
        class_="table",
    )


def with_interval(text: str) -> Html:
    """Returns `0.83 (0.80 to 0.86)` as Html, with the part in parentheses in a lighter span.

    Text without parentheses is returned as Html without a span.
    """
    value, bracket, rest = text.partition(" (")
    return join([value, " ", tag("span", "(" + rest, class_="ci")] if bracket else [value])


def section(identifier: str, title: str, *children: object) -> Html:
    """Returns a section with a heading; empty Html if all children are empty or None.

    Args:
        identifier: The section's id in links.
        title: The heading.
        children: The content.
    """
    content = [child for child in children if child]
    if not content:
        return Html("")
    return tag("section", tag("h2", title), *content, id=identifier)
