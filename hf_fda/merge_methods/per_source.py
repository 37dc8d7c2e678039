"""Values that an option has for each source: one number for all, a list in the order of the sources, or by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hf_fda.errors import InputError, nearest

PerSource = float | tuple[float, ...] | dict[str, float]
"""The type of such an option. Lists and names are checked against the sources when a merge is planned."""


def in_order(option: str, value: PerSource | None, names: Sequence[str]) -> PerSource | None:
    """An option's value with what is given by name put in the order of the sources.

    Args:
        option: its name, for messages.
        value: as it was given.
        names: of the sources, in order.

    Raises:
        InputError: when a name is unknown, one is missing, or the number of values is wrong.

    >>> in_order("density", {"b": 0.2, "a": 0.1}, ["a", "b"])
    (0.1, 0.2)
    """
    if isinstance(value, dict):
        for name in value:
            if name not in names:
                raise InputError(f"{option}: there is no source '{name}': {nearest(name, names)}")
        missing = [name for name in names if name not in value]
        if missing:
            one = option.removesuffix("s")
            raise InputError(f"{option}: no {one} for {', '.join(missing)}: give one for every source")
        return tuple(value[name] for name in names)
    if isinstance(value, tuple) and len(value) != len(names):
        raise InputError(f"{option}: {len(value)} given for {len(names)} sources ({', '.join(names)})")
    return value


def for_each(option: str, value: PerSource, count: int) -> tuple[float, ...]:
    """An option's value for each source.

    Args:
        option: its name, for messages.
        value: one number, or as many as there are sources.
        count: K, the number of sources.

    Raises:
        InputError: when the values are still given by name (`with_source_names` settles that), or are not K.
    """
    if isinstance(value, dict):
        raise InputError(f"{option}: values by name need the names of the sources")
    if isinstance(value, tuple):
        if len(value) != count:
            raise InputError(f"{option}: {len(value)} given for {count} sources")
        return value
    return (value,) * count


def numbers(value: Any) -> Iterator[float]:
    """Every number in an option's value."""
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,):
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            yield item


def pairs(one: PerSource, other: PerSource) -> list[tuple[float, float]]:
    """The values of two options that meet at a source, as far as that is known without the sources' names."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [(one[name], other[name]) for name in one if name in other]
    if isinstance(one, tuple) and isinstance(other, tuple):
        return list(zip(one, other, strict=False))
    if isinstance(one, float) or isinstance(other, float):
        return [(first, second) for first in numbers(one) for second in numbers(other)]
    return []
