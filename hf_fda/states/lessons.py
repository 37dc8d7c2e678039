"""What a unit learns from one source on rows of its task."""

from __future__ import annotations

from dataclasses import dataclass

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.states.unit_states import UnitStates


@dataclass(frozen=True)
class Lesson:
    """The hidden states that a unit takes on a source's rows: in the source itself, and in the merged model, to which
    it shall give the same answers (None: to the source's own)."""

    source: AlignedSource
    own: UnitStates
    merged: UnitStates | None = None
