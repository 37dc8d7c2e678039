"""A model in memory as a checkpoint."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from hf_fda.checkpoint.interface import ReadCheckpoint
from hf_fda.checkpoint.layout import ModelLayout
from hf_fda.checkpoint.location import Location
from hf_fda.errors import InputError, few


class ModelCheckpoint(ReadCheckpoint):
    """A model in memory seen as a checkpoint.

    Args:
        model: any transformers model with real weights.
        id: what to call it in messages and cards.
        state: its tensors by the names of its class; None: its own `state_dict`.
    """

    def __init__(self, model: PreTrainedModel, id: str, state: Mapping[str, Tensor] | None = None) -> None:
        self.location: Location | None = None
        self.id = id
        self.commit: str | None = None
        self._state = dict(model.state_dict() if state is None else state)
        meta = [name for name, tensor in self._state.items() if tensor.is_meta]
        if meta:
            raise InputError(f"{id}: the model in memory has no real weights for {few(meta)} (offloaded or meta)")
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        self.layout = ModelLayout(config, type(model))
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            self.layout.model._weight_conversions = conversions
        self.names = tuple(name for name in self.layout.names if name in self._state)
        self.unexpected: Sequence[str] = ()

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        return self.layout.config

    @property
    def missing(self) -> tuple[str, ...]:
        """None: what the model lacks it does not have."""
        return ()

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor."""
        return self._state[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._state[name].shape)

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """One tensor, copied to the CPU, as `Checkpoint.read`."""
        tensor = self._state[name].detach()
        return (tensor if part is None else tensor.flatten()[part]).to("cpu", copy=True).contiguous()

    def in_parts(self, name: str) -> bool:
        """As `Checkpoint.in_parts`."""
        return True

    @property
    def disk_order(self) -> list[str]:
        """The names in the model's order."""
        return list(self.names)

    def fingerprint(self) -> str:
        """A hash of the weights themselves."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(name.encode())
            digest.update(self.read(name).reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
