"""Sums whose terms several processes evaluate, the same to the bit in any number of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from hf_fda.mailbox import Mailbox
from hf_fda.processes import Team
from hf_fda.stages import assign

T = TypeVar("T")

LEAVES = 4
"""Leaves of the tree along which terms are added, and so the most processes that share one sum."""


def sharers(processes: int, items: int, device: torch.device) -> int:
    """How many of some processes share a sum over items: a power of two, and on GPUs one, as tensors would go through
    the host's memory.

    >>> [sharers(processes, 6, torch.device("cpu")) for processes in (1, 3, 5, 64)]
    [1, 2, 4, 4]
    """
    count = 1
    while device.type == "cpu" and 2 * count <= min(processes, LEAVES) and count < items:
        count *= 2
    return count


def leaves_of(costs: Sequence[float]) -> list[int]:
    """The leaf that each item belongs to, so that the two halves below every node of the tree cost about the same.

    >>> leaves_of([1, 1, 1, 3])
    [2, 3, 2, 0]

    Args:
        costs: of the items, in any unit.
    """
    leaves = [0] * len(costs)

    def deal(items: Sequence[int], first: int, size: int) -> None:
        if size == 1:
            for item in items:
                leaves[item] = first
            return
        half = size // 2
        sides = assign([costs[item] for item in items], 2)
        for side in (0, 1):
            deal([item for item, own in zip(items, sides, strict=True) if own == side], first + side * half, half)

    deal(range(len(costs)), 0, LEAVES)
    return leaves


def largest_share(costs: Sequence[float], processes: int, device: torch.device) -> float:
    """The largest part of all costs that one of some processes has.

    >>> largest_share([1, 1, 1, 3], 2, torch.device("cpu"))
    0.5
    """
    span = LEAVES // sharers(processes, sum(map(bool, costs)), device)
    load: dict[int, float] = {}
    for leaf, cost in zip(leaves_of(costs), costs, strict=True):
        load[leaf // span] = load.get(leaf // span, 0.0) + cost
    return max(load.values()) / sum(costs) if sum(costs) else 1.0


class SharedSum:
    """A sum over items that are dealt to the leaves of a binary tree (`leaves_of`), whose order of addition is the
    tree's.

    Each process evaluates the leaves below one node, adds along the tree, and swaps its sum with the process at the
    node beside it, and so on up to the root: all of them get the same sum. In which order the two add makes no
    difference to floating-point numbers.

    Args:
        costs: of the items, in any unit, the same in all processes.
        team: the processes. As many share as `sharers` says of those on the first one's machine: gradients go from one
            to the other in every step.
        device: where they evaluate.
    """

    def __init__(self, costs: Sequence[float], team: Team, device: torch.device) -> None:
        self.team, self.leaves = team, leaves_of(costs)
        self.hands = sharers(team.near, sum(map(bool, costs)), device)
        self.span = LEAVES // self.hands
        self.first = team.rank * self.span if self.hands > 1 else 0
        self._boxes: dict[tuple[int, int], Mailbox] = {}

    @classmethod
    def alone(cls, items: int = 1) -> SharedSum:
        """Of one process, where all items are one term."""
        found = cls([0.0] * items, Team(), torch.device("cpu"))
        found.leaves = [0] * items
        return found

    def mine(self, item: int) -> bool:
        """Whether this process evaluates an item."""
        return self.first <= self.leaves[item] < self.first + self.span

    def sum(
        self, terms: Mapping[int, T], evaluate: Callable[[T], Sequence[Tensor]], like: Sequence[Tensor]
    ) -> list[Tensor]:
        """The sum of what a function makes of the terms, in every process that shares it; the next call may change it.

        Args:
            terms: by leaf; those of other processes stand there too, but are not evaluated. One at least.
            evaluate: gives as many tensors for each term, on the CPU where several processes share.
            like: tensors of the shapes and types that it gives.

        Raises:
            PeerError: when another process ended or failed.
        """
        first, size = self.first, self.span
        found = self._below(first, size, terms, evaluate)
        while size < LEAVES:
            beside = first ^ size
            theirs = _any(terms, beside, size)
            if theirs or found is not None:
                box = self._box(like, size)
                own = box.room()
                torch.cat([one.flatten() for one in found or [torch.zeros_like(one) for one in like]], out=own)
                taken = box.swap()
                summed = own if not theirs else taken if found is None else box.add(taken)
                parts = summed.split([one.numel() for one in like])
                found = [part.view_as(one) for part, one in zip(parts, like, strict=True)]
            first, size = min(first, beside), 2 * size
        assert found is not None
        return list(found)

    def total(self, own: Tensor) -> Tensor:
        """The sum of one tensor of each process that shares, in any order: for whole numbers.

        Raises:
            PeerError: when another process ended or failed.
        """
        size = self.span
        while size < LEAVES:
            taken = torch.empty_like(own)
            self.team.swap(own, taken, self.team.rank ^ (size // self.span))
            own = own + taken
            size *= 2
        return own

    def _box(self, like: Sequence[Tensor], size: int) -> Mailbox:
        """What the entries of some tensors are swapped through between nodes of so many leaves; it is kept from sum to
        sum, as fresh memory costs more to touch."""
        place = sum(one.numel() for one in like), size
        if place not in self._boxes:
            other = self.team.rank ^ (size // self.span)
            self._boxes[place] = Mailbox(self.team, other, place[0], like[0].dtype)
        return self._boxes[place]

    def _below(
        self, first: int, size: int, terms: Mapping[int, T], evaluate: Callable[[T], Sequence[Tensor]]
    ) -> Sequence[Tensor] | None:
        """The sum over so many leaves, from one on; None where they have no terms."""
        if not _any(terms, first, size):
            return None
        if size == 1:
            return evaluate(terms[first])
        left = self._below(first, size // 2, terms, evaluate)
        right = self._below(first + size // 2, size // 2, terms, evaluate)
        if left is None or right is None:
            return left or right
        return torch._foreach_add(list(left), list(right))


def _any(terms: Mapping[int, T], first: int, size: int) -> bool:
    return any(first <= leaf < first + size for leaf in terms)
