"""What the merges of whole units have in common before weights are written: where adapted units lie, and whose they
are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container
from functools import cached_property

from torch import Tensor

from hf_fda.blocks import Unit
from hf_fda.lowrank import LowRank
from hf_fda.preparing.interface import Preparation
from hf_fda.running import Run
from hf_fda.unit_files import adapted_file, read_adapted


class UnitPreparation(Preparation):
    """Makes every unit of a plan, each in a file of its own.

    Args:
        run: of a plan whose method merges units.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.base, self.units = self.plan.inputs.base, self.plan.units
        self.unit_of = {name: unit for unit in self.units for name in unit.tensors}

    def key(self, name: str) -> str | None:
        """As `Preparation.key`: of its unit."""
        unit = self.unit_of.get(name)
        return None if unit is None else self.unit_keys[unit.name]

    def adapted(self, name: str) -> Tensor | LowRank:
        """As `Preparation.adapted`."""
        path = self.plan.output / self.file(self.unit_of[name])
        return read_adapted(path, name, self.base.shape(name))

    @cached_property
    def unit_keys(self) -> dict[str, str]:
        """By unit, a hash of everything that determines how it comes out."""
        return {unit.name: self.unit_key(unit) for unit in self.units}

    @abstractmethod
    def unit_key(self, unit: Unit) -> str:
        """The hash of one unit."""

    def file(self, unit: Unit) -> str:
        """Where a unit lies in the output folder."""
        return adapted_file(unit.name)

    def wanted(self, unit: Unit, wanted: Container[str]) -> bool:
        """Whether any tensor of a unit is still to be written."""
        return any(name in wanted for name in unit.tensors)

    def skip(self, count: int) -> None:
        """Say that pieces need not be made, as an earlier run finished what needs them."""
        for _ in range(count):
            self.run.progress.finish("what an earlier run finished")
