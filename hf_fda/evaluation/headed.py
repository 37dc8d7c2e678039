"""A merged body under a task's own head, seen as a checkpoint."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from transformers import AutoConfig

from hf_fda.checkpoint.alignment import match_names
from hf_fda.checkpoint.header import read_header
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.layout import ModelLayout, model_class_of
from hf_fda.checkpoint.location import Location
from hf_fda.checkpoint.view import View
from hf_fda.merged import HEADS, head_tensors


class WithHead(View):
    """A merged body under a task's own head, which is read when it is asked for.

    Args:
        body: the merged body, or the base of a merged adapter.
        location: of the merged model.
        task: whose head.
        trust_remote_code: run model code that comes with it.
    """

    def __init__(self, body: Checkpoint, location: Location, task: str, trust_remote_code: bool) -> None:
        super().__init__(body)
        self.id = f"{location.id}, task '{task}'"
        config = AutoConfig.from_pretrained(
            location.path(f"{HEADS}/{task}/config.json"), trust_remote_code=trust_remote_code
        )
        where = str(location.folder or location.repo_id)
        self.layout = ModelLayout(config, model_class_of(config, where, trust_remote_code, location.commit))
        self._path = location.path(f"{HEADS}/{task}/model.safetensors")
        groups, _ = self.layout.groups(read_header(self._path))
        own = frozenset(name for group in groups for name in group.memory)
        names = match_names(self.layout.names, self.layout.body_prefixes, body.names, body.layout.body_prefixes)
        self.own = own
        """Names of the tensors that are the task's own."""
        self._body_name = {name: other for name, other in names.items() if name not in own}
        self.names = tuple(name for name in self.layout.names if name in own or name in self._body_name)

    @property
    def missing(self) -> tuple[str, ...]:
        """Names that the model has but neither body nor head holds."""
        return tuple(name for name in self.layout.names if name not in self.names)

    @cached_property
    def _head(self) -> dict[str, Tensor]:
        return head_tensors(self._path, self.layout)

    def dtype(self, name: str) -> torch.dtype:
        """The stored type of a tensor."""
        return self.origin.dtype(self._body_name[name]) if name in self._body_name else self._head[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in memory layout."""
        return self.layout.shapes[name]

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """One tensor on the CPU, as `Checkpoint.read`."""
        if name in self._body_name:
            return self.origin.read(self._body_name[name], part)
        own = self._head[name]
        return (own if part is None else own.flatten()[part]).clone()

    def in_parts(self, name: str) -> bool:
        """As `Checkpoint.in_parts`."""
        return name not in self._body_name or self.origin.in_parts(self._body_name[name])

    @property
    def disk_order(self) -> tuple[str, ...]:
        """As `Checkpoint.disk_order`: any order is as good."""
        return self.names
