"""Which tensors share a coefficient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_fda.blocks import find_blocks, regions
from hf_fda.checkpoint.layout import ModelLayout
from hf_fda.merge_methods.learned import Granularity


@dataclass(frozen=True)
class Groups:
    """G groups of tensors: their names in the model's order, and the number of each tensor's group by its name."""

    names: tuple[str, ...]
    of: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.names)


def group(layout: ModelLayout, tensors: Sequence[str], granularity: Granularity) -> Groups:
    """Deal tensors out to groups.

    Args:
        layout: the base's.
        tensors: the base's names of what is merged.
        granularity: one group for all ("task"), one for each block and for what lies before and after the blocks
            ("block"), or one for each tensor ("tensor").
    """
    if granularity == "task":
        labels = dict.fromkeys(tensors, "all")
    elif granularity == "tensor":
        labels = {name: name for name in tensors}
    else:
        labels = _blocks(layout, tensors)
    order = {name: position for position, name in enumerate(layout.names)}
    names = list(dict.fromkeys(labels[name] for name in sorted(tensors, key=lambda name: order[name])))
    if granularity == "block":
        names.sort(key=lambda name: {"before": -1, "after": 1}.get(name, 0))
    numbers = {name: number for number, name in enumerate(names)}
    return Groups(tuple(names), {name: numbers[label] for name, label in labels.items()})


def _blocks(layout: ModelLayout, tensors: Sequence[str]) -> dict[str, str]:
    where = regions(layout)
    labels: dict[str, str] = {name: where[name] for name in tensors}
    for block in find_blocks(layout.model):
        inside = f"{block}."
        labels.update({name: block for name in tensors if name.startswith(inside)})
    return labels
