"""Task vectors tensor by tensor, or part of a tensor by part: read from base and sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.inputs import Inputs
from hf_fda.lowrank import LowRank
from hf_fda.merge_methods import MethodConfig
from hf_fda.progress import logger
from hf_fda.randomness import random_stream
from hf_fda.selection import Cut
from hf_fda.streaming.tensorwise import BLOCK, apply_method, apply_to_factors, parts_of


@dataclass(frozen=True)
class StoredPart:
    """Part of a tensor, flat, on the CPU: the base's entries and each source's (None: it has no such tensor).

    `differ` says of each source whether it is its entries, in their stored type, or its task vector that is held.
    """

    base: Tensor
    own: list[Tensor | None]
    differ: list[bool]

    def blocks(self) -> list[slice]:
        """The part in pieces that are computed with at a time."""
        return parts_of(len(self.base), BLOCK)

    def read(self, block: slice, device: torch.device, work: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """theta_0 and K task tensors of a block, on the device, in the type to compute in."""
        base, *tasks = self.rows(block, device, work).unbind()
        return base, tasks

    def rows(self, block: slice, device: torch.device, work: torch.dtype) -> Tensor:
        """As `read`, in one tensor (K + 1, n)."""
        rows = torch.empty(len(self.own) + 1, block.stop - block.start, dtype=work, device=device)
        base = rows[0].copy_(self.base[block])
        for number in range(len(self.own)):
            self._put(number, block, base, rows[number + 1])
        return rows

    def task(self, number: int, block: slice, device: torch.device, work: torch.dtype) -> Tensor:
        """One source's task tensor of a block, as `read`."""
        base = self.base[block].to(device, work)
        return self._put(number, block, base, torch.empty_like(base))

    def _put(self, number: int, block: slice, base: Tensor, out: Tensor) -> Tensor:
        """One source's task tensor of a block, in `out`."""
        own = self.own[number]
        if own is None:
            return out.zero_()
        out.copy_(own[block])
        return out.sub_(base) if self.differ[number] else out


class TaskVectors:
    """Reads one tensor of base and sources at a time.

    Args:
        inputs: base and sources.
        device: where to compute.
        seed: of what is random; every tensor has a stream of its own.
    """

    def __init__(self, inputs: Inputs, device: torch.device, seed: int = 0) -> None:
        self.inputs, self.base, self.device, self.seed = inputs, inputs.base, device, seed
        self.moved: dict[str, bool] = {}
        self.cuts: Sequence[Cut] = ()
        """For methods that trim whole task vectors, which entries of each source stay, once that is known."""

    def may_move(self, name: str) -> bool:
        """Whether any source may differ from the base in a tensor."""
        return any(source.may_move(name) for source in self.inputs.moving)

    def read(self, name: str, work: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """The base's tensor and the sources' task tensors, on the device.

        Args:
            name: the base's name of it.
            work: the type to compute in.

        Returns:
            theta_0 and K task tensors of its shape; a source that lacks the tensor has zeros.
        """
        base = self.base.read(name).to(self.device, work)
        return base, [self._task(source, name, base) for source in self.inputs.moving]

    def _task(self, source: AlignedSource, name: str, base: Tensor) -> Tensor:
        if name not in source.tensor_of:
            return torch.zeros_like(base)
        task = source.task(name, base)
        self.note_move(source.name, lambda: bool(task.any()))
        return task

    def stored(self, name: str, part: slice) -> StoredPart:
        """Part of a tensor of base and sources as it is read, on the CPU, to be computed with later.

        Args:
            name: the base's name of it.
            part: of its flattened entries.
        """
        base = self.base.read(name, part)
        own: list[Tensor | None] = []
        for source in self.inputs.moving:
            if name not in source.tensor_of:
                own.append(None)
            elif source.checkpoint.stored:
                own.append(source.read(name, part))
            else:
                own.append(source.task(name, base.to(torch.promote_types(base.dtype, torch.float32)), part))
        return StoredPart(base, own, [source.checkpoint.stored for source in self.inputs.moving])

    def in_parts(self, name: str) -> bool:
        """Whether base and sources are read in parts, by several threads at once."""
        return read_in_parts(self.inputs, name)

    def merged_factors(self, name: str, config: MethodConfig) -> LowRank | None:
        """The merged task vector of a tensor as thin factors, on the CPU, where it comes out as such without being
        dense in between; else None. At least one source moves the tensor.

        Args:
            name: the base's name of it.
            config: the method.
        """
        tasks: list[LowRank | None] = []
        for source in self.inputs.moving:
            own = source.factors(name) if source.may_move(name) else None
            if own is None and source.may_move(name):
                return None
            tasks.append(None if own is None else own.to(self.device, torch.float32))
            self.moved[source.name] = self.moved.get(source.name, False) or own is not None
        role = self.base.layout.roles[name]
        found = apply_to_factors(config, self.base.shape(name), tasks, role)
        return None if found is None else found.to("cpu", torch.float32)

    def merged_task(self, name: str, config: MethodConfig) -> Tensor:
        """The merged task vector of a tensor, dense, in float32 on the CPU.

        Args:
            name: the base's name of it.
            config: the method.
        """
        base, tasks = self.read(name, torch.float32)
        return apply_method(config, base, tasks, self.base.layout.roles[name], self.generator(name)).cpu()

    def soup(self, name: str, config: MethodConfig) -> Tensor:
        """The mean of a tensor that the base does not have, by the sources' own name."""
        tensors = [source.checkpoint.read(name).double() for source in self.inputs.weighted]
        return config.merge(torch.zeros_like(tensors[0]), tensors)

    def generator(self, name: str, part: int | None = None) -> torch.Generator:
        """The random stream of one of the base's tensors, or of a part of it."""
        return random_stream(self.seed, "merge", name if part is None else f"{name}/{part}")

    def note_move(self, source: str, moved: Callable[[], bool | Tensor]) -> None:
        """Remember whether a source was seen to differ from the base; asks no more once it was."""
        self.moved[source] = self.moved.get(source, False) or bool(moved())


def read_in_parts(inputs: Inputs, name: str) -> bool:
    """Whether one of the base's tensors is read in parts in base and sources, by several threads at once."""
    sources = (source for source in inputs.moving if name in source.tensor_of)
    return inputs.base.in_parts(name) and all(source.in_parts(name) for source in sources)


def warn_of_equals(moved: Sequence[Mapping[str, bool]]) -> None:
    """Say which sources never differed from the base in anything that was read.

    Args:
        moved: of each process, whether a source was seen to differ, by name.
    """
    seen = [name for found in moved for name in found]
    moving = {name for found in moved for name, differs in found.items() if differs}
    for name in dict.fromkeys(seen):
        if name not in moving:
            logger.warning("source '%s' equals the base in all that was merged: its task vector is zero", name)
