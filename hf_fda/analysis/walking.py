"""Moving the weights that models share: to a point on a plane, or block by block back to the base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hf_fda.checkpoint.header import read_header, read_tensor
from hf_fda.checkpoint.writer import SafetensorsWriter, TensorSpec

Read = Callable[[str], Tensor]
"""Gives a tensor by the base's name of it."""


@dataclass(frozen=True)
class Shared:
    """Weights that models share, by the base's names: changed in place, so that all models see it."""

    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, names: Iterable[str], read: Read, device: torch.device) -> Shared:
        """Weights in float32 on a device.

        Args:
            names: which.
            read: gives each.
            device: where.
        """
        return cls({name: read(name).to(device, torch.float32) for name in names})

    def put(self, names: Iterable[str], read: Read) -> None:
        """Give some of them other values, one tensor at a time."""
        for name in names:
            self.tensors[name].copy_(read(name))

    @contextmanager
    def restored(self, names: Sequence[str], base: Read, merged: Read) -> Iterator[None]:
        """Some of them as in the base for a while, then as merged again."""
        self.put(names, base)
        try:
            yield
        finally:
            self.put(names, merged)


class Directions:
    """A base and two task vectors in a file of single precision, so that a model can be moved to any point of their
    plane with one tensor of each in memory.

    Args:
        path: a file that `write` made.
    """

    PARTS = ("base", "first", "second")

    def __init__(self, path: Path) -> None:
        self._path, self._entries = path, read_header(path)

    @classmethod
    def write(
        cls, path: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Sequence[Tensor]]
    ) -> Directions:
        """Make such a file.

        Args:
            path: the file.
            shapes: of the tensors, by name.
            read: gives theta_0, u and v of a tensor.
        """
        specs = {
            f"{part}.{name}": TensorSpec(torch.float32, shape) for name, shape in shapes.items() for part in cls.PARTS
        }
        with SafetensorsWriter(path, specs) as file:
            for name in shapes:
                for part, tensor in zip(cls.PARTS, read(name), strict=True):
                    file.write(f"{part}.{name}", tensor)
        return cls(path)

    def read(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """theta_0, u and v of a tensor, on the CPU."""
        base, first, second = (read_tensor(self._path, self._entries[f"{part}.{name}"]) for part in self.PARTS)
        return base, first, second

    def at(self, a: float, b: float) -> Read:
        """Gives the tensors of ``theta_0 + a u + b v``."""

        def read(name: str) -> Tensor:
            base, first, second = self.read(name)
            return base.add_(first, alpha=a).add_(second, alpha=b)

        return read
