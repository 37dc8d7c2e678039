"""The merge by layer-wise distillation before its weights are written: hidden states, then unit after unit."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from hf_fda.assembly import rule_of
from hf_fda.blocks import Unit, regions
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.header import read_header, read_tensor
from hf_fda.checkpoint.writer import save_tensors
from hf_fda.distilling import Lesson, MergedWeights, distilled_unit
from hf_fda.merge_methods.distill import DistillConfig
from hf_fda.preparing.units import UnitPreparation
from hf_fda.running import Run
from hf_fda.stages import Piece
from hf_fda.states.pieces import Recordings, path_in
from hf_fda.states.recording import StatesRecorder
from hf_fda.states.unit_states import UnitStates
from hf_fda.store import key_of
from hf_fda.unit_files import BLOCKS
from hf_fda.version import versions

REST = f"{BLOCKS}/rest.safetensors"
"""Where the merged tensors lie that are in no unit, and that the hidden states of the merged model depend on."""


class DistillPreparation(UnitPreparation):
    """Records the hidden states of every source on its rows, then merges the units in the order of the model, each on
    what the units before it make of the rows.

    The merged model's hidden states are not kept: for each unit they are computed from the rows again. That costs as
    many passes over a block as there are blocks after it, which is little against the passes of training.

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
            yield [*self.recordings.pieces(), self._rest()]
        for piece in pieces:
            yield [piece]

    @cached_property
    def recordings(self) -> Recordings:
        """The hidden states of all sources."""
        return Recordings(self.run, {source.name: self.plan.units_of(source) for source in self.plan.inputs.sources})

    def unit_key(self, unit: Unit) -> str:
        """As `UnitPreparation.unit_key`."""
        before = [own.name for own in self.units[: self.units.index(unit)]]
        states = [self.recordings.key(source.name) for source in self.plan.inputs.weighted]
        facts = before, self.config.options(), states, self._rest_key, self.run.fingerprints, self.plan.seed
        return key_of("distilled", unit.name, *facts, versions())

    # -- what lies outside the units -------------------------------------------------------------------------------

    @cached_property
    def _outside(self) -> dict[str, str]:
        """Merged tensors before and inside the blocks that are in no unit: the output's names by the base's."""
        where, result = regions(self.base.layout), self.plan.result
        return {
            own: name
            for name, own in result.base_names.items()
            if name in result.recipes and result.recipes[name].rule == "method" and where[own] != "after"
        }

    @cached_property
    def _rest_key(self) -> str:
        recipes = self.plan.result.recipes
        rules = {own: rule_of(recipes[name], self.plan.seed) for own, name in self._outside.items()}
        return key_of("rest", rules, self.run.fingerprints, versions())

    def _rest(self) -> Piece:
        def write(path: Path) -> str:
            return save_tensors(path, {own: self._by_method(own) for own in self._outside})

        return Piece("merge what lies outside the blocks", REST, self._rest_key, 1.0, lambda: write)

    def _by_method(self, own: str) -> Tensor:
        config = self.plan.result.recipes[self._outside[own]].config
        assert config is not None
        return self.base.read(own).float() + self.run.vectors.merged_task(own, config)

    # -- units -----------------------------------------------------------------------------------------------------

    def _distillation(self, unit: Unit) -> Piece:
        def make() -> Callable[[Path], str]:
            sources = [source.weights for source in self.plan.sources_of(unit)]
            lessons = [self._lesson(source, unit) for source in sources if source is not None]
            what = f"distill {unit.name}"
            return distilled_unit(
                self.plan, self.run.vectors, unit, lessons, lambda epoch, loss: self.run.progress.now(what, loss)
            ).write

        cost = float(len(unit.tensors))
        return Piece(f"distill {unit.name}", self.file(unit), self.unit_keys[unit.name], cost, make)

    def _lesson(self, source: AlignedSource, unit: Unit) -> Lesson:
        done = self.units[: self.units.index(unit)]
        model = MergedWeights(source, lambda name: self._merged(name, done))
        recorder = StatesRecorder(model, {unit.name: path_in(source, unit)}, self.plan.device)
        rows = self.run.rows(source.name)
        parts = [recorder.record(rows, numbers)[unit.name] for numbers in self.recordings.parts[source.name]]
        return Lesson(source, self.recordings.of(source.name, unit), UnitStates.together(parts))

    def _merged(self, name: str, done: Sequence[Unit]) -> Tensor:
        """A merged tensor by the base's name; of units that are not there yet the base's, which nothing runs with."""
        if name in self._outside:
            path = self.plan.output / REST
            return read_tensor(path, read_header(path)[name])
        if self.unit_of.get(name) in done:
            found = self.adapted(name)
            assert isinstance(found, Tensor)
            return found
        return self.base.read(name)
