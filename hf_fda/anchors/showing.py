"""Anchors as a notebook or a terminal shows them; nothing of a block is read."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_fda.anchors.container import FunctionalDualAnchors

LISTED = 12
"""Blocks that are listed in a terminal."""

COLUMNS = ("block", "anchors", "targets", "stored as", "loss", "steps")


def as_text(anchors: FunctionalDualAnchors) -> str:
    """A heading and a table of the first blocks; of anchors on the Hub, of which nothing is fetched, their names."""
    heading = f"FunctionalDualAnchors({_heading(anchors)})"
    names: list[tuple[str, ...]] = [(block,) for block in anchors.blocks]
    rows = names if anchors.on_hub else [COLUMNS, *_rows(anchors)]
    shown = rows[: LISTED + 1]
    widths = [max(len(row[column]) for row in shown) for column in range(len(shown[0]))] if shown else []
    lines = ["  " + "  ".join(f"{word:<{width}}" for word, width in zip(row, widths, strict=True)) for row in shown]
    more = [f"  and {len(rows) - len(shown)} more blocks"] if len(rows) > len(shown) else []
    return "\n".join([heading, *(line.rstrip() for line in lines), *more])


def as_html(anchors: FunctionalDualAnchors) -> str:
    """A heading and a table of all blocks; of anchors on the Hub the index is fetched for it, which is small."""
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    body = "".join(f"<tr>{''.join(f'<td>{escape(word)}</td>' for word in row)}</tr>" for row in _rows(anchors))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<p><b>FunctionalDualAnchors</b>: {escape(_heading(anchors))}</p>{table}"


def _heading(anchors: FunctionalDualAnchors) -> str:
    """Of which models they are, where they lie, what lies beside them."""
    info, where = anchors.info, anchors.origin or "in memory"
    beside = [name for name, there in (("rest", info.rest), ("task head", info.head)) if there is not None]
    extra = f", with {' and '.join(beside)}" if beside else ""
    return f"{info.source['id']} from {info.base['id']}, {len(anchors)} blocks{extra}; {where}"


def _rows(anchors: FunctionalDualAnchors) -> list[tuple[str, ...]]:
    return [
        (
            str(row["block"]),
            " x ".join(map(str, row["shape"])),
            " x ".join(map(str, row["target_shape"])),
            str(row["dtype"]),
            f"{row['loss']:.4f}",
            str(row["steps"]),
        )
        for row in anchors.index
    ]
