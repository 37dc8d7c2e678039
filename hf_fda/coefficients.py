"""Coefficients of task vectors that a merge learnt: their file and their table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_fda.errors import RunError
from hf_fda.printing import text_table

COEFFICIENTS = "coefficients.json"
"""The file in a merged folder that says what was learnt."""

HEAT_MAP = "coefficients.png"
"""Its picture, where matplotlib is installed."""


@dataclass(frozen=True)
class Seen:
    """What was minimised, after some steps: its value for each task, on rows that were not learnt from."""

    step: int
    objective: tuple[float, ...]


@dataclass(frozen=True)
class Coefficients:
    """Learnt coefficients of K sources for G groups of tensors.

    `values` is K x G, with the `sources` as rows and the `groups` as columns; `group_of` says of the base's tensors in
    which group each is, `block_of` of the groups in which block (groups of one block may be shown together).
    `objective` says in words what was minimised; `history` how it fell, where that was looked at; `best_step` whose
    coefficients these are.
    """

    sources: tuple[str, ...]
    groups: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    group_of: Mapping[str, int]
    block_of: Mapping[str, str]
    objective: str
    history: tuple[Seen, ...]
    best_step: int

    @classmethod
    def read(cls, path: Path) -> Coefficients:
        """What a file holds.

        Raises:
            RunError: when it is damaged.
        """
        try:
            facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            history = tuple(Seen(seen["step"], tuple(seen["objective"])) for seen in facts.pop("history"))
            values = tuple(tuple(row) for row in facts.pop("values"))
            sources, groups = (tuple(facts.pop(name)) for name in ("sources", "groups"))
            return cls(sources=sources, groups=groups, values=values, history=history, **facts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: damaged ({error}); remove it and run the same merge again") from None

    def text(self) -> str:
        """The content of the file."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def of_tensor(self, name: str) -> tuple[float, ...]:
        """The coefficient of every source for one of the base's tensors; zeros where no source moves it."""
        group = self.group_of.get(name)
        return tuple(0.0 if group is None else row[group] for row in self.values)

    @property
    def before(self) -> tuple[float, ...]:
        """The objective of each task at the start."""
        return self.history[0].objective

    @property
    def after(self) -> tuple[float, ...]:
        """The objective of each task with these coefficients."""
        return next(seen.objective for seen in self.history if seen.step == self.best_step)

    def by_block(self) -> dict[str, tuple[tuple[float, float, float], ...]]:
        """By block, for each source the mean, the least and the largest coefficient of its groups."""
        return {
            block: tuple(_spread([row[number] for number in numbers]) for row in self.values)
            for block, numbers in self.places().items()
        }

    def places(self) -> dict[str, list[int]]:
        """By block, the numbers of its groups."""
        found: dict[str, list[int]] = {}
        for number, group in enumerate(self.groups):
            found.setdefault(self.block_of[group], []).append(number)
        return found

    def rows(self) -> list[tuple[str, ...]]:
        """A table in words: a row for each block, and what was minimised before and after."""
        rows = [(block, *map(_cell, spreads)) for block, spreads in self.by_block().items()]
        if self.history:
            rows.append((f"{self.objective}, before", *(f"{value:.4f}" for value in self.before)))
            rows.append((f"{self.objective}, after", *(f"{value:.4f}" for value in self.after)))
        return rows

    def __str__(self) -> str:
        rows = [("", *self.sources), *self.rows()]
        return "\n".join(text_table(rows, right=range(1, len(rows[0]))))


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return sum(values) / len(values), min(values), max(values)


def _cell(spread: tuple[float, float, float]) -> str:
    """A mean, with the range where there is one.

    >>> _cell((0.5, 0.25, 0.75))
    '0.50 (0.25 to 0.75)'
    """
    mean, low, high = spread
    return f"{mean:.2f}" if low == high else f"{mean:.2f} ({low:.2f} to {high:.2f})"
