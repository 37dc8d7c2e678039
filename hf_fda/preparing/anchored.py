"""Coefficients of task vectors found on anchors, in the place of rows of data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_fda.anchors.adaptation import objective_of
from hf_fda.anchors.coefficients import UnitProblem, learn_coefficients
from hf_fda.anchors.pieces import Anchors
from hf_fda.blocks import Unit
from hf_fda.coefficients import Coefficients
from hf_fda.divergence.directions import orthogonal_parts
from hf_fda.divergence.groups import group
from hf_fda.lowrank import LowRank
from hf_fda.merge_methods import FDAConfig
from hf_fda.preparing.coefficients import CoefficientPreparation
from hf_fda.stages import Piece


class AnchoredPreparation(CoefficientPreparation):
    """Constructs the anchors of every source that has none, and finds the coefficients with which every block does on
    each source's anchors most nearly what that source's block does.

    What lies outside the blocks keeps the coefficients it starts with, unless it shares them with a block.

    Args:
        run: of a plan by a method that finds coefficients on anchors.
    """

    @property
    def count(self) -> int:
        """As `Preparation.count`."""
        return self.anchors.count + 1

    def before(self) -> Iterator[Sequence[Piece]]:
        """As `CoefficientPreparation.before`: the anchors."""
        yield self.anchors.pieces()
        if self.run.team.main:
            self.anchors.frame()

    def facts(self) -> tuple[Any, ...]:
        """As `CoefficientPreparation.facts`: the anchors."""
        return ({unit.name: self.anchors.keys(unit) for unit in self.plan.units}, self._how.options())

    def find(self) -> Coefficients:
        """As `CoefficientPreparation.find`."""
        config, base = self.config, self.plan.inputs.base
        moving = [name for name in self.merged if self.run.vectors.may_move(name)]
        groups = group(base.layout, moving, config.granularity)
        units = {unit.name: self._problem(unit) for unit in self.plan.units}
        inside = {name: groups.of[name] for unit in self.plan.units for name in unit.tensors if name in groups.of}
        start = torch.full((len(self.sources), len(groups)), config.start, dtype=torch.float64)
        values = learn_coefficients(
            units,
            inside,
            start,
            report=lambda what, distance: self.run.progress.now(f"coefficients of {what}", distance),
        )
        return self.named(values, groups, "distance of the blocks' outputs")

    @cached_property
    def anchors(self) -> Anchors:
        """The anchors of all sources."""
        return Anchors(self.run, self._how)

    @property
    def _how(self) -> FDAConfig:
        assert self.plan.anchoring is not None
        return self.plan.anchoring

    def _problem(self, unit: Unit) -> Callable[[], UnitProblem]:
        """What makes the problem of one unit."""

        def make() -> UnitProblem:
            builder, vectors = self.anchors.builder, self.run.vectors
            module, call = builder.load(self.plan.inputs.base.read, unit), builder.capture.calls[unit.name]
            moved = [anchors for anchors in self.anchors.of(unit) if anchors.moves]
            aim = objective_of(self._how, module, call, moved, self.plan.device)
            tasks = {
                name.removeprefix(f"{unit.name}."): self._moves(name) for name in unit.tensors if vectors.may_move(name)
            }
            return UnitProblem(module, tasks, aim, call)

        return make

    def _moves(self, name: str) -> list[Tensor]:
        """What each source's coefficient is of, in one tensor."""
        tasks = self.run.vectors.read(name, torch.float32)[1]
        if self.config.initial == "task_arithmetic":
            return tasks
        parts = orthogonal_parts(tasks, self.plan.inputs.base.layout.roles[name])
        return [part.dense() if isinstance(part, LowRank) else part for part in parts]
