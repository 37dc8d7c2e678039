"""The largest entries by magnitude, found exactly from counts of their bits.

Floats that are not negative are ordered as their bits are. So the k-th largest magnitude is found digit by digit:
counts of the upper half of the bits say in which bin it lies, counts of the lower half in that bin which it is. Counts
of the parts of a tensor, or of the tensors of a model, add up; nothing is sorted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

HALF = 16
"""Bits of the lower digit; the upper one has 15, as there is no sign."""

COARSE_BINS, FINE_BINS = 2**15, 2**HALF

FINITE = 0x7F80
"""The first bin of infinities and NaN."""


@dataclass(frozen=True)
class Cut:
    """Which entries stay: those whose magnitude has more than `bits`, and the first `ties` of those with just these
    (None: all of them). Of two cuts of one tensor the counts before and after add up."""

    bits: int
    ties: int | None = None


def coarse_counts(tensor: Tensor) -> Tensor:
    """How many entries of a float32 tensor lie in each bin of magnitudes, each 2^-7 of its value wide.

    Returns:
        (2^15,) whole numbers, from zero upwards; the last 128 bins are those of infinities and NaN.
    """
    return torch.bincount(_bits(tensor).bitwise_right_shift_(HALF), minlength=COARSE_BINS)


def digits_inside(tensor: Tensor, coarse: int) -> Tensor:
    """The lower halves of the bits of the entries inside one coarse bin.

    Args:
        tensor: float32.
        coarse: the bin.

    Returns:
        (entries in the bin,) whole numbers below 2^16.
    """
    bits = _bits(tensor)
    return bits[equal(bits >> HALF, coarse)] & (FINE_BINS - 1)


def fine_counts(digits: Tensor, coarse: int) -> Tensor:
    """How many entries of one coarse bin have each magnitude. Zeros are not counted: whether they stay makes no
    difference.

    Args:
        digits: from `digits_inside`.
        coarse: the bin.

    Returns:
        (2^16,) whole numbers.
    """
    counts = torch.bincount(digits, minlength=FINE_BINS)
    if coarse == 0:
        counts[0] = 0
    return counts


def place(counts: Tensor, kept: int) -> tuple[int, int]:
    """The bin in which the `kept`-th largest entry lies.

    >>> place(torch.tensor([5, 1, 3]), 4)
    (1, 1)

    Args:
        counts: of entries by bin.
        kept: from 1; more than there are stands for all.

    Returns:
        the bin, and how many of its entries are among the `kept` largest.
    """
    above = counts.flip(0).cumsum(0).flip(0)  # entries in this bin or a higher one
    found = max(int((above >= kept).sum()) - 1, 0)
    return found, kept - int(above[found] - counts[found])


def cut_at(coarse: int, fine: Tensor, kept: int) -> Cut:
    """The cut that keeps so many of the entries in one coarse bin, and everything above it.

    Args:
        coarse: the bin.
        fine: counts of the entries in it.
        kept: how many of them stay.
    """
    if coarse == 0 and kept > int(fine.sum()):
        return Cut(0)  # all but zeros
    digit, ties = place(fine, kept)
    return Cut((coarse << HALF) | digit, None if ties == int(fine[digit]) else ties)


def cut_for(tensor: Tensor, kept: int) -> Cut:
    """The cut that keeps the `kept` largest entries of a float32 tensor; at least one, and not more than it has."""
    coarse, ties = place(coarse_counts(tensor), kept)
    return cut_at(coarse, fine_counts(digits_inside(tensor, coarse), coarse), ties)


def tied(tensor: Tensor, cut: Cut) -> int:
    """How many entries have just the magnitude of the cut."""
    return len(equal(_bits(tensor), cut.bits))


def shares(cut: Cut, tied_in: Iterable[int]) -> list[Cut]:
    """A cut dealt out to the parts of a tensor: of entries that tie, the first ones stay.

    >>> [part.ties for part in shares(Cut(7, ties=3), [2, 2, 2])]
    [2, 1, 0]

    Args:
        cut: of the whole.
        tied_in: for each part how many of its entries tie.
    """
    left, parts = cut.ties or 0, []
    for count in tied_in:
        own = min(left, count)
        parts.append(Cut(cut.bits, own))
        left -= own
    return parts


def keep(tensor: Tensor, cut: Cut) -> Tensor:
    """A float32 tensor of which the entries above the cut stay, and all others are zero.

    Args:
        tensor: any shape.
        cut: which entries stay.
    """
    if cut.bits == 0:
        return tensor
    kept = hardshrink(tensor, _value(cut.bits - 1))
    if cut.ties is not None:
        kept.view(-1)[equal(_bits(tensor), cut.bits)[cut.ties :]] = 0
    return kept


def equal(tensor: Tensor, value: int) -> Tensor:
    """The positions of the few entries of a flat tensor of whole numbers that have a value, rising."""
    if tensor.device.type == "cpu":  # ten times as fast as torch where few are found
        return torch.from_numpy(np.flatnonzero(tensor.numpy() == value))
    return (tensor == value).nonzero().view(-1)


def _bits(tensor: Tensor) -> Tensor:
    """The bits of the magnitudes, flat, as whole numbers."""
    return tensor.abs().view(-1).view(torch.int32)


def _value(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
