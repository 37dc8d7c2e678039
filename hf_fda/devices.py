"""Where to compute."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from accelerate import PartialState

from hf_fda.errors import InputError


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that a name stands for; "auto" is Accelerate's choice for this process.

    Raises:
        InputError: when torch does not know the name or has no such device here.
    """
    if device == "auto":
        # Without cpu=True a process launched on a machine without GPUs believes that it is alone.
        return PartialState(cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available())).device
    try:
        chosen = torch.device(device)
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
