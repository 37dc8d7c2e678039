"""Rows as they lie in a file, a dataset or a list: their columns, and those that are wanted, not yet read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_fda.errors import InputError, nearest
from hf_fda.randomness import random_stream

Row = Mapping[str, Any]

LOOKED_AT = 100
"""How many of the first rows are looked at for the columns' types, where no file says them."""

TEXT, TEXTS, IMAGE, LABEL, MESSAGES = "text", "list of text", "image", "label", "list of messages"
NOTHING = "empty"
SOLE = "rows"
"""What the column of rows is called that are bare texts or images."""

DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class Table:
    """Rows with columns.

    `label` is what to call it in messages, `columns` are their types in words by name, `count` the number of rows where
    it is known. `first` gives the rows from the first on; `read` all or at most so many of them, as a sample by a
    random stream where they can be counted. `facts` say how to find it again. `classes` are the names of the numbers in
    columns of labels, by column, where the dataset says them. `assumed` says that where the rows are to come from was
    not looked at yet.
    """

    label: str
    columns: Mapping[str, str]
    count: int | None
    first: Callable[[], Iterator[Row]]
    read: Callable[[int | None, torch.Generator], Sequence[Row]]
    facts: Mapping[str, Any]
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    assumed: bool = False

    def sample(self, rows: int | None, seed: int, task: str) -> Sequence[Row]:
        """At most so many rows, the same for the same seed, in their own order."""
        return self.read(rows, random_stream(seed, "data", task))


class Picked(Sequence[Row]):
    """Some of a table's rows, each of them read when it is asked for.

    Args:
        row: gives a row by its number.
        numbers: of the rows.
    """

    def __init__(self, row: Callable[[int], Row], numbers: Sequence[int]) -> None:
        self._row, self._numbers = row, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: Any) -> Any:
        return self._row(self._numbers[place])


def listed(
    label: str, rows: Sequence[Row], facts: Mapping[str, Any], columns: Mapping[str, str] | None = None
) -> Table:
    """A table of rows that can be counted and of which any can be asked for.

    Args:
        label: what to call it in messages.
        rows: the rows; a `datasets.Dataset` is one, too.
        facts: how to find it again.
        columns: types by name; None: those of the values in the first rows.
    """

    def read(most: int | None, stream: torch.Generator) -> Sequence[Row]:
        chosen = range(len(rows)) if most is None else drawn(len(rows), most, stream)
        return Picked(rows.__getitem__, chosen)

    def first() -> Iterator[Row]:
        return (rows[row] for row in range(len(rows)))

    types = types_of(list(itertools.islice(first(), LOOKED_AT))) if columns is None else columns
    return Table(label, types, len(rows), first, read, facts, class_names(getattr(rows, "features", None)))


def streamed(
    label: str,
    rows: Callable[[], Iterator[Row]],
    facts: Mapping[str, Any],
    columns: Mapping[str, str] | None = None,
    classes: Mapping[str, Sequence[str]] | None = None,
) -> Table:
    """A table of rows that can only be had one after the other; of these the first ones are read."""

    def read(most: int | None, stream: torch.Generator) -> list[Row]:
        return list(itertools.islice(rows(), most))

    types = types_of(list(itertools.islice(rows(), LOOKED_AT))) if columns is None else columns
    return Table(label, types, None, rows, read, facts, classes or {})


def drawn(count: int, most: int, stream: torch.Generator) -> list[int]:
    """The numbers of at most so many of `count` rows, drawn without replacement, in order."""
    return sorted(torch.randperm(count, generator=stream)[:most].tolist())


def types_of(rows: Sequence[Row]) -> dict[str, str]:
    """The columns of some rows with the type of their first value that is not None."""
    types: dict[str, str] = {}
    for row in rows:
        for name, value in row.items():
            if types.get(name, NOTHING) == NOTHING:
                types[str(name)] = type_of(value)
    return types


def type_of(value: Any) -> str:
    """What a value is, in words.

    >>> type_of("a"), type_of(["a"]), type_of([{"role": "user", "content": "a"}]), type_of(1.5), type_of(None)
    ('text', 'list of text', 'list of messages', 'number', 'empty')
    """
    if value is None:
        return NOTHING
    if isinstance(value, str):
        return TEXT
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, Mapping):
        return IMAGE if {"bytes", "path"} == set(value) else f"mapping of {', '.join(map(str, value))}"
    if isinstance(value, (list, tuple)):
        inner = type_of(value[0]) if value else NOTHING
        return MESSAGES if is_message(value[0] if value else None) else f"list of {inner}"
    if type(value).__module__.partition(".")[0] == "PIL":
        return IMAGE
    return type(value).__name__


def is_message(value: Any) -> bool:
    """Whether a value is one message of a conversation, in either of the two usual forms."""
    return isinstance(value, Mapping) and ({"role", "content"} <= set(value) or {"from", "value"} <= set(value))


def types_of_features(features: Mapping[str, Any]) -> dict[str, str]:
    """The columns of a dataset with their types, from its features."""
    return {name: _type_of_feature(feature) for name, feature in features.items()}


def _type_of_feature(feature: Any) -> str:
    kind = type(feature).__name__
    if kind == "Value":
        names = {"string": TEXT, "int": "integer", "float": "number", "bool": "true or false", "null": NOTHING}
        return next((own for name, own in names.items() if name in feature.dtype), feature.dtype)
    if kind == "ClassLabel":
        return LABEL
    if kind == "Image":
        return IMAGE
    if kind in ("List", "LargeList", "Sequence"):
        inner = feature.feature
        if isinstance(inner, Mapping) and is_message(dict.fromkeys(inner)):
            return MESSAGES
        return f"list of {_type_of_feature(inner)}"
    if isinstance(feature, list):
        return MESSAGES if is_message(feature[0]) else f"list of {_type_of_feature(feature[0])}"
    if isinstance(feature, Mapping):
        return f"mapping of {', '.join(feature)}"
    return kind


def class_names(features: Any) -> dict[str, list[str]]:
    """The names of the numbers in a dataset's columns of labels, and of lists of labels; none without features."""
    inner = {name: getattr(own, "feature", own) for name, own in (features or {}).items()}
    return {name: list(own.names) for name, own in inner.items() if type(own).__name__ == "ClassLabel"}


def choose_split(splits: Sequence[str], wanted: str | None, label: str) -> str:
    """The split that is meant: the one that is named, the only one, or "train".

    Raises:
        InputError: naming those that are there.
    """
    names = list(splits)
    if wanted is not None:
        if wanted.partition("[")[0] not in names:
            raise InputError(f"{label} has no split '{wanted}': {nearest(wanted, names)}")
        return wanted
    if len(names) == 1:
        return names[0]
    if DEFAULT_SPLIT in names:
        return DEFAULT_SPLIT
    raise InputError(
        f"{label} has several splits ({', '.join(names)}); say which: {{'path': ..., 'split': '{names[0]}'}}"
    )


def described(columns: Mapping[str, str]) -> str:
    """Columns with their types, for messages.

    >>> described({"text": "text", "label": "integer"})
    "'text' (text), 'label' (integer)"
    """
    return ", ".join(f"'{name}' ({kind})" for name, kind in columns.items())
