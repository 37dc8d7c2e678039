"""Tables of texts, for terminals and for notebooks."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from html import escape


def text_table(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> list[str]:
    """The lines of a table whose columns lie two spaces apart.

    >>> text_table([("task", "rows"), ("sst2", "7")], right=[1])
    ['task  rows', 'sst2     7']

    Args:
        rows: cells of every row, as many in each.
        right: numbers of the columns that are flush right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def html_table(title: str, rows: Iterable[Sequence[object]], header: Sequence[object] = ()) -> str:
    """A table for a notebook; nothing in the texts is taken as markup.

    >>> html_table("a & b", [("base", "org/base")])
    '<table><caption>a &amp; b</caption><tbody><tr><td>base</td><td>org/base</td></tr></tbody></table>'

    Args:
        title: above it; none where it is empty.
        rows: cells of every row.
        header: of the columns; none where it is empty.
    """
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    head = f"<thead>{_row(header, 'th')}</thead>" if header else ""
    body = "".join(_row(row, "td") for row in rows)
    return f"<table>{caption}{head}<tbody>{body}</tbody></table>"


def _row(cells: Sequence[object], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"
