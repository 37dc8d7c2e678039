"""Tables for notebooks, from plain texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(title: str, rows: Iterable[Sequence[object]], header: Sequence[object] = ()) -> str:
    """A table of texts; nothing in them is taken as markup.

    >>> html_table("a & b", [("base", "org/base")])
    '<table><caption>a &amp; b</caption><tbody><tr><td>base</td><td>org/base</td></tr></tbody></table>'

    Args:
        title: above it.
        rows: cells of every row.
        header: of the columns; none where it is empty.
    """
    head = f"<thead>{_row(header, 'th')}</thead>" if header else ""
    body = "".join(_row(row, "td") for row in rows)
    return f"<table><caption>{escape(title)}</caption>{head}<tbody>{body}</tbody></table>"


def _row(cells: Sequence[object], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"
