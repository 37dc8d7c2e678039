"""What is right for a row: a label, several, or numbers, from the column that holds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from hf_fda.data.rows import Kind
from hf_fda.data.tables import LABEL, Row, Table, described
from hf_fda.errors import InputError, nearest

USUAL = ("label", "labels", "label_ids", "target", "targets", "class", "category", "intent", "answer")
"""Columns that are taken for the labels."""

USUAL_VALUES = ("score", "similarity_score", "rating", "value")
"""Columns that are taken for a regression's values, too."""


def label_column(table: Table, kind: Kind, named: str | None, read: Collection[str] = ()) -> str:
    """The column of a table that says what is right.

    Args:
        table: the rows.
        kind: what the model's logits mean.
        named: the column that a user names.
        read: the columns that the model reads, which are not it.

    Raises:
        InputError: when it is not there, or cannot be told.
    """
    if named is not None:
        if named not in table.columns:
            raise InputError(f"{table.label} has no column '{named}' of labels: {nearest(named, table.columns)}")
        return named
    lower = {name.lower(): name for name in table.columns if name not in read}
    for name in (*USUAL, *(USUAL_VALUES if kind == "values" else ())):
        if name in lower:
            return lower[name]
    possible = [name for name in lower.values() if table.columns[name] in (LABEL, f"list of {LABEL}")]
    if len(possible) == 1:
        return possible[0]
    raise InputError(
        f"{table.label}: which column says what is right? It has {described(table.columns)}; name it: "
        "{'path': ..., 'label': '...'} (--label TASK=...)"
    )


def label_reader(table: Table, kind: Kind, column: str, config: PretrainedConfig) -> Callable[[Row, int], Any]:
    """What gives the right answer of a row, with the row's number for messages.

    Args:
        table: the rows.
        kind: what the model's logits mean: "labels" gives the label's id, "flags" a list with 1 for each label that is
            right, "values" a number, or a list where the model gives several.
        column: of the labels.
        config: the model's, which names its labels.
    """
    if kind == "values":
        count = int(config.num_labels or 1)
        return lambda row, number: _values(_plain(row.get(column)), count, _place(table, column, number))
    ids = LabelIds(config, table.classes.get(column, ()))
    if kind == "flags":
        return lambda row, number: ids.flags(_plain(row.get(column)), _place(table, column, number))
    return lambda row, number: ids.id(_plain(row.get(column)), _place(table, column, number))


class LabelIds:
    """A model's label ids of what a column of labels holds: their names, or numbers.

    Numbers are the model's ids, unless the dataset names its numbers, and the model knows all of these names: then it
    is the names that count.

    Args:
        config: the model's.
        classes: the dataset's names of its numbers.
    """

    def __init__(self, config: PretrainedConfig, classes: Sequence[str] = ()) -> None:
        self.count = int(config.num_labels or 1)
        known: Mapping[str, Any] = config.label2id or {}
        self.ids = {str(name): int(id) for name, id in known.items()}
        lower = {name.casefold(): id for name, id in self.ids.items()}
        self.lower = lower if len(lower) == len(self.ids) else {}
        named = [self._named(name) for name in classes]
        self.classes = [] if None in named else [id for id in named if id is not None]

    def id(self, value: Any, place: str) -> int:
        """The id of one label.

        Raises:
            InputError: naming the row, when there is none, or the model does not know it.
        """
        number = _whole(value)
        if value is None or number == -1 or value == "":
            raise InputError(f"{place} has no label; choose a split with labels, or leave such rows out")
        if isinstance(value, str) and (named := self._named(value)) is not None:
            return named
        if number is not None and 0 <= number < len(self.classes):
            return self.classes[number]
        if number is not None and 0 <= number < self.count:
            return number
        raise InputError(f"{place} has the label {value!r}, which the model does not know: {self._known(value)}")

    def flags(self, value: Any, place: str) -> list[int]:
        """1 for each label that is right, else 0: from a list of names or ids, or of a 0 or 1 for each label.

        Raises:
            InputError: as `id`.
        """
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{place} holds {value!r:.40}, where a list of labels, or of 0 and 1, was expected")
        numbers = [_whole(own) for own in value]
        if len(value) == self.count and not self.classes and all(own in (0, 1) for own in numbers):
            return [int(own or 0) for own in numbers]
        right = {self.id(own, place) for own in value}
        return [int(id in right) for id in range(self.count)]

    def _named(self, name: str) -> int | None:
        return self.ids.get(name, self.lower.get(name.casefold()))

    def _known(self, value: Any) -> str:
        return (
            nearest(str(value), self.ids) if isinstance(value, str) else f"it has {self.count} (0 to {self.count - 1})"
        )


def _values(value: Any, count: int, place: str) -> float | list[float]:
    """The number of a row, or its numbers."""
    listed = value if isinstance(value, (list, tuple)) else [value]
    try:
        numbers = [float(own) for own in listed]
    except (TypeError, ValueError):
        raise InputError(f"{place} holds {value!r:.40}, where a number was expected") from None
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise InputError(f"{place} holds {value!r:.40}, where {count} finite number(s) were expected")
    return numbers if count > 1 else numbers[0]


def _plain(value: Any) -> Any:
    """A value of a tensor or an array as plain numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _whole(value: Any) -> int | None:
    """A value as a whole number, also where a file holds it as text; None where it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def _place(table: Table, column: str, number: int) -> str:
    return f"{table.label}: row {number}, column '{column}',"
