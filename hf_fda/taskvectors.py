"""Task vectors tensor by tensor: read from base and sources, merged by a parameter-space method, and forgotten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.errors import RunError
from hf_fda.inputs import Inputs
from hf_fda.lowrank import LowRank
from hf_fda.merge_methods import MethodConfig
from hf_fda.progress import logger
from hf_fda.randomness import random_stream
from hf_fda.tensorwise import PART, apply_method, apply_to_factors, by_entry


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

    def may_move(self, name: str) -> bool:
        """Whether any source may differ from the base in a tensor."""
        return any(source.may_move(name) for source in self.inputs.weighted)

    def read(self, name: str, work: torch.dtype, part: slice | None = None) -> tuple[Tensor, list[Tensor]]:
        """The base's tensor and the sources' task tensors, on the device.

        Args:
            name: the base's name of it.
            work: the type to compute in.
            part: only these of its flattened entries.

        Returns:
            theta_0 and K task tensors of its shape; a source that lacks the tensor has zeros.
        """
        base = self.base.read(name, part).to(self.device, work)
        return base, [self._task(source, name, base, part) for source in self.inputs.weighted]

    def _task(self, source: AlignedSource, name: str, base: Tensor, part: slice | None) -> Tensor:
        if name not in source.tensor_of:
            return torch.zeros_like(base)
        task = source.task(name, base, part)
        self.note_move(source.name, lambda: bool(task.any()))
        return task

    def merged(self, name: str, config: MethodConfig, dtype: torch.dtype) -> Tensor:
        """One of the base's tensors merged by a parameter-space method.

        Where entries do not depend on each other, a large tensor is read and merged in parts of bounded size.

        Args:
            name: the base's name of it.
            config: the method.
            dtype: of the result, where it is merged in parts.

        Returns:
            theta_0 plus the merged task tensor, on the CPU.

        Raises:
            RunError: naming source and tensor, when a matrix method meets what is not finite.
        """
        if not self.base.dtype(name).is_floating_point:
            return self.base.read(name)
        role, shape = self.base.layout.roles[name], self.base.shape(name)
        if not by_entry(config, role):
            base, tasks = self.read(name, torch.float32)
            for source, task in zip(self.inputs.weighted, tasks, strict=True):
                if not bool(task.isfinite().all()):
                    raise RunError(f"source '{source.name}': tensor '{name}' is not finite; check its weights")
            return (base + apply_method(config, base, tasks, role, self.generator(name))).cpu()
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        merged, generator = torch.empty(prod(shape), dtype=dtype), self.generator(name)
        for start in range(0, len(merged), PART):
            part = slice(start, min(start + PART, len(merged)))
            base, tasks = self.read(name, exact, part)
            merged[part] = base.add_(config.merge(base, tasks, generator))
        return merged.view(shape)

    def merged_factors(self, name: str, config: MethodConfig) -> LowRank | None:
        """The merged task vector of a tensor as thin factors, on the CPU, where it comes out as such without being
        dense in between; else None. At least one source moves the tensor.

        Args:
            name: the base's name of it.
            config: the method.
        """
        tasks: list[LowRank | None] = []
        for source in self.inputs.weighted:
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

    def generator(self, name: str) -> torch.Generator:
        """The random stream of one of the base's tensors."""
        return random_stream(self.seed, "merge", name)

    def note_move(self, source: str, moved: Callable[[], bool]) -> None:
        """Remember whether a source was seen to differ from the base; asks no more once it was."""
        self.moved[source] = self.moved.get(source, False) or moved()


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
