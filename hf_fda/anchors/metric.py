"""Which errors of a block's output count: those along the directions in which the source moved away from the base."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 0.01
"""What an error counts in a direction in which the source did not move, against the one in which it moved most."""

READ = 0.9
"""The part of a metric that counts errors by what they change of a source's answers."""


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


def read_metric(factor: Tensor, shift: Tensor, fisher: Tensor, part: float = READ) -> Tensor:
    """A metric of errors of which a part counts them by what they change of the source's answers.

    Args:
        factor: of the metric by the shift, (d, d), as `shift_metric` gives it.
        shift: as there.
        fisher: (d, d), the Fisher information of the answers about the block's outputs.
        part: of what leaving the block as the base has it costs, which is 1 again.

    Returns:
        (d, d), as `shift_metric`; the given one where the shift changes no answer.
    """
    flat = shift.reshape(-1, shift.shape[-1])
    cost = ((flat @ fisher) * flat).sum() / len(flat)
    if not bool(cost > 0):
        return factor
    work = torch.float32 if flat.device.type == "mps" else torch.float64
    metric = (1 - part) * (factor @ factor.mT).to(work) + part * (fisher / cost).to(work)
    values, vectors = torch.linalg.eigh(metric)
    return (vectors * values.clamp_min(0).sqrt()).to(factor.dtype)
