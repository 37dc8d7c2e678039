"""The merge by functional dual anchors before its weights are written: anchors, then units adapted to them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from hf_fda import costs
from hf_fda.adapting import adapted_unit
from hf_fda.anchors import AnchorBuilder, UnitAnchors
from hf_fda.anchors.files import Construction, read_unit, unit_file
from hf_fda.blocks import Unit
from hf_fda.checkpoint.writer import save_tensors
from hf_fda.inputs import Source
from hf_fda.lowrank import LowRank
from hf_fda.merge_methods import FDAConfig
from hf_fda.preparation import Preparation
from hf_fda.running import Run
from hf_fda.stages import Piece
from hf_fda.store import WORK, key_of
from hf_fda.unit_files import read_adapted
from hf_fda.version import versions

BLOCKS = f"{WORK}/blocks"
"""Where adapted units wait until the files that hold them are written."""


class AnchorPreparation(Preparation):
    """Constructs the anchors of every source that has none, and adapts every unit to the anchors of all sources.

    Args:
        run: of a plan by "fda".
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        assert isinstance(self.plan.config, FDAConfig)
        self.config = self.plan.config
        self.base, self.units = self.plan.inputs.base, self.plan.units
        self.unit_of = {name: unit for unit in self.units for name in unit.tensors}

    @property
    def count(self) -> int:
        """As `Preparation.count`."""
        return len(self.plan.constructions) + len(self.units)

    def stages(self, wanted: Container[str]) -> Iterator[Sequence[Piece]]:
        """As `Preparation.stages`: anchors of all units, then the units that are still to be written."""
        yield self._constructions()
        if self.run.team.main:
            self._frame()
        needed = [unit for unit in self.units if any(name in wanted for name in unit.tensors)]
        for _ in range(len(self.units) - len(needed)):
            self.run.progress.finish("what an earlier run finished")
        yield [self._adaptation(unit) for unit in needed]

    def key(self, name: str) -> str | None:
        """As `Preparation.key`: of its unit."""
        unit = self.unit_of.get(name)
        return None if unit is None else self._unit_keys[unit.name]

    def adapted(self, name: str) -> Tensor | LowRank:
        """As `Preparation.adapted`."""
        path = self.plan.output / BLOCKS / f"{self.unit_of[name].name}.safetensors"
        return read_adapted(path, name, self.base.shape(name))

    # -- anchors ---------------------------------------------------------------------------------------------------

    @cached_property
    def builder(self) -> AnchorBuilder:
        """Makes anchors."""
        return AnchorBuilder(self.base, self.units, self.config, self.plan.device, self.plan.seed)

    def _construction(self, source: Source) -> Construction:
        """What makes one source's anchors in the output folder."""
        assert source.weights is not None
        prints = (self.run.fingerprints[""], self.run.fingerprints[source.name])
        return Construction(self.run.store, f"anchors/{source.name}/", self.builder, source.weights, prints)

    def _constructions(self) -> list[Piece]:
        """The anchors of every source that has none, unit by unit."""
        pieces = []
        for source, unit in self.plan.constructions:
            cost = costs.construction(self.base, self.config, unit).weight
            pieces.append(self._construction(source).piece(unit, cost, self.run.progress))
        return pieces

    def _frame(self) -> None:
        """Write what lies around the anchors of every source."""
        for source in self.plan.inputs.sources if self.units else ():
            if source.anchors is None:
                self._construction(source).frame(self.plan.units_of(source))

    @cached_property
    def _given(self) -> dict[tuple[str, str], str]:
        """Hashes of the anchors that were given, by source and unit; each is read by one process only."""
        given = [
            (source.anchors, source.name, unit.name)
            for unit in self.units
            for source in self.plan.sources_of(unit)
            if source.anchors is not None
        ]
        hashes = self.run.team.map(lambda item: item[0].digest(item[2]), given)
        return {(source, unit): found for (_, source, unit), found in zip(given, hashes, strict=True)}

    def _anchors_key(self, source: Source, unit: Unit) -> str:
        if source.anchors is not None:
            return key_of("given", self._given[source.name, unit.name])
        return self._construction(source).key(unit)

    def _anchors_of(self, source: Source, unit: Unit) -> UnitAnchors:
        """The anchors of one unit for one source."""
        if source.anchors is not None:
            found = source.anchors[unit.name]
        else:
            found = read_unit(self.plan.output / "anchors" / source.name / unit_file(unit.name))
        self.run.vectors.note_move(source.name, lambda: found.moves)
        return found

    # -- adaptation ------------------------------------------------------------------------------------------------

    def _adaptation(self, unit: Unit) -> Piece:
        """The work of adapting one unit to the anchors of all sources."""

        def make() -> Callable[[Path], str]:
            found = [self._anchors_of(source, unit) for source in self.plan.sources_of(unit)]
            adapted = adapted_unit(self.plan, self.builder, self.run.vectors, unit, found, self.run.progress)
            return lambda path: save_tensors(path, adapted)

        sources = len(self.plan.sources_of(unit))
        cost = costs.adaptation(self.base, self.config, unit, sources, self.plan.ranks).weight
        return Piece(f"adapt {unit.name}", f"{BLOCKS}/{unit.name}.safetensors", self._unit_keys[unit.name], cost, make)

    @cached_property
    def _unit_keys(self) -> dict[str, str]:
        """By unit, a hash of everything that determines how it comes out."""
        return {unit.name: self._unit_key(unit) for unit in self.units}

    def _unit_key(self, unit: Unit) -> str:
        anchors = [self._anchors_key(source, unit) for source in self.plan.sources_of(unit)]
        ranks = {name: self.plan.ranks[name] for name in unit.tensors if name in self.plan.ranks}
        facts = self.config.options(), ranks, anchors, self.run.fingerprints, self.plan.seed, versions()
        return key_of("unit", unit.name, *facts)
