"""Where to compute."""

from __future__ import annotations

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
