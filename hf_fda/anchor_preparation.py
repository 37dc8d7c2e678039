"""The merge by functional dual anchors before its weights are written: anchors, or real hidden states where there are
rows of data, then units adapted to them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from hf_fda import costs
from hf_fda.adapting import adapted_unit
from hf_fda.anchors import AnchorBuilder, UnitAnchors
from hf_fda.anchors.files import Construction, read_unit, unit_file
from hf_fda.blocks import Unit
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.writer import save_tensors
from hf_fda.inputs import Source
from hf_fda.merge_methods import FDAConfig
from hf_fda.running import Run
from hf_fda.stages import Piece
from hf_fda.states.pieces import Recordings
from hf_fda.store import key_of
from hf_fda.unit_preparation import UnitPreparation
from hf_fda.version import versions


class AnchorPreparation(UnitPreparation):
    """Constructs the anchors of every source that needs some, records the hidden states of every source that has rows
    of data, and adapts every unit to the anchors and states of all sources.

    Args:
        run: of a plan by "fda".
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        assert isinstance(self.plan.config, FDAConfig)
        self.config = self.plan.config

    @property
    def count(self) -> int:
        """As `Preparation.count`."""
        return len(self.plan.constructions) + self.recordings.count + len(self.units)

    def stages(self, wanted: Container[str]) -> Iterator[Sequence[Piece]]:
        """As `Preparation.stages`: anchors and states of all units, then the units that are still to be written."""
        needed = [unit for unit in self.units if self.wanted(unit, wanted)]
        adaptations = [self._adaptation(unit) for unit in needed]
        recorded = self.recordings.pieces() if not all(self.run.finished(adaptations)) else []
        yield self._constructions() + recorded
        if self.run.team.main:
            self._frame()
        self.skip(len(self.units) - len(needed) + self.recordings.count - len(recorded))
        yield adaptations

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
        for source in self.plan.anchors_made:
            self._construction(source).frame(self.plan.units_of(source))

    @cached_property
    def recordings(self) -> Recordings:
        """The hidden states of the sources that have rows."""
        return Recordings(self.run, {source.name: self.plan.units_of(source) for source in self.plan.inputs.sources})

    @cached_property
    def _given(self) -> dict[tuple[str, str], str]:
        """Hashes of the anchors that were given, by source and unit; each is read by one process only."""
        given = [
            (source.anchors, source.name, unit.name)
            for unit in self.units
            for source in self._anchored(unit)
            if source.anchors is not None
        ]
        hashes = self.run.team.map(lambda item: item[0].digest(item[2]), given)
        return {(source, unit): found for (_, source, unit), found in zip(given, hashes, strict=True)}

    def _anchored(self, unit: Unit) -> list[Source]:
        """The sources whose anchors of a unit are matched."""
        return [source for source in self.plan.sources_of(unit) if self.plan.anchored(source)]

    def _shown(self, unit: Unit) -> list[AlignedSource]:
        """The sources whose hidden states of a unit are matched."""
        sources = [source.weights for source in self.plan.sources_of(unit) if source.name in self.plan.data]
        return [source for source in sources if source is not None]

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
            found = [self._anchors_of(source, unit) for source in self._anchored(unit)]
            shown = [(source, self.recordings.of(source.name, unit)) for source in self._shown(unit)]
            adapted = adapted_unit(self.plan, self.builder, self.run.vectors, unit, found, self.run.progress, shown)
            return lambda path: save_tensors(path, adapted)

        sources = len(self.plan.sources_of(unit))
        cost = costs.adaptation(self.base, self.config, unit, sources, self.plan.ranks).weight
        return Piece(f"adapt {unit.name}", self.file(unit), self.unit_keys[unit.name], cost, make)

    def unit_key(self, unit: Unit) -> str:
        """As `UnitPreparation.unit_key`."""
        anchors = [self._anchors_key(source, unit) for source in self._anchored(unit)]
        anchors += [self.recordings.key(source.name) for source in self._shown(unit)]
        ranks = {name: self.plan.ranks[name] for name in unit.tensors if name in self.plan.ranks}
        facts = self.config.options(), ranks, anchors, self.run.fingerprints, self.plan.seed, versions()
        return key_of("unit", unit.name, *facts)
