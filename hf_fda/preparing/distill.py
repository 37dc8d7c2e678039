"""The merge by layer-wise distillation before its weights are written: hidden states, then unit after unit."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

from hf_fda.blocks import Unit
from hf_fda.distilling import distilled_unit
from hf_fda.merge_methods.distill import DistillConfig
from hf_fda.preparing.propagated import Propagated
from hf_fda.preparing.units import UnitPreparation
from hf_fda.running import Run
from hf_fda.stages import Piece
from hf_fda.states.pieces import Recordings
from hf_fda.store import key_of
from hf_fda.version import versions


class DistillPreparation(UnitPreparation):
    """Records the hidden states of every source on its rows, then merges the units in the order of the model, each on
    what the units before it make of the rows.

    Args:
        run: of a plan by "distill".
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        assert isinstance(self.plan.config, DistillConfig)
        self.config = self.plan.config

    @property
    def count(self) -> int:
        """As `Preparation.count`."""
        return self.recordings.count + 1 + len(self.units)

    def stages(self, wanted: Container[str]) -> Iterator[Sequence[Piece]]:
        """As `Preparation.stages`: states and what lies outside the units, then every unit up to the last one that is
        still to be written."""
        last = max((number for number, unit in enumerate(self.units, 1) if self.wanted(unit, wanted)), default=0)
        pieces = [self._distillation(unit) for unit in self.units[:last]]
        self.skip(len(self.units) - last)
        if all(self.run.finished(pieces)):
            self.skip(self.recordings.count + 1)
        else:
            yield [*self.recordings.pieces(), self.propagated.rest()]
        for piece in pieces:
            yield [piece]

    @cached_property
    def recordings(self) -> Recordings:
        """The hidden states of all sources."""
        return Recordings(self.run, {source.name: self.plan.units_of(source) for source in self.plan.inputs.sources})

    @cached_property
    def propagated(self) -> Propagated:
        """The hidden states of the merged model."""
        return Propagated(self.run, self.units, self.recordings, self.adapted)

    def unit_key(self, unit: Unit) -> str:
        """As `UnitPreparation.unit_key`."""
        before = [own.name for own in self.propagated.before(unit)]
        states = [self.recordings.key(source.name) for source in self.plan.inputs.weighted]
        facts = before, self.config.options(), states, self.propagated.key, self.run.fingerprints, self.plan.seed
        return key_of("distilled", unit.name, *facts, versions())

    def _distillation(self, unit: Unit) -> Piece:
        sources = [source.weights for source in self.plan.sources_of(unit) if source.weights is not None]
        shared, what = partial(self.propagated.adding, sources), f"distill {unit.name}"

        def make() -> Callable[[Path], str]:
            adding = shared()  # what it holds goes with it
            lessons = self.propagated.lessons(sources, unit, adding)
            return distilled_unit(
                self.plan,
                self.run.vectors,
                unit,
                lessons,
                adding,
                lambda epoch, loss: self.run.progress.now(what, loss),
            ).write

        cost = float(len(unit.tensors))
        return Piece(what, self.file(unit), self.unit_keys[unit.name], cost, make, hands=shared().hands)
