"""Rows of real data, for the methods that look at them."""

from hf_fda.data.opening import OpenedData, open_data
from hf_fda.data.request import Reading, said_on_command_line
from hf_fda.data.rows import Batch, Kind, TaskRows
from hf_fda.data.writing import with_written_targets

__all__ = [
    "Batch",
    "Kind",
    "OpenedData",
    "Reading",
    "TaskRows",
    "open_data",
    "said_on_command_line",
    "with_written_targets",
]
