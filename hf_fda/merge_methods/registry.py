"""Merge methods by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from hf_fda.errors import InputError, nearest
from hf_fda.merge_methods.config import MethodConfig
from hf_fda.merge_methods.conversion import describe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

C = TypeVar("C", bound=MethodConfig)
_CONFIGS: dict[str, type[MethodConfig]] = {}


def register(config: type[C]) -> Callable[[Callable[..., Tensor]], Any]:
    """Register a method: decorates its pure function ``(base, tasks, config) -> merged task tensor``, or
    ``(base, tasks, config, generator)`` of one that is random."""

    def decorate(function: Callable[..., Tensor]) -> Any:
        def merge(self: C, base: Tensor, tasks: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
            self.check_count(len(tasks))
            return function(base, tasks, self, generator) if self.random else function(base, tasks, self)

        config.merge = merge  # type: ignore[method-assign, assignment]
        register_config(config)
        return function

    return decorate


def register_config(config: type[MethodConfig]) -> None:
    """Register a method that does not work tensor by tensor (the engine runs it)."""
    _CONFIGS[config.name] = config


def method_class(name: str) -> type[MethodConfig]:
    """The config class of a method.

    Raises:
        InputError: when no method has that name; the nearest is suggested.
    """
    if name not in _CONFIGS:
        raise InputError(f"there is no method '{name}': {nearest(name, _CONFIGS)}")
    return _CONFIGS[name]


def resolve_method(method: str | MethodConfig, options: Mapping[str, Any]) -> MethodConfig:
    """A config from a method's name and loose options, or a ready config (then without options).

    Raises:
        InputError: for an unknown method or option, or options beside a ready config.
    """
    if isinstance(method, MethodConfig):
        if options:
            names = ", ".join(options)
            raise InputError(f"options ({names}) belong inside the {type(method).__name__} object that was given")
        return method
    if not isinstance(method, str):
        raise InputError(f"method must be a registered name or a config object, not {type(method).__name__}")
    return method_class(method).from_options(options)


@dataclass(frozen=True)
class OptionInfo:
    """One option of a method, for printing."""

    name: str
    type: str
    default: Any
    help: str


@dataclass(frozen=True)
class MethodInfo:
    """What `hf-fda methods` prints of a method."""

    name: str
    summary: str
    paper: str
    options: tuple[OptionInfo, ...]

    def __str__(self) -> str:
        lines = [self.name, f"  {self.summary}", f"  {self.paper}", "  options:" if self.options else "  no options"]
        width = max((len(option.name) for option in self.options), default=0)
        for option in self.options:
            last = option.help.rpartition("; ")[2]
            default = last if option.default is None and last.startswith("by ") else option.default
            lines.append(f"    {option.name:<{width}}  {option.help} ({option.type}; default {default})")
        return "\n".join(lines)


def methods() -> dict[str, MethodInfo]:
    """Every registered method with its options, by name.

    >>> print(methods()["linear"].paper)
    Model soups, arXiv 2203.05482
    """
    return {name: _info(config) for name, config in _CONFIGS.items()}


def _info(config: type[MethodConfig]) -> MethodInfo:
    hints = get_type_hints(config)
    options = tuple(
        OptionInfo(field.name, describe(hints[field.name]), field.default, field.metadata.get("help", ""))
        for field in dataclasses.fields(config)
    )
    return MethodInfo(config.name, config.summary, config.paper, options)
