"""The recorded hidden states of a run: a piece of work for each part of a source's rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from hf_fda import costs
from hf_fda.blocks import Unit
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.running import Run
from hf_fda.stages import Piece
from hf_fda.states.files import read_states, save_states
from hf_fda.states.recording import StatesRecorder
from hf_fda.states.rows_together import parts_of_rows, positions
from hf_fda.states.unit_states import UnitStates
from hf_fda.store import WORK, key_of
from hf_fda.version import versions

STATES = f"{WORK}/states"
"""Where recorded hidden states lie until the merge is finished, in half precision."""


class Recordings:
    """The hidden states of all sources that have rows of data.

    Args:
        run: the run they are part of.
        units: of each source which are recorded, by its name.
    """

    def __init__(self, run: Run, units: Mapping[str, Sequence[Unit]]) -> None:
        self.run = run
        self.sources = {own.name: own for own in run.plan.inputs.weighted if own.name in run.plan.data}
        self.units = {name: units[name] for name in self.sources}
        width = costs.width(run.plan.inputs.base)
        self.parts = {name: parts_of_rows(run.rows(name), len(self.units[name]), width) for name in self.sources}
        self.positions = {name: sum(positions(row, width) for row in run.rows(name).inputs) for name in self.sources}
        """How many positions all rows of a source have, by its name."""

    @property
    def count(self) -> int:
        """How many pieces there are."""
        return sum(map(len, self.parts.values()))

    def pieces(self) -> list[Piece]:
        """The work of recording, source by source."""
        return [piece for source in self.sources.values() for piece in self._pieces(source)]

    def key(self, source: str) -> str:
        """A hash of everything that determines what is recorded of a source."""
        names = [unit.name for unit in self.units[source]]
        prints = self.run.fingerprints[source], self.run.data_prints[source]
        return key_of("states", names, self.parts[source], prints, versions())

    def of(self, source: str, unit: Unit) -> UnitStates:
        """What was recorded of one unit, on the CPU."""
        files = [self.run.plan.output / self._file(source, part) for part in range(len(self.parts[source]))]
        return read_states(files, unit.name)

    def _file(self, source: str, part: int) -> str:
        return f"{STATES}/{source}/{part:05d}.safetensors"

    def _pieces(self, source: AlignedSource) -> list[Piece]:
        name, plan = source.name, self.run.plan
        cost = costs.recording(plan.inputs.base, self.units[name]).weight
        label = f"hidden states of {name}"
        found = []
        for part, numbers in enumerate(self.parts[name]):
            key, make = key_of(self.key(name), part), partial(self._make, source, numbers)
            found.append(Piece(label, self._file(name, part), key, cost * len(numbers), make))
        return found

    def _make(self, source: AlignedSource, numbers: Sequence[int]) -> Callable[[Path], str]:
        paths = {unit.name: path_in(source, unit) for unit in self.units[source.name]}
        recorder = StatesRecorder(source.checkpoint, paths, self.run.plan.device)
        found = recorder.record(self.run.rows(source.name), numbers)
        return lambda path: save_states(path, found)


def path_in(source: AlignedSource, unit: Unit) -> str:
    """Where a unit of the base lies in a source's own model."""
    base_name = unit.tensors[0]
    return source.tensor_of[base_name].removesuffix(base_name.removeprefix(unit.name))
