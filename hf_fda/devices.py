"""Where to compute."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch

from hf_fda.errors import InputError
from hf_fda.launch import several
from hf_fda.processes import partial_state


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that a name stands for; "auto" is Accelerate's choice for this process.

    Of several processes each has a device of its own: "cuda" without a number is this process's.

    Raises:
        InputError: when torch does not know the name or has no such device here.
    """
    if device == "auto":
        return partial_state().device
    try:
        chosen = torch.device(device)
        if several() and chosen.index is None and chosen.type != "cpu":
            own = partial_state(chosen).device
            chosen = own if own.type == chosen.type else chosen
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device '{device}' cannot be used here ({reason}); pass 'auto' or 'cpu'") from None
    return chosen


@cache
def _trim() -> Callable[[int], int] | None:
    """The C library's `malloc_trim`, where there is one (glibc)."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def release_memory() -> None:
    """Give freed memory back to the system between two units of work.

    Without it the allocator keeps pieces of every size it was ever asked for, and what a run holds grows with the
    number of blocks although each block's own memory is freed.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
