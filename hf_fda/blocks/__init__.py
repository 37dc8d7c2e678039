"""Blocks of a model: finding them, making one on a device, capturing how to call it."""

from hf_fda.blocks.capture import Capture, UnitCall, capture_calls
from hf_fda.blocks.discovery import (
    Region,
    Unit,
    family_of,
    find_blocks,
    find_units,
    make_unit,
    regions,
    require_blocks,
    token_table,
)

__all__ = [
    "Capture",
    "Region",
    "Unit",
    "UnitCall",
    "capture_calls",
    "family_of",
    "find_blocks",
    "find_units",
    "make_unit",
    "regions",
    "require_blocks",
    "token_table",
]
