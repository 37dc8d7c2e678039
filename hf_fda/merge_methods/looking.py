"""What the methods that look at rows of data have in common."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from hf_fda.merge_methods.config import LooksAt, MethodConfig, option


@dataclass(frozen=True, kw_only=True)
class RowsConfig(MethodConfig):
    """Options of every method that looks at rows of data. Nothing of them is a label."""

    data: ClassVar[LooksAt] = "must"
    compares: ClassVar[bool] = True
    """Whether outputs are compared on the rows, and not hidden states alone."""

    rows: int | None = option(
        1000, "rows of a task at most: a sample by the seed, the first ones of a stream; none: all", minimum=1
    )
    max_length: int = option(512, "tokens of a text at most; what is longer is cut", minimum=1)


FEW_ROWS = 64
"""Rows of a task up to which a unit is fitted in as many passes as were chosen (on training rows, with these)."""


def passes_over(rows: int, passes: int) -> int:
    """Passes over the rows of a task that look at about as many rows in all as the chosen ones do at few: more took
    longer and were no better.

    >>> [passes_over(rows, 20) for rows in (0, 64, 128, 1000)]
    [20, 20, 10, 2]

    Args:
        rows: how many there are.
        passes: over few rows.
    """
    return ceil(passes * min(1.0, FEW_ROWS / max(rows, 1)))
