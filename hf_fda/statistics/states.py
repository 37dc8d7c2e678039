"""What blocks give out, kept between two passes: a model goes on from there without the blocks before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_fda.checkpoint.header import read_header, read_tensor

PREFIX = "/state"
"""How the names of kept outputs begin, which no tensor's does."""


class KeptStates:
    """The outputs of the last block that ran in each stack of blocks, batch by batch, in a file.

    Args:
        path: the file; None: no block has run yet.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries = {} if path is None else read_header(path)

    def read(self, batch: int, device: torch.device) -> dict[str, Any]:
        """By stack, what its last block gave out for a batch."""
        found: dict[str, list[Tensor]] = {}
        start = f"{PREFIX}.{batch}."
        for name in sorted(name for name in self._entries if name.startswith(start)):
            assert self._path is not None
            tensor = read_tensor(self._path, self._entries[name]).to(device)
            found.setdefault(name.removeprefix(start).rpartition(".")[0], []).append(tensor)
        return {stack: _output(parts) for stack, parts in found.items()}


def state_tensors(batch: int, states: Mapping[str, Any]) -> dict[str, Tensor]:
    """How the states of a batch are kept, by the name of each tensor.

    A block gives out a tensor, or several of which some may be None (T5's position biases): those are empty.
    """
    tensors: dict[str, Tensor] = {}
    for stack, output in states.items():
        parts: Sequence[Tensor | None] = [output] if isinstance(output, Tensor) else [torch.empty(0), *output]
        for number, part in enumerate(parts):
            kept = torch.empty(0) if part is None else part.contiguous().cpu()
            tensors[f"{PREFIX}.{batch}.{stack}.{number:02}"] = kept
    return tensors


def _output(parts: Sequence[Tensor]) -> Any:
    """What a block gave out, from how it is kept: after an empty tensor follow several."""
    if len(parts) == 1:
        return parts[0]
    return tuple(part if part.numel() else None for part in parts[1:])


def stack_of(block: str) -> str:
    """The stack that a block belongs to, by their paths."""
    return block.rpartition(".")[0]


def skip_block(model: nn.Module, block: str, states: Callable[[], Mapping[str, Any]]) -> None:
    """Make a block give out what is kept of its stack, without computing or reading anything.

    Args:
        model: in which it lies.
        block: its path.
        states: gives what is kept for the batch that runs.
    """
    module: Any = model.get_submodule(block)
    module._forward_pre_hooks.clear()
    module._forward_hooks.clear()
    module.forward = lambda *_args, **_kwargs: states()[stack_of(block)]
