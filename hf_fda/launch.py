"""Whether this process was launched as one of several (`torchrun`, `accelerate launch`).

It costs no import, so that the command can ask before it knows what it will need.
"""

from __future__ import annotations

import os
import sys
from typing import Any

WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Environment variables by which launchers tell how many processes there are and which one this is."""


def several() -> bool:
    """Whether this process is one of several."""
    group = _process_group()
    return (group.get_world_size() if group else _number(WORLD_SIZES, 1)) > 1


def is_main() -> bool:
    """Whether this process is the one that speaks: alone, or the first."""
    group = _process_group()
    return (group.get_rank() if group else _number(RANKS, 0)) == 0 or not several()


def _process_group() -> Any:
    """`torch.distributed` where it is in use already, else None."""
    distributed: Any = sys.modules.get("torch.distributed")
    return (
        distributed if distributed is not None and distributed.is_available() and distributed.is_initialized() else None
    )


def _number(names: tuple[str, ...], otherwise: int) -> int:
    for name in names:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return otherwise
