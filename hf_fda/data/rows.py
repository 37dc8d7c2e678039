"""The rows of one task as its model takes them, and how they become batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["labels", "flags", "values", "tokens", "states"]
"""What a model's logits mean: a distribution over the labels of a row, one yes or no for each label, plain values
(a regression), or a distribution at each position (over tokens, or the labels of tokens); "states" has none."""


@dataclass(frozen=True)
class Batch:
    """Some rows together: `inputs` as the model's forward takes them, and for logits by position which of them count.

    `scored` is (rows, positions), true where the logits at a position count; None where logits are of whole rows.
    """

    inputs: dict[str, Tensor]
    scored: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        scored = None if self.scored is None else self.scored.to(device)
        return Batch({name: tensor.to(device) for name, tensor in self.inputs.items()}, scored)


@dataclass(frozen=True)
class TaskRows:
    """The rows of one task, encoded and not yet padded.

    `inputs` holds for each row the tensors that the model's forward takes, without a batch dimension; `scored` for
    each row which positions' logits count (of kind "tokens"); `padding` what the tensors of different lengths are
    filled up with, by name (on the right; 0 for those that are not named). `fingerprint` changes when the rows do.
    """

    task: str
    kind: Kind
    inputs: Sequence[Mapping[str, Tensor]]
    scored: Sequence[Tensor] | None
    padding: Mapping[str, int]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Some rows, filled up to the longest of them, on the CPU.

        Args:
            rows: their numbers.
        """
        names = self.inputs[rows[0]]
        inputs = {
            name: _together([self.inputs[row][name] for row in rows], self.padding.get(name, 0)) for name in names
        }
        return Batch(inputs, None if self.scored is None else _together([self.scored[row] for row in rows], 0))

    def batches(self, size: int, rows: Sequence[int] | None = None) -> Iterator[tuple[list[int], Batch]]:
        """All rows in batches of similar lengths, so that little is filled up, with the numbers of the rows.

        Args:
            size: rows in a batch.
            rows: only these.
        """
        chosen = sorted(range(len(self)) if rows is None else rows, key=self.length)
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            yield part, self.batch(part)

    def length(self, row: int) -> int:
        """How many entries a row's tensors have: more mean more work."""
        return sum(tensor.numel() for tensor in self.inputs[row].values())


def _together(tensors: Sequence[Tensor], fill: int) -> Tensor:
    """Tensors of one batch; of different sizes, each is filled up at the end of every dimension."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    if all(list(tensor.shape) == shape for tensor in tensors):
        return torch.stack(list(tensors))
    whole = tensors[0].new_full((len(tensors), *shape), fill)
    for place, tensor in zip(whole, tensors, strict=True):
        place[tuple(slice(size) for size in tensor.shape)] = tensor
    return whole
