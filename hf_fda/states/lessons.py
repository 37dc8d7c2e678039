"""What a unit learns from one source on rows of its task."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.states.unit_states import UnitStates
from hf_fda.statistics.sensitivity import Sensitivity


@dataclass(frozen=True)
class Lesson:
    """The hidden states that a unit takes on a source's rows: in the source itself, and in the merged model, to which
    it shall give the same answers (None: to the source's own). `read` says what of the unit's outputs the source's
    answers depend on; None where all of it counts."""

    source: AlignedSource
    own: UnitStates
    merged: UnitStates | None = None
    read: Sensitivity | None = None

    def to(self, device: torch.device) -> Lesson:
        """The same with its hidden states on a device."""
        merged = None if self.merged is None else self.merged.to(device)
        return dataclasses.replace(self, own=self.own.to(device), merged=merged)
