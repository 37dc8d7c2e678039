"""The anchors of a run: a piece of work for each source and unit that has none yet, and those that were given."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from hf_fda import costs
from hf_fda.anchors.beside import Beside
from hf_fda.anchors.builder import AnchorBuilder
from hf_fda.anchors.construction import UnitAnchors
from hf_fda.anchors.files import Construction, read_unit, unit_file
from hf_fda.blocks import Unit
from hf_fda.inputs import Source
from hf_fda.merge_methods import FDAConfig
from hf_fda.running import Run
from hf_fda.stages import Piece
from hf_fda.store import key_of


class Anchors:
    """The anchors that a run looks at.

    Args:
        run: the run they are part of.
        config: the options they are constructed with, complete.
    """

    def __init__(self, run: Run, config: FDAConfig) -> None:
        self.run, self.plan, self.config = run, run.plan, config

    @cached_property
    def builder(self) -> AnchorBuilder:
        """Makes anchors."""
        plan = self.plan
        return AnchorBuilder(plan.inputs.base, plan.units, self.config, plan.device, plan.seed)

    @property
    def count(self) -> int:
        """How many pieces there are."""
        return len(self.plan.constructions)

    def pieces(self) -> list[Piece]:
        """The work of constructing, unit by unit, the anchors of every source that has none."""
        base, found = self.plan.inputs.base, []
        for source in self.plan.anchors_made:
            for unit in filter(source.has, self.builder.grouped):
                cost = costs.construction(base, self.config, unit).weight
                found.append(self._construction(source).piece(unit, cost, self.run.progress))
        return found

    def frame(self) -> None:
        """Write what lies around the anchors that were constructed."""
        for source in self.plan.anchors_made:
            self._construction(source).frame(self.plan.units_of(source), Beside())

    def sources(self, unit: Unit) -> list[Source]:
        """The sources whose anchors of a unit are looked at."""
        return [source for source in self.plan.sources_of(unit) if self.plan.anchored(source)]

    def keys(self, unit: Unit) -> list[str]:
        """A hash of everything that determines a unit's anchors, for each of its sources."""
        return [self._key(source, unit) for source in self.sources(unit)]

    def of(self, unit: Unit) -> list[UnitAnchors]:
        """A unit's anchors for each of its sources; all pieces are done."""
        return [self._read(source, unit) for source in self.sources(unit)]

    def _construction(self, source: Source) -> Construction:
        """What makes one source's anchors in the output folder."""
        assert source.weights is not None
        prints = (self.run.fingerprints[""], self.run.fingerprints[source.name])
        return Construction(self.run.store, f"anchors/{source.name}/", self.builder, source.weights, prints)

    @cached_property
    def _given(self) -> dict[tuple[str, str], str]:
        """Hashes of the anchors that were given, by source and unit; each is read by one process only."""
        given = [
            (source.anchors, source.name, unit.name)
            for unit in self.plan.units
            for source in self.sources(unit)
            if source.anchors is not None
        ]
        hashes: Sequence[str] = self.run.team.map(lambda item: item[0].digest(item[2]), given)
        return {(source, unit): found for (_, source, unit), found in zip(given, hashes, strict=True)}

    def _key(self, source: Source, unit: Unit) -> str:
        if source.anchors is not None:
            return key_of("given", self._given[source.name, unit.name])
        return self._construction(source).key(unit)

    def _read(self, source: Source, unit: Unit) -> UnitAnchors:
        if source.anchors is not None:
            found = source.anchors[unit.name]
        else:
            found = read_unit(self.plan.output / "anchors" / source.name / unit_file(unit.name))
        self.run.vectors.note_move(source.name, lambda: found.moves)
        return found
