"""Whether this process was launched as one of several (`torchrun`, `accelerate launch`), from the environment.

It costs no import, so that the command can ask before it knows what it will need.
"""

from __future__ import annotations

import os

WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Environment variables by which launchers tell how many processes there are and which one this is."""


def several() -> bool:
    """Whether this process is one of several."""
    return _number(WORLD_SIZES, 1) > 1


def is_main() -> bool:
    """Whether this process is the one that speaks: alone, or the first."""
    return not several() or _number(RANKS, 0) == 0


def _number(names: tuple[str, ...], otherwise: int) -> int:
    for name in names:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return otherwise
