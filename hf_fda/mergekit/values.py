"""Values that depend on the tensor: by a filter on its name, by the depth of its layer, or on neither."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_fda.mergekit.yamlnodes import Node, Scalar


@dataclass(frozen=True)
class Choice:
    """A value for tensors whose name contains `filter` (None: for all). Several values are spread over the layers."""

    filter: str | None
    values: tuple[Scalar, ...]

    def fits(self, name: str) -> bool:
        """Whether it is for a tensor of this name."""
        return self.filter is None or self.filter == "*" or self.filter in name

    def at(self, depth: float) -> Scalar:
        """The value at a depth from 0 (first layer) to 1 (last): numbers are interpolated on straight lines between
        evenly spaced ones, other values hold until the next."""
        place = depth * (len(self.values) - 1)
        low = int(place)
        high = min(low + 1, len(self.values) - 1)
        first, second = self.values[low], self.values[high]
        if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in self.values):
            return first
        if low == high or first == second:
            return first
        return (1 - (place - low)) * float(first) + (place - low) * float(second)


@dataclass(frozen=True)
class Setting:
    """A parameter's value: the first choice that fits a tensor."""

    choices: tuple[Choice, ...]
    node: Node

    @property
    def constant(self) -> bool:
        """Whether it is the same for all tensors."""
        return len(self.choices[0].values) == 1 and self.choices[0].filter in (None, "*")

    @property
    def filtered(self) -> bool:
        """Whether the tensors' names count."""
        return any(choice.filter not in (None, "*") for choice in self.choices)

    def at(self, names: Sequence[str], depth: float) -> Scalar | None:
        """The value for a tensor, None where no filter fits it.

        Args:
            names: of the tensor on disk; several where it is stored in parts (a stack of experts); none for what
                holds whatever the name is.
            depth: of its layer, from 0 to 1.

        Raises:
            InputError: when a filter fits some of the parts only.
        """
        for choice in self.choices:
            fitting = [choice.fits(name) for name in names or ("",)]
            if any(fitting) and not all(fitting):
                self.node.refuse(
                    f"the filter '{choice.filter}' fits '{names[fitting.index(True)]}' and not "
                    f"'{names[fitting.index(False)]}', which are one tensor in the model; use a filter for both or none"
                )
            if all(fitting):
                return choice.at(depth)
        return None


def read_setting(node: Node) -> Setting:
    """A parameter's value from YAML: a value, a list of values (over the layers), or choices by filter.

    Raises:
        InputError: naming the line, when it is none of these.
    """
    if node.is_mapping:
        return Setting((_choice(node),), node)
    if not node.is_list:
        return Setting((Choice(None, (node.scalar(),)),), node)
    items = node.items()
    if not items:
        node.refuse("is an empty list; give a value")
    if all(item.is_mapping for item in items):
        return Setting(tuple(_choice(item) for item in items), node)
    return Setting((Choice(None, _spread(node)),), node)


def _choice(node: Node) -> Choice:
    fields = node.fields(("filter", "value"))
    if "value" not in fields:
        node.refuse("value is missing")
    name = fields["filter"].text() if "filter" in fields else None
    value = fields["value"]
    return Choice(name, _spread(value) if value.is_list else (value.scalar(),))


def _spread(node: Node) -> tuple[Scalar, ...]:
    items = node.items()
    if not items:
        node.refuse("is an empty list; give a value")
    return tuple(item.scalar() for item in items)
