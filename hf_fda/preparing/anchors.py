"""The merge by functional dual anchors before its weights are written: anchors, and hidden states where there are rows
of data, then units adapted to them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from hf_fda import costs
from hf_fda.adapting import adapted_unit
from hf_fda.anchors.pieces import Anchors
from hf_fda.blocks import Unit
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.merge_methods import FDAConfig
from hf_fda.preparing.propagated import Propagated
from hf_fda.preparing.units import UnitPreparation
from hf_fda.randomness import random_stream
from hf_fda.running import Run
from hf_fda.shared_sum import SharedSum
from hf_fda.stages import Piece
from hf_fda.states.lessons import Lesson
from hf_fda.states.pieces import Recordings, path_in
from hf_fda.statistics.sensitivity import Sensitivity, sensitivity
from hf_fda.store import key_of
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
        return self.anchors.count + self.recordings.count + self.plan.propagates + len(self.units)

    def stages(self, wanted: Container[str]) -> Iterator[Sequence[Piece]]:
        """As `Preparation.stages`: anchors and states of all units, then the units that are still to be written."""
        needed = [unit for unit in self.units if self.wanted(unit, wanted)]
        if self.plan.propagates and needed:
            needed = [*self.propagated.before(needed[-1]), needed[-1]]
        adaptations = [self._adaptation(unit) for unit in needed]
        shown = [*self.recordings.pieces(), *([self.propagated.rest()] if self.plan.propagates else [])]
        done = all(self.run.finished(adaptations))
        yield self.anchors.pieces() + ([] if done else shown)
        if self.run.team.main:
            self.anchors.frame()
        self.skip(len(self.units) - len(needed) + (len(shown) if done else 0))
        yield from [[piece] for piece in adaptations] if self.plan.propagates else [adaptations]

    @cached_property
    def anchors(self) -> Anchors:
        """The anchors of the sources that need some."""
        return Anchors(self.run, self.config)

    @cached_property
    def recordings(self) -> Recordings:
        """The hidden states of the sources that have rows."""
        return Recordings(self.run, {source.name: self.plan.units_of(source) for source in self.plan.inputs.sources})

    @cached_property
    def propagated(self) -> Propagated:
        """The hidden states of the merged model, where units are adapted one after the other."""
        return Propagated(self.run, self.units, self.recordings, self.adapted)

    def _shown(self, unit: Unit) -> list[AlignedSource]:
        """The sources whose hidden states of a unit are matched."""
        sources = [source.weights for source in self.plan.sources_of(unit) if source.name in self.plan.data]
        return [source for source in sources if source is not None]

    def _adaptation(self, unit: Unit) -> Piece:
        """The work of adapting one unit to the anchors of all sources."""
        count, shown = len(self.plan.sources_of(unit)), self._shown(unit)
        positions = costs.anchor_positions(self.base, self.config, count)
        shared = partial(self.propagated.adding, shown, positions) if self.plan.propagates else None

        def make() -> Callable[[Path], str]:
            found, builder = self.anchors.of(unit), self.anchors.builder
            adding = None if shared is None else shared()  # what it holds goes with it
            lessons = self._lessons(shown, unit, adding)
            return adapted_unit(
                self.plan, builder, self.run.vectors, unit, found, self.run.progress, lessons, adding
            ).write

        cost = costs.adaptation(self.base, self.config, unit, count, self.plan.ranks).weight
        hands = 1 if shared is None else shared().hands
        return Piece(f"adapt {unit.name}", self.file(unit), self.unit_keys[unit.name], cost, make, hands=hands)

    def _lessons(
        self, sources: Sequence[AlignedSource], unit: Unit, adding: SharedSum | None
    ) -> Sequence[Lesson | None]:
        """What a unit learns from sources with rows."""
        if adding is None:
            return [Lesson(source, self.recordings.of(source.name, unit)) for source in sources]
        lessons = self.propagated.lessons(sources, unit, adding)
        if unit.block != self.units[-1].block:
            return lessons
        return [own and replace(own, read=self._read(own.source, unit)) for own in lessons]

    def _read(self, source: AlignedSource, unit: Unit) -> Sensitivity | None:
        """What of a unit's outputs a source's answers depend on: of all of it before the last block."""
        stream = random_stream(self.plan.seed, "answers", source.name)
        return sensitivity(source, path_in(source, unit), self.run.rows(source.name), self.plan.device, stream)

    def unit_key(self, unit: Unit) -> str:
        """As `UnitPreparation.unit_key`."""
        units = [*self.propagated.before(unit), unit] if self.plan.propagates else [unit]
        anchors = [key for own in units for key in (own.name, *self.anchors.keys(own))]
        anchors += [self.recordings.key(source.name) for source in self._shown(unit)]
        anchors += [self.propagated.key] if self.plan.propagates else []
        ranks = {name: self.plan.ranks[name] for own in units for name in own.tensors if name in self.plan.ranks}
        facts = self.config.options(), ranks, anchors, self.run.fingerprints, self.plan.seed, versions()
        return key_of("unit", unit.name, *facts)
