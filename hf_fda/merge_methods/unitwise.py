"""What the methods that merge blocks, or parts of them, as wholes have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from hf_fda.errors import InputError, nearest
from hf_fda.merge_methods.config import MethodConfig, option
from hf_fda.merge_methods.looking import RowsConfig
from hf_fda.merge_methods.registry import method_class


@dataclass(frozen=True, kw_only=True)
class UnitwiseConfig(RowsConfig):
    """Options of every method that merges units as wholes, from a start in parameter space."""

    compares: ClassVar[bool] = False

    start: ClassVar[str] = "base"
    """Whose options those are that the method itself does not have, where `initial` is open."""

    initial: str | MethodConfig | None = option(None, "where it starts: base, or a parameter-space method")
    rest: str | MethodConfig | None = option(None, "what lies outside the blocks: base, or a parameter-space method")
    unit: tuple[str, ...] | None = option(
        None,
        "block, or the submodules of a block to merge one by one, such as mlp; none: those of given anchors, or block",
    )

    @property
    def propagates(self) -> bool:
        """Whether units are merged in the order of the model, on what those before them make of rows."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit == ():
            raise InputError(f"method '{self.name}': option 'unit' is empty; say 'block' or a submodule such as 'mlp'")
        for role in ("initial", "rest"):
            value = getattr(self, role)
            if isinstance(value, str) and value != "base":
                value = method_class(value)()
                object.__setattr__(self, role, value)
            if isinstance(value, MethodConfig) and value.data != "never":
                raise InputError(f"method '{self.name}': {role} must be 'base' or a parameter-space method")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """As `MethodConfig.from_options`; options that the method lacks go to the `initial` method.

        `initial` and `rest` may also be mappings: ``{"method": "tsv", "scaling": 1.2}``.
        """
        own = cls.option_fields()
        mine: dict[str, Any] = {name: value for name, value in options.items() if name in own}
        others = {name: value for name, value in options.items() if name not in own}
        for role in ("initial", "rest"):
            if isinstance(mine.get(role), Mapping):
                nested = dict(mine[role])
                mine[role] = method_class(nested.pop("method", "")).from_options(nested)
        initial = mine.get("initial", cls.start)
        if others and isinstance(initial, str) and initial != "base":
            theirs = method_class(initial).option_fields()
            for name in others:
                if name not in theirs:
                    hint = nearest(name, [*own, *theirs])
                    raise InputError(
                        f"neither '{cls.name}' nor its initial method '{initial}' has an option '{name}': {hint}"
                    )
            mine["initial"] = method_class(initial).from_options(others)
        elif others:
            name = next(iter(others))
            note = "" if isinstance(initial, MethodConfig) else " (options of another method need initial=METHOD)"
            raise InputError(f"method '{cls.name}' has no option '{name}'{note}: {nearest(name, own)}")
        return cls(**mine)
