"""Writing the merged model's weight files: each tensor by its recipe, each file whole or not at all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_fda import costs
from hf_fda.checkpoint.writer import SafetensorsWriter, Shard
from hf_fda.devices import release_memory
from hf_fda.preparing.interface import Preparation
from hf_fda.publish import publish
from hf_fda.recipes import Recipe, out_dtype
from hf_fda.running import Run
from hf_fda.stages import Piece
from hf_fda.store import WORK, key_of
from hf_fda.streaming.footprint import AHEAD_BYTES, Footprint
from hf_fda.streaming.merging_tensors import TensorMerger, check_finite
from hf_fda.streaming.tensorwise import parts_of
from hf_fda.streaming.workers import Workers
from hf_fda.version import versions

STAGED = f"{WORK}/staged"
"""Where finished weight files wait until all are there."""

RELEASE_EVERY = 250_000_000
"""Bytes written to a weight file between two times that freed memory is given back."""


def rule_of(recipe: Recipe, seed: int) -> tuple[Any, ...]:
    """What of a recipe determines the tensor it makes, as plain values; the seed where chance has a part in it."""
    if recipe.config is None:
        return (recipe.rule,)
    return recipe.rule, recipe.config.name, recipe.config.options(), seed if recipe.config.random else None


@dataclass(frozen=True)
class Step:
    """A step in the writing of a weight file: `make` gives the next entries of some tensors, flat, by their names on
    disk; `held` is the bytes that it takes until they are written."""

    held: int
    make: Callable[[], dict[str, Tensor]]


class Assembly(ABC):
    """What a plan writes, part by part.

    Args:
        run: the run it is part of.
        preparation: what the method found out before.
    """

    def __init__(self, run: Run, preparation: Preparation) -> None:
        self.run, self.preparation = run, preparation
        self.plan, self.vectors, self.fingerprints = run.plan, run.vectors, run.fingerprints

    @property
    @abstractmethod
    def parts(self) -> Sequence[Any]:
        """What is made one by one."""

    @abstractmethod
    def tensors_in(self, part: Any) -> set[str]:
        """The base's names of the tensors in a part."""

    @abstractmethod
    def piece(self, part: Any) -> Piece:
        """The work of making one part."""

    @abstractmethod
    def publish(self) -> None:
        """Put the finished parts in their place and write everything around them."""


class CheckpointAssembly(Assembly):
    """The weight files of one plan; arguments as `Assembly`."""

    @cached_property
    def footprint(self) -> Footprint:
        """What each tensor needs while it is made."""
        return Footprint(self.plan.inputs, self.plan.result, self.plan.dtype)

    @property
    def parts(self) -> tuple[Shard, ...]:
        """What is made one by one."""
        return self.plan.shards

    def publish(self) -> None:
        """Put the finished files in their place and write everything around them."""
        publish(self.plan, self.run.store, self.run.data_prints, self.run.spent)

    def tensors_in(self, shard: Shard) -> set[str]:
        """The base's names of the tensors in a weight file."""
        known = self.plan.result.base_names
        return {known[name] for group in shard.groups for name in group if name in known}

    def piece(self, shard: Shard) -> Piece:
        """The work of writing one weight file."""
        cost = costs.writing(self.plan.inputs, self.plan.result, shard).weight
        staged = f"{STAGED}/{shard.file}"

        def make() -> Callable[[Path], str]:
            return lambda path: self._fill(path, shard)

        return Piece(f"write {shard.file}", staged, self._shard_key(shard), cost, make, (shard.file,))

    def _shard_key(self, shard: Shard) -> str:
        keys = {name: key for name in self.tensors_in(shard) if (key := self.preparation.key(name)) is not None}
        recipes = self.plan.result.recipes
        rules = [(name, rule_of(recipes[name], self.plan.seed)) for group in shard.groups for name in group]
        specs = {name: (str(spec.dtype), spec.shape) for name, spec in shard.specs.items()}
        return key_of("shard", rules, specs, keys, self.fingerprints, versions())

    def _adapted(self, name: str) -> Tensor:
        """A tensor that was adapted with its unit."""
        found = self.preparation.adapted(name)
        return found if isinstance(found, Tensor) else self.plan.inputs.base.read(name).float() + found.dense()

    def _fill(self, path: Path, shard: Shard) -> str:
        """Write a weight file step by step, the next ones being merged meanwhile; its hash."""
        written = 0
        with Workers() as workers, SafetensorsWriter(path, shard.specs) as file:
            steps = self._steps(TensorMerger(self.vectors, workers), shard)
            for made in workers.in_order(lambda step: step.make(), steps, lambda step: step.held, AHEAD_BYTES):
                for name, entries in made.items():
                    file.append(name, entries)
                    written += entries.nbytes
                if written > RELEASE_EVERY:
                    release_memory()
                    written = 0
        return file.digest

    def _steps(self, merger: TensorMerger, shard: Shard) -> Iterator[Step]:
        """What is done for a weight file, in order."""
        for group in shard.groups:
            sizes = self.footprint.steps(group)
            if not self.footprint.by_parts(group):
                yield Step(sizes[0], partial(self._group, merger, group))
                continue
            name, shape = group[0], self.plan.result.layout.shapes[group[0]]
            disk = next(iter(self.plan.result.layout.to_disk({name: torch.empty(shape, device="meta")})))
            own, config = self.plan.result.base_names[name], self.plan.result.recipes[name].config
            assert config is not None
            merge = merger.by_parts(own, self.preparation.settled(own, config), shard.specs[disk].dtype)
            for size, part in zip(sizes, parts_of(prod(shape)), strict=True):
                yield Step(size, partial(_part, disk, merge, part))

    def _group(self, merger: TensorMerger, names: Sequence[str]) -> dict[str, Tensor]:
        """All entries of tensors that are written together, by their names on disk."""
        tensors = {name: self._tensor(merger, name) for name in names}
        return {name: tensor.flatten() for name, tensor in self.plan.result.layout.to_disk(tensors).items()}

    def _tensor(self, merger: TensorMerger, name: str) -> Tensor:
        """One merged tensor in memory layout and in the type that is written, on the CPU, by its recipe.

        Raises:
            RunError: when it is not finite although its inputs are.
        """
        recipe, own = self.plan.result.recipes[name], self.plan.result.base_names.get(name)
        dtype = out_dtype(self.plan.inputs, self.plan.result, name, self.plan.dtype)
        if recipe.rule == "unit":
            return self._adapted(self.plan.result.base_names[name]).to(dtype)
        if recipe.rule == "base":
            return self.plan.inputs.base.read(self.plan.result.base_names[name]).to(dtype)
        assert recipe.config is not None
        if own is not None:
            return merger.merged(own, self.preparation.settled(own, recipe.config), dtype)
        mean = self.vectors.soup(name, recipe.config)
        check_finite(name, mean)
        return mean.to(dtype)


def _part(name: str, merge: Callable[[slice], Tensor], part: slice) -> dict[str, Tensor]:
    return {name: merge(part)}
