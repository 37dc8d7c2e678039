"""Values of options, from Python, YAML or a command line, as the types that the options declare."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from types import NoneType
from typing import Any, Literal

from hf_fda.errors import InputError
from hf_fda.merge_methods.per_source import numbers


def coerce(field: dataclasses.Field[Any], hint: Any, value: Any, method: str) -> Any:
    """`value` as the type `hint` that `field` declares (from a string too), within the field's bounds."""
    label = f"method '{method}': option '{field.name}'"
    try:
        result = _convert(hint, value)
    except (TypeError, ValueError):
        raise InputError(f"{label} must be {describe(hint)}, not {value!r}") from None
    low, high = field.metadata.get("minimum"), field.metadata.get("maximum")
    for number in numbers(result):
        if (low is not None and number < low) or (high is not None and number > high):
            bounds = " and ".join(
                text for text in (low is not None and f"at least {low}", high is not None and f"at most {high}") if text
            )
            raise InputError(f"{label} must be {bounds or 'a number'}, not {number}")
    return result


def describe(hint: Any) -> str:
    """A type hint in words, for messages and `hf-fda methods`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is tuple:
        return f"a list of {describe(arguments[0])}"
    if origin is dict:
        return f"{describe(arguments[1])} by name"
    if hint is type(None):
        return "none"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _convert(hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        for argument in sorted(arguments, key=lambda item: (item is str) - (item is NoneType)):  # "none" before words
            try:
                return _convert(argument, value)
            except (TypeError, ValueError):
                continue
        raise ValueError(value)
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError(value)
    if origin is tuple:
        items = [part for part in value.split(",") if part] if isinstance(value, str) else value
        if isinstance(items, (dict, int, float)):
            raise ValueError(value)
        return tuple(_convert(arguments[0], item) for item in items)
    if origin is dict:
        if isinstance(value, str):
            value = dict(part.strip().split("=", 1) for part in value.split(","))
        return {str(key): _convert(arguments[1], item) for key, item in dict(value).items()}
    if hint is type(None):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        raise ValueError(value)
    if hint is bool:
        if isinstance(value, bool):
            return value
        words = {"true": True, "false": False, "yes": True, "no": False}
        if str(value).lower() not in words:
            raise ValueError(value)
        return words[str(value).lower()]
    if hint is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError(value)
        return int(value)
    if hint is float:
        if isinstance(value, bool) or not math.isfinite(float(value)):
            raise ValueError(value)
        return float(value)
    if hint is str:
        if isinstance(value, str):
            return value
        raise ValueError(value)
    if isinstance(value, hint):
        return value
    raise ValueError(value)
