"""Anchors as a notebook or a terminal shows them; nothing of a block is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_fda.errors import InputError
from hf_fda.printing import html_table, text_table

if TYPE_CHECKING:
    from hf_fda.anchors.container import FunctionalDualAnchors

LISTED = 12
"""Blocks that are listed in a terminal."""

COLUMNS = ("block", "anchors", "targets", "stored as", "loss", "steps")


def as_text(anchors: FunctionalDualAnchors) -> str:
    """A heading and a table of the first blocks; of anchors on the Hub, of which nothing is fetched, their names."""
    heading = f"FunctionalDualAnchors({_heading(anchors)})"
    rows = _names(anchors) if anchors.on_hub else _table(anchors)
    shown = rows[: LISTED + 1]
    lines = [f"  {line}" for line in text_table(shown)]
    more = [f"  and {len(rows) - len(shown)} more blocks"] if len(rows) > len(shown) else []
    return "\n".join([heading, *lines, *more])


def as_html(anchors: FunctionalDualAnchors) -> str:
    """A heading and a table of all blocks; of anchors on the Hub the index is fetched for it, which is small."""
    head, *rows = _table(anchors)
    return html_table(f"FunctionalDualAnchors: {_heading(anchors)}", rows, head)


def _heading(anchors: FunctionalDualAnchors) -> str:
    """Of which models they are, where they lie, what lies beside them."""
    info, where = anchors.info, anchors.origin or "in memory"
    beside = [name for name, there in (("rest", info.rest), ("task head", info.head)) if there is not None]
    extra = f", with {' and '.join(beside)}" if beside else ""
    return f"{info.source['id']} from {info.base['id']}, {len(anchors)} blocks{extra}; {where}"


def _names(anchors: FunctionalDualAnchors) -> list[tuple[str, ...]]:
    """The blocks' names under their title."""
    return [COLUMNS[:1], *((block,) for block in anchors.blocks)]


def _table(anchors: FunctionalDualAnchors) -> list[tuple[str, ...]]:
    """What the index says of the blocks, under titles; their names alone where it cannot be had."""
    try:
        index = anchors.index
    except InputError:
        return _names(anchors)
    rows = (
        (
            str(row["block"]),
            " x ".join(map(str, row["shape"])),
            " x ".join(map(str, row["target_shape"])),
            str(row["dtype"]),
            f"{row['loss']:.4f}",
            str(row["steps"]),
        )
        for row in index
    )
    return [COLUMNS, *rows]
