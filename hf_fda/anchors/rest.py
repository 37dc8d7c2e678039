"""A base with what a source changed of it outside the blocks, as its publisher put that beside the anchors."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from hf_fda.anchors.beside import REST
from hf_fda.blocks import regions
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.named import Tensors
from hf_fda.checkpoint.view import View
from hf_fda.errors import InputError


class WithRest(View):
    """A base whose tensors outside the blocks are a source's own where it changed them.

    Args:
        base: the base.
        rest: the source's tensors, by the base's names.
        id: what to call it in messages.

    Raises:
        InputError: when a tensor is not the base's, lies in a block, or has another shape.
    """

    def __init__(self, base: Checkpoint, rest: Tensors, id: str) -> None:
        super().__init__(base)
        self.id, self.commit, self._rest = id, None, rest
        where = regions(base.layout)
        for name, spec in rest.specs.items():
            if where.get(name, "block") == "block":
                raise InputError(f"{id}: {REST} holds '{name}', which is no tensor of the base outside its blocks")
            if spec.shape != base.shape(name):
                raise InputError(
                    f"{id}: '{name}' in {REST} is {spec.shape}, that of the merge {base.shape(name)}; with other "
                    "tokens than the base's it cannot be used: rest='base'"
                )

    def aligned(self, name: str) -> AlignedSource:
        """It as a source that has what lies outside the blocks."""
        where = regions(self.layout)
        outside = {own: own for own in self.names if where[own] != "block"}
        return AlignedSource(name, self, outside, (), tuple(own for own in self.names if own not in outside))

    def dtype(self, name: str) -> torch.dtype:
        """As `Checkpoint.dtype`."""
        return self._rest.specs[name].dtype if name in self._rest.specs else super().dtype(name)

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """As `Checkpoint.read`."""
        return self._rest.read(name, part) if name in self._rest.specs else super().read(name, part)

    def in_parts(self, name: str) -> bool:
        """As `Checkpoint.in_parts`."""
        return name in self._rest.specs or super().in_parts(name)

    def may_move(self, name: str) -> bool:
        """As `Checkpoint.may_move`: where the file says so."""
        return name in self._rest.specs

    def fingerprint(self) -> str:
        """As `Checkpoint.fingerprint`."""
        return hashlib.sha256(f"{super().fingerprint()} {self._rest.digest()}".encode()).hexdigest()
