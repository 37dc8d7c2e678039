"""How large real hidden states will be, from what is known before any row is encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_fda.blocks import Unit, family_of
from hf_fda.costs import Shown, tokens_of, width
from hf_fda.data.opening import OpenedData
from hf_fda.inputs import Inputs
from hf_fda.merge_methods import FDAConfig
from hf_fda.merge_methods.unitwise import UnitwiseConfig
from hf_fda.states.recording import HELD_BYTES
from hf_fda.states.rows_together import PART_BYTES

TEXT_POSITIONS = 128
"""Positions that a text is taken to have, where it may have so many: rows are encoded only when the merge runs."""


@dataclass(frozen=True)
class StatesFootprint:
    """The hidden states of one unit on the rows of all tasks: how many vectors by task, and their width d."""

    vectors: Mapping[str, int]
    width: int
    positions: int

    @classmethod
    def of(cls, inputs: Inputs, config: UnitwiseConfig, rows: Mapping[str, OpenedData]) -> StatesFootprint:
        """Of a plan's rows.

        Args:
            inputs: base and sources.
            config: complete.
            rows: by task.
        """
        image = family_of(inputs.base.layout) == "vision"
        positions = tokens_of(inputs.base, FDAConfig()) if image else min(config.max_length, TEXT_POSITIONS)
        counts = {task: opened.count or config.rows or 0 for task, opened in rows.items()}
        return cls({task: count * positions for task, count in counts.items()}, width(inputs.base), positions)

    @property
    def shown(self) -> Shown:
        """The same as an amount of work."""
        vectors = sum(self.vectors.values())
        return Shown(vectors // self.positions, vectors)

    @property
    def recorded(self) -> int:
        """Bytes of one unit's hidden states of all tasks on the disk, in half precision."""
        return 2 * self.width * sum(self.vectors.values())

    def on_disk(self, inputs: Inputs, units: Sequence[Unit]) -> int:
        """Bytes of all units' hidden states."""
        sources = [source for source in inputs.sources if source.name in self.vectors]
        held = sum(self.vectors[source.name] for source in sources for unit in units if source.has(unit))
        return 2 * self.width * held

    def recording(self, units: Sequence[Unit]) -> int:
        """Bytes held while some rows run through a model: the hidden states of all units on these."""
        return min(PART_BYTES, 2 * self.width * max(self.vectors.values(), default=0) * len(units))

    def learning(self, copies: int) -> int:
        """Bytes held while a unit learns: so many copies of inputs in half precision, targets and the base's outputs in
        single precision, and a metric for each source."""
        metrics = 4 * len(self.vectors) * self.width**2
        return copies * self.recorded + 2 * 2 * self.recorded + metrics

    @property
    def held(self) -> int:
        """Bytes of the merged model's hidden states that are held from one unit to the next, in single precision."""
        return min(HELD_BYTES, 2 * self.recorded)
