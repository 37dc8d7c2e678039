"""Where a tensor is in a document's output: in which part, how deep, and under which names on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from hf_fda.blocks import find_blocks, regions
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.layout import ModelLayout
from hf_fda.checkpoint.view import View
from hf_fda.inputs import Inputs
from hf_fda.mergekit.groups import Group
from hf_fda.mergekit.views import Stacked


@dataclass(frozen=True)
class Place:
    """Where a tensor of the output is: its group, its depth there, and its names on disk in output and sources."""

    group: Group
    depth: float
    names: tuple[str, ...]
    source_names: tuple[tuple[str, ...], ...]


class Places:
    """Finds where the tensors of a merge's base are.

    Args:
        inputs: base and sources of the merge.
        groups: the parts of its output.
        named: whether names on disk are asked for.
    """

    def __init__(self, inputs: Inputs, groups: Sequence[Group], named: bool) -> None:
        self.inputs, self.groups, self.named = inputs, tuple(groups), named
        self._disk: dict[int, dict[str, tuple[str, ...]]] = {}

    def of(self, name: str) -> Place:
        """Where one of the base's tensors is."""
        group, depth = self._group_and_depth(name)
        if not self.named:
            return Place(group, depth, (), ((),) * len(group.sources))
        of_sources = []
        for source in self.inputs.weighted:
            own = source.tensor_of.get(name)
            of_sources.append(() if own is None else self._names(source.checkpoint, own))
        return Place(group, depth, self._names(self.inputs.base, name), tuple(of_sources))

    def _group_and_depth(self, name: str) -> tuple[Group, float]:
        block = next((own for own in self._blocks if name.startswith(own)), None)
        if block is None:
            last = regions(self.inputs.base.layout)[name] == "after"
            return self.groups[-1 if last else 0], 0.0
        number, count = self._blocks[block]
        for group in self.groups:
            length = count if group.length is None else group.length
            if number < length:
                return group, number / (length - 1) if length > 1 else 1.0
            number -= length
        raise AssertionError(f"'{name}' lies in no slice")

    @cached_property
    def _blocks(self) -> dict[str, tuple[int, int]]:
        """By the prefix of a block, its number in its list of blocks, and how many that has."""
        towers: dict[str, list[str]] = {}
        for block in find_blocks(self.inputs.base.layout.model):
            towers.setdefault(block.rpartition(".")[0], []).append(f"{block}.")
        return {own: (number, len(blocks)) for blocks in towers.values() for number, own in enumerate(blocks)}

    def _names(self, checkpoint: Checkpoint, name: str) -> tuple[str, ...]:
        """A tensor's names on disk."""
        if isinstance(checkpoint, Stacked):
            return self._names(*checkpoint.place(name))
        if isinstance(checkpoint, View):
            return self._names(checkpoint.origin, name)
        layout = checkpoint.layout
        if id(layout) not in self._disk:
            self._disk[id(layout)] = names_on_disk(layout)
        return self._disk[id(layout)][name]


def names_on_disk(layout: ModelLayout) -> dict[str, tuple[str, ...]]:
    """By name in memory, the names under which `save_pretrained` writes a tensor; several where it is written in parts.

    Args:
        layout: of the model.
    """
    found = {}
    for group in layout.save_groups(layout.names):
        disk = tuple(layout.to_disk({name: torch.empty(layout.shapes[name], device="meta") for name in group}))
        found.update(dict.fromkeys(group, disk))
    return found
