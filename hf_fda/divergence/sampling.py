"""Which rows are learnt from, in which order, and which are held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hf_fda.data.rows import TaskRows
from hf_fda.errors import InputError
from hf_fda.randomness import random_stream


def split(rows: TaskRows, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """The numbers of the rows to learn from and of those held out (where none are: of all).

    Args:
        rows: a task's.
        held_out: fraction to hold out; at least one row where it is above zero.
        seed: of the choice.

    Raises:
        InputError: when no row is left to learn from.
    """
    order = torch.randperm(len(rows), generator=random_stream(seed, "held out", rows.task)).tolist()
    count = max(round(held_out * len(rows)), 1) if held_out else 0
    if len(rows) <= count:
        raise InputError(
            f"task '{rows.task}' has {len(rows)} rows, of which {count} would be held out; give more rows, or hold out "
            "less"
        )
    return order[count:], order[:count] or order


def minibatches(rows: Sequence[int], size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Minibatches without end: all rows in a new order each time, none left over twice as often as another.

    Args:
        rows: their numbers.
        size: of a minibatch; all rows where there are fewer.
        generator: of the order.
    """
    size = min(size, len(rows))
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            order = torch.randperm(len(rows), generator=generator).tolist()
            waiting += [rows[position] for position in order]
        yield waiting[:size]
        waiting = waiting[size:]
