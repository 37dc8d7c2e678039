"""Which rows of a task run through a model together while hidden states are recorded."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hf_fda.data.rows import TaskRows

TOKENS = 16_384
"""Entries of rows that run together: enough that a block's weights are read for more than a moment's work."""

PART_BYTES = 2**29
"""Hidden states of all units that are held at a time, in half precision."""


def companions(rows: TaskRows, count: int) -> list[int]:
    """Rows that run beside some others and are dropped again: the longest, so that all rows of a task are filled up to
    the same length, and the shortest, so that all calls have a mask where any has one.

    There are as many as make the number of rows together neither one nor a length, so that it tells which arguments
    belong to rows.

    Args:
        rows: of the task.
        count: how many others there are.
    """
    sizes = {name: [row[name].shape for row in rows.inputs] for name in rows.inputs[0]}
    numbers = range(len(rows))
    lengths = {max(shape[d] for shape in shapes) for shapes in sizes.values() for d in range(len(shapes[0]))}
    extra = {max(numbers, key=lambda row: shapes[row][d]) for shapes in sizes.values() for d in range(len(shapes[0]))}
    extra |= {min(numbers, key=rows.length)}
    found = sorted(extra)
    while count + len(found) == 1 or count + len(found) in lengths:
        found.append(found[-1])
    return found


def shorter_pair(rows: TaskRows) -> list[int] | None:
    """Two rows of different lengths, both shorter than the longest; None where there are none such.

    Args:
        rows: of a task.
    """
    by_length = {rows.length(row): row for row in range(len(rows))}
    lengths = sorted(by_length)
    return [by_length[lengths[-2]], by_length[lengths[0]]] if len(lengths) > 2 else None


def parts_of_rows(rows: TaskRows, units: int, width: int) -> list[list[int]]:
    """All rows in parts that run together: at most `TOKENS` positions, and `PART_BYTES` of hidden states (one row at
    least).

    Args:
        rows: of a task.
        units: how many units are recorded.
        width: d, of the hidden states.
    """
    tokens = min(TOKENS, PART_BYTES // (2 * width * max(units, 1)))
    size = max(1, tokens // max(positions(row, width) for row in rows.inputs))
    return [list(range(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]


def positions(row: Mapping[str, Tensor], width: int) -> int:
    """How many positions a row has: those of its text, or for an image as many as its values fill hidden states."""
    return max(len(tensor) if tensor.ndim == 1 else -(-tensor.numel() // width) for tensor in row.values())
