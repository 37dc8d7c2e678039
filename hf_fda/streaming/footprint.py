"""What tensors need in memory while a weight file is made of them: the engine keeps to it, and the plan states it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod

import torch

from hf_fda.checkpoint.writer import Shard
from hf_fda.inputs import Inputs
from hf_fda.merge_methods import MethodConfig
from hf_fda.recipes import Output, out_dtype
from hf_fda.streaming.taskvectors import read_in_parts
from hf_fda.streaming.tensorwise import BLOCK, PART, parts_of
from hf_fda.streaming.trimming import alone, trims, trims_globally
from hf_fda.streaming.workers import most_held

AHEAD_BYTES = 2**29
"""Bytes that the tensors which are made at a time hold together; a single larger one is made alone."""

AROUND = 2**26
"""Bytes that threads, buffers and fragments take beside the tensors."""


class Footprint:
    """Bytes of memory by output tensor.

    Args:
        inputs: base and sources.
        result: the recipes.
        dtype: of what is written; None: the base's.
    """

    def __init__(self, inputs: Inputs, result: Output, dtype: torch.dtype | None) -> None:
        self.inputs, self.result, self.dtype = inputs, result, dtype

    @cached_property
    def _unconverted(self) -> set[str]:
        return self.result.layout.unconverted(self.result.recipes)

    def by_parts(self, group: Sequence[str]) -> bool:
        """Whether tensors that are written together are one, and it is merged and written part by part: no part needs
        another one, but for what is found out before about the whole."""
        recipe, own = self.result.recipes[group[0]], self.result.base_names.get(group[0])
        if len(group) > 1 or group[0] not in self._unconverted or own is None or recipe.config is None:
            return False
        config, base = recipe.config, self.inputs.base
        if not base.dtype(own).is_floating_point or not prod(base.shape(own)) or not read_in_parts(self.inputs, own):
            return False
        role = base.layout.roles[own]
        return alone(config, role) or trims_globally(config) or (config.spans and role != "stack")

    def steps(self, group: Sequence[str]) -> list[int]:
        """Bytes that each step of making tensors that are written together holds until it is written."""
        if not self.by_parts(group):
            return [sum(map(self.of, group))]
        entries = prod(self.result.layout.shapes[group[0]])
        return [self.written(group[0]) * (part.stop - part.start) // entries for part in parts_of(entries)]

    def written(self, name: str) -> int:
        """Bytes of a tensor as it is written."""
        return prod(self.result.layout.shapes[name]) * out_dtype(self.inputs, self.result, name, self.dtype).itemsize

    def of(self, name: str) -> int:
        """Bytes that a tensor holds from when it is begun until it is written."""
        result, sources = self.result, self.inputs.moving
        recipe, own, entries = result.recipes[name], result.base_names.get(name), prod(result.layout.shapes[name])
        written = self.written(name)
        if recipe.rule == "unit":
            return written + entries * 4
        if own is None:
            return written + entries * 8 * (len(sources) + 3)
        read = self.read_bytes(own)
        if recipe.config is None:
            return written + entries * self.inputs.base.dtype(own).itemsize
        held = trims(recipe.config)
        role = result.layout.roles[name]
        if not held and not recipe.config.spans and not alone(recipe.config, role):
            return written + entries * 4 * (3 * len(sources) + 8) + self._extra(name, recipe.config)
        whole = [source for source in sources if own in source.tensor_of and not source.in_parts(own)]
        converted = 2 * read if whole or not self.inputs.base.in_parts(own) else 0
        return written + converted + (read if held else 0)

    def _extra(self, name: str, config: MethodConfig) -> int:
        """Bytes that a method needs for a matrix beside its task vectors."""
        shape, role = self.result.layout.shapes[name], self.result.layout.roles[name]
        if len(shape) < 2:
            return 0
        d_out, d_in = shape[::-1] if role == "conv1d" else shape[-2:]
        return config.extra_bytes((d_out, d_in))

    def read_bytes(self, own: str) -> int:
        """Bytes of one of the base's tensors in base and sources, as they are stored."""
        there = [source.dtype(own) for source in self.inputs.moving if own in source.tensor_of]
        return prod(self.inputs.base.shape(own)) * sum(
            dtype.itemsize for dtype in (self.inputs.base.dtype(own), *there)
        )

    def peak(self, shard: Shard) -> int:
        """The most bytes that are held at once while a weight file is made: tensors on their way, the one that was
        written last, and what each thread computes with.
        """
        count, models = torch.get_num_threads(), len(self.inputs.moving) + 1
        sizes = [size for group in shard.groups for size in self.steps(group)]
        whole = [sum(map(self.written, group)) for group in shard.groups if not self.by_parts(group)]
        largest = max([PART * 4, *whole])
        each = models * PART * 4 + BLOCK * 8 * (3 * models + 4)
        return most_held(sizes, AHEAD_BYTES, count) + largest + count * each + AROUND
