"""The hidden states that units of the merged model take, where units are merged one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from hf_fda.assembly import rule_of
from hf_fda.blocks import Unit, regions
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.header import read_header, read_tensor
from hf_fda.checkpoint.layout import ModelLayout
from hf_fda.checkpoint.writer import save_tensors
from hf_fda.lowrank import LowRank
from hf_fda.running import Run
from hf_fda.shared_sum import SharedSum
from hf_fda.stages import Piece
from hf_fda.states.lessons import Lesson
from hf_fda.states.pieces import Recordings, path_in
from hf_fda.states.recording import HELD_BYTES, Followed, StatesRecorder
from hf_fda.states.unit_states import UnitStates
from hf_fda.store import key_of
from hf_fda.unit_files import BLOCKS
from hf_fda.version import versions

REST = f"{BLOCKS}/rest.safetensors"
"""Where the merged tensors lie that are in no unit, and that the hidden states of the merged model depend on."""


@dataclass(frozen=True)
class MergedWeights:
    """The merged model as far as it is made, in the form of one source's: of what is the source's own, that.

    Args:
        source: whose form, and whose head.
        merged: gives a merged tensor by the base's name.
    """

    source: AlignedSource
    merged: Callable[[str], Tensor]

    @property
    def layout(self) -> ModelLayout:
        """The source's."""
        return self.source.checkpoint.layout

    @property
    def names(self) -> Sequence[str]:
        """The source's."""
        return self.source.checkpoint.names

    def read(self, name: str) -> Tensor:
        """One tensor by the source's name."""
        own = {theirs: base_name for base_name, theirs in self.source.tensor_of.items()}.get(name)
        return self.source.checkpoint.read(name) if own is None else self.merged(own)


@dataclass(frozen=True)
class Reached:
    """How far a source's rows have come through the merged model: the unit they are in front of, and their hidden
    states (b, T, d) there, on the CPU, for each part of the rows."""

    unit: Unit
    hidden: list[Tensor]


class Propagated:
    """Hidden states of the merged model. In front of each block they are held until the next one is there, which the
    rows then enter where they were. Without them, after an interruption, or where a model hands on more than its hidden
    states or they are too large, rows run through all blocks before.

    Args:
        run: of a plan whose units are merged in the order of the model.
        units: these, in their order.
        recordings: the sources' own hidden states, with the rows in their parts.
        adapted: gives a tensor of a finished unit by the base's name.
    """

    def __init__(
        self, run: Run, units: Sequence[Unit], recordings: Recordings, adapted: Callable[[str], Tensor | LowRank]
    ) -> None:
        self.run, self.units, self.recordings, self.adapted = run, list(units), recordings, adapted
        self.plan, self.base = run.plan, run.plan.inputs.base
        self.unit_of = {name: unit for unit in units for name in unit.tensors}
        self.reached: dict[str, Reached] = {}
        self.winding: set[str] = set()

    def before(self, unit: Unit) -> list[Unit]:
        """The units that are merged before one."""
        return self.units[: self.units.index(unit)]

    def adding(self, sources: Sequence[AlignedSource], anchors: int = 0) -> SharedSum:
        """Which process matches what of one unit, and how gradients are added.

        Its items are the rows of each source, which stay in one process from unit to unit, and the anchors beside them.

        Args:
            sources: with rows.
            anchors: positions of all anchors.
        """
        sizes = [self.recordings.positions[source.name] for source in sources]
        return SharedSum([*sizes, anchors], self.run.team, self.plan.device)

    def lessons(self, sources: Sequence[AlignedSource], unit: Unit, adding: SharedSum) -> list[Lesson | None]:
        """What a unit learns from sources with rows; None where another process matches it.

        Args:
            sources: with rows.
            unit: which; the units before it are done.
            adding: as of `adding` with the same sources.
        """
        return [self.lesson(source, unit) if adding.mine(item) else None for item, source in enumerate(sources)]

    def lesson(self, source: AlignedSource, unit: Unit) -> Lesson:
        """What a unit learns from a source with rows; the units before it are done."""
        own, reached = self.recordings.of(source.name, unit), self.reached.pop(source.name, None)
        merged = None
        if reached is not None and [reached.unit] == self.before(unit)[-1:]:
            found = self._run(source, unit, reached)
            merged = UnitStates.together([part.states for part in found])
            if not all(part.straight for part in found) or not merged.call.like(own.call):
                self.winding.add(source.name)
                merged = None
        if merged is None:
            found = self._run(source, unit, None)
            merged = UnitStates.together([part.states for part in found])
        if not all(part.straight for part in found):  # a block left out would have to give more than it is given
            self.winding.add(source.name)
        hidden = [part.hidden for part in found if part.hidden is not None]
        if len(hidden) == len(found) and source.name not in self.winding:
            self.reached[source.name] = Reached(unit, hidden)
        return Lesson(source, own, merged)

    def _run(self, source: AlignedSource, unit: Unit, reached: Reached | None) -> list[Followed]:
        """A source's rows in front of a unit, part by part: from where they are, or from the beginning."""
        done = self.before(unit)
        model = MergedWeights(source, lambda name: self._merged(name, done))
        entry = None if reached is None else path_in(source, reached.unit)
        recorder = StatesRecorder(model, {unit.name: path_in(source, unit)}, self.plan.device, entry)
        rows, parts = self.run.rows(source.name), self.recordings.parts[source.name]
        starts = [None] * len(parts) if reached is None else reached.hidden
        room, found = self._room(source, unit), []
        for numbers, start in zip(parts, starts, strict=True):
            part = recorder.follow(rows, numbers, start)
            assert part.hidden is not None
            room -= part.hidden.nbytes
            found.append(part if room >= 0 else replace(part, hidden=None))
        return found

    def _room(self, source: AlignedSource, unit: Unit) -> int:
        """Bytes of hidden states in front of a unit that may be held for the next one."""
        last = unit == self.units[-1] or source.name in self.winding
        if last or self.base.config.is_encoder_decoder or any(own.name != own.block for own in self.units):
            return 0
        return HELD_BYTES - sum(own.nbytes for reached in self.reached.values() for own in reached.hidden)

    @cached_property
    def key(self) -> str:
        """A hash of everything that determines what lies outside the units."""
        recipes = self.plan.result.recipes
        rules = {own: rule_of(recipes[name], self.plan.seed) for own, name in self._outside.items()}
        return key_of("rest", rules, self.run.fingerprints, versions())

    def rest(self) -> Piece:
        """The work of merging what lies outside the units."""

        def write(path: Path) -> str:
            return save_tensors(path, {own: self._by_method(own) for own in self._outside})

        return Piece("merge what lies outside the blocks", REST, self.key, 1.0, lambda: write)

    @cached_property
    def _outside(self) -> dict[str, str]:
        """Merged tensors before and inside the blocks that are in no unit: the output's names by the base's."""
        where, result = regions(self.base.layout), self.plan.result
        return {
            own: name
            for name, own in result.base_names.items()
            if name in result.recipes and result.recipes[name].rule == "method" and where[own] != "after"
        }

    def _by_method(self, own: str) -> Tensor:
        config = self.plan.result.recipes[self._outside[own]].config
        assert config is not None
        return self.base.read(own).float() + self.run.vectors.merged_task(own, config)

    def _merged(self, name: str, done: Sequence[Unit]) -> Tensor:
        """A merged tensor by the base's name; of units that are not there yet the base's, which nothing runs with."""
        if name in self._outside:
            path = self.plan.output / REST
            return read_tensor(path, read_header(path)[name])
        if self.unit_of.get(name) in done:
            found = self.adapted(name)
            return found if isinstance(found, Tensor) else self.base.read(name) + found.dense()
        return self.base.read(name)
