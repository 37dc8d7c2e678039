"""Gram matrices of the inputs of linear layers, summed up while a model runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_fda.checkpoint.header import read_header, read_tensor
from hf_fda.statistics.positions import Positions, same

RECENT = 4
"""Inputs that are kept for a moment, to see whether the next layer gets the same one (query, key and value do)."""


class GramSums:
    """Sums ``x x^T`` over the inputs of some linear layers, as they come, without padding.

    Batch by batch they are added in float32: over thousands of batches that is good to about 1e-6, far below what
    other rows would change, and twice the layers fit into memory. Layers that get the very same input share one sum.

    Args:
        modules: by the base's name of a weight, the layer's path in the model and the layer.
        positions: tells padding.
    """

    def __init__(self, modules: Mapping[str, tuple[str, nn.Module]], positions: Positions) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._follows: dict[str, str] = {}
        self._recent: deque[tuple[str, Tensor]] = deque(maxlen=RECENT)
        self._positions = positions
        for name, (path, module) in modules.items():
            module.register_forward_pre_hook(self._hook(name, path), with_kwargs=True)

    def end_batch(self) -> None:
        """Let go of the inputs that were seen last."""
        self._recent.clear()

    def tensors(self) -> dict[str, Tensor]:
        """What is saved: by a weight's name the sum (d_in, d_in), and with `.tokens` the number of its inputs; of a
        weight that shares the sum of another one, with `.as` which of these that is, in alphabetical order. A layer
        that never ran has nothing."""
        order = sorted(self._sums)
        sums = {name: self._sums[name].cpu() for name in order}
        counts = {f"{name}.tokens": torch.tensor(self._counts[name]) for name in order}
        follows = {f"{name}.as": torch.tensor(order.index(leader)) for name, leader in sorted(self._follows.items())}
        return {**sums, **counts, **follows}

    def _hook(self, name: str, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def see(_module: nn.Module, args: Any, kwargs: Any) -> None:
            x = (args[0] if args else kwargs["input"]).detach()
            leader = next((own for own, other in self._recent if same(x, other)), None)
            if leader is not None and name not in self._sums:
                self._follows[name] = leader
                return
            self._recent.append((name, x))
            self._add(name, self._positions.pick(path, x).float())

        return see

    def _add(self, name: str, x: Tensor) -> None:
        if name not in self._sums:
            self._sums[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        self._sums[name].addmm_(x.mT, x)
        self._counts[name] = self._counts.get(name, 0) + len(x)


class GramFiles:
    """The Gram matrices of one source, read from the files that hold them (`GramSums.tensors`).

    Args:
        files: all of them.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._place: dict[str, tuple[Path, str]] = {}
        for file in files:
            entries = read_header(file)
            leaders = sorted(name.removesuffix(".tokens") for name in entries if name.endswith(".tokens"))
            self._place |= {name: (file, name) for name in leaders}
            for name in entries:
                if name.endswith(".as"):
                    leader = leaders[int(read_tensor(file, entries[name]))]
                    self._place[name.removesuffix(".as")] = file, leader

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def size(self, name: str) -> int:
        """d_in of a layer."""
        file, leader = self._place[name]
        return read_header(file)[leader].shape[0]

    def read(self, name: str, normalize: bool) -> Tensor:
        """The Gram matrix (d_in, d_in) of the inputs of a weight, in float32 on the CPU.

        Args:
            name: the base's name of the weight.
            normalize: divide by the number of tokens.
        """
        file, leader = self._place[name]
        entries = read_header(file)
        gram = read_tensor(file, entries[leader])
        return gram.div_(max(int(read_tensor(file, entries[f"{leader}.tokens"])), 1)) if normalize else gram


def gram_of(found: Sequence[GramFiles], name: str, normalize: bool) -> Callable[[], Iterator[Tensor]] | None:
    """What reads the Gram matrices of a layer, source by source; zero for one that has no such layer, or never ran it.

    Args:
        found: those of every source.
        name: the base's name of the layer's weight.
        normalize: divide each by the number of tokens.

    Returns:
        None when no source has one.
    """
    size = next((files.size(name) for files in found if name in files), None)
    if size is None:
        return None

    def read() -> Iterator[Tensor]:
        for files in found:
            yield files.read(name, normalize) if name in files else torch.zeros(size, size)

    return read
