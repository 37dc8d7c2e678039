"""Which errors of a block's output count: those along the directions in which the source moved away from the base."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 0.01
"""What an error counts in a direction in which the source did not move, against the one in which it moved most."""


def shift_metric(shift: Tensor, power: float, floor: float = FLOOR) -> Tensor:
    """The metric of one source's output errors, as a factor: an error e counts ``|e @ factor|^2``.

    With ``C = V diag(c) V^T`` the second moment of the shift, the metric is ``V diag((c / max c)^power + floor) V^T``,
    scaled so that leaving the block as the base has it costs 1 for every source, however far it moved. What the other
    sources add in directions that this one does not use costs little, and what it uses must not be averaged away.

    Args:
        shift: ``phi_i(X) - phi_0(X)``, (..., d): the source's outputs on its anchors minus the base's.
        power: 0 counts all directions alike; the larger, the more the main ones count.
        floor: added for every direction.

    Returns:
        (d, d), of the shift's type; zeros where there is no shift.
    """
    flat = shift.reshape(-1, shift.shape[-1])
    work = torch.float32 if flat.device.type == "mps" else torch.float64
    values, vectors = torch.linalg.eigh((flat.mT @ flat).to(work) / len(flat))
    values = values.clamp_min(0)
    if not bool(values[-1] > 0):
        return torch.zeros_like(vectors, dtype=shift.dtype)
    weights = (values / values[-1]) ** power + floor
    return (vectors * (weights / (weights @ values)).sqrt()).to(shift.dtype)
