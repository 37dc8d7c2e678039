"""What a source's units see on real rows, for an analysis: a few rows, in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fda.blocks import Unit
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.data.rows import TaskRows
from hf_fda.states import UnitStates
from hf_fda.states.pieces import path_in
from hf_fda.states.recording import StatesRecorder
from hf_fda.states.rows_together import parts_of_rows


def real_states(
    source: AlignedSource, units: Sequence[Unit], rows: TaskRows, width: int, device: torch.device
) -> dict[str, UnitStates]:
    """What the units of a source are called with on all rows, by the base's names; on the CPU, in half precision.

    Args:
        source: whose.
        units: of the base.
        rows: of the source's task.
        width: d, of the hidden states.
        device: where to run, with one block's weights at a time.

    Raises:
        RunError: naming the unit, when it does not run once on every row.
    """
    recorder = StatesRecorder(source.checkpoint, {unit.name: path_in(source, unit) for unit in units}, device)
    parts: dict[str, list[UnitStates]] = {unit.name: [] for unit in units}
    for numbers in parts_of_rows(rows, len(units), width):
        for name, states in recorder.record(rows, numbers).items():
            parts[name].append(states.to(torch.device("cpu")))
    return {name: UnitStates.together(own) for name, own in parts.items()}


def vectors_of(states: UnitStates) -> Tensor:
    """The hidden states at real positions, (N, d) in single precision."""
    return states.inputs.values[:-1].float()
