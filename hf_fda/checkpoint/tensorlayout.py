"""A checkpoint of an architecture that transformers does not know, seen as the tensors in its files and no more."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from hf_fda.checkpoint.header import TensorEntry
from hf_fda.checkpoint.layout import ModelLayout, Role, TensorGroup

EMBEDDINGS = ("embed", "emb", "wte", "wpe")
"""Words in the name of a lookup table's module."""


class UnknownModel(nn.Module):
    """Modules of the right names that cannot be called."""

    base_model_prefix = ""
    all_tied_weights_keys: ClassVar[dict[str, str]] = {}


@cache
def unknown_class(name: str) -> type[UnknownModel]:
    """A stand-in for a class that is not known; the same for the same name."""
    return type(name, (UnknownModel,), {})


class TensorLayout(ModelLayout):
    """Names and shapes as they are in the files: nothing is renamed, stacked or tied, and no module is known.

    Args:
        facts: the content of `config.json`, which a merged model keeps.
        entries: the tensors in the files by name.
    """

    known = False

    def __init__(self, facts: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> None:
        self.facts = dict(facts)
        plain = {name: value for name, value in facts.items() if not isinstance(value, dict)}
        self.config = PretrainedConfig(**{name: value for name, value in plain.items() if name != "dtype"})
        kind = str(facts["model_type"])
        self.config.__dict__["model_type"] = kind
        names = facts.get("architectures") or [f"model of type '{kind}'"]
        self.model_class: Any = unknown_class(str(names[0]))
        self.tied: dict[str, str] = {}
        self.shapes = {name: entry.shape for name, entry in entries.items()}
        self.model: Any = self.model_class()
        for name, shape in self.shapes.items():
            owner: Any = self.model
            *path, leaf = name.split(".")
            for part in path:
                owner = owner._modules.setdefault(part, nn.Module())
            owner._parameters[leaf] = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)

    @property
    def roles(self) -> dict[str, Role]:
        """The role of every tensor by name, as far as name and shape tell it."""
        return {name: _role(name, shape) for name, shape in self.shapes.items()}

    @property
    def body_prefixes(self) -> tuple[str, ...]:
        """No other than ""."""
        return ("",)

    def groups(self, on_disk: Iterable[str]) -> tuple[list[TensorGroup], list[str]]:
        """Every tensor on its own, under its own name."""
        return [TensorGroup((name,), (name,), name) for name in on_disk], []

    def save_groups(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """Every tensor on its own."""
        return [(name,) for name in names]

    def unconverted(self, names: Iterable[str]) -> set[str]:
        """All of them."""
        return set(names)

    def to_disk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors."""
        return dict(tensors)

    def written_config(self) -> dict[str, Any]:
        """The content of `config.json` as it was."""
        return copy.deepcopy(self.facts)


def _role(name: str, shape: tuple[int, ...]) -> Role:
    if len(shape) != 2:
        return "other"
    owner = name.rpartition(".")[0].rpartition(".")[2]
    return "embedding" if any(word in owner for word in EMBEDDINGS) else "linear"
