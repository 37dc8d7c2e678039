"""Models that run on rows, their weights read when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_fda.blocks.streamed import stream_weights
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.layout import meta_model
from hf_fda.checkpoint.view import View

HELD_BYTES = 2**30
"""Bytes of a source's weights that stay in memory between two batches; what is beyond is read again for each."""


class HeldView(View):
    """A checkpoint of which what is read stays in memory, up to a number of bytes. Who reads must not change it.

    Args:
        origin: the checkpoint.
        limit: bytes that are held at most; None: all that is read.
        replaced: tensors that are others than the checkpoint's, by the checkpoint's own names.
    """

    def __init__(
        self,
        origin: Checkpoint,
        limit: int | None = HELD_BYTES,
        replaced: Mapping[str, Callable[[], Tensor]] | None = None,
    ) -> None:
        super().__init__(origin)
        self._left = float("inf") if limit is None else limit
        self._held: dict[str, Tensor] = {}
        self._replaced = dict(replaced or {})

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """One tensor on the CPU, as `Checkpoint.read`."""
        if name not in self._held:
            tensor = self._replaced[name]() if name in self._replaced else self.origin.read(name)
            if tensor.nbytes > self._left:
                return tensor if part is None else tensor.flatten()[part]
            self._left -= tensor.nbytes
            self._held[name] = tensor
        tensor = self._held[name]
        return tensor if part is None else tensor.flatten()[part]

    def forget(self) -> None:
        """Let go of all that is held. A model that reads from here is part of a cycle, which lives on for a while."""
        self._held.clear()


def streamed_model(checkpoint: Checkpoint, device: torch.device) -> PreTrainedModel:
    """A checkpoint's model, of which each block holds its weights only while it runs (`stream_weights`).

    Args:
        checkpoint: of any kind.
        device: where to run, in float32.
    """
    model = meta_model(checkpoint.layout.config, checkpoint.layout.model_class)
    model.config.use_cache = False
    stream_weights(model, checkpoint, device)
    return model
