"""Real hidden states: what the units of a model are called with on the rows of its task."""

from hf_fda.states.recording import StatesRecorder
from hf_fda.states.unit_states import UnitStates

__all__ = ["StatesRecorder", "UnitStates"]
