"""Task heads: what follows a source's last block is the task's own, kept beside the merged body."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor
from transformers.models.auto import modeling_auto

from hf_fda.blocks import regions
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.layout import ModelLayout
from hf_fda.errors import InputError

_GENERAL = (
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_VISION_2_SEQ_MAPPING_NAMES",
)


@cache
def _general_classes() -> frozenset[str]:
    names: set[str] = set()
    for mapping in _GENERAL:
        for value in getattr(modeling_auto, mapping, {}).values():
            names.update([value] if isinstance(value, str) else value)
    return frozenset(names)


def has_task_head(layout: ModelLayout) -> bool:
    """Whether a model class ends in a head of its task's own: neither a bare model nor a language model.

    A model whose class is not in the library's lists has one when its name says "For" something; of one that
    transformers does not know at all nothing is told apart.
    """
    name = layout.model_class.__name__
    return layout.known and name not in _general_classes() and "For" in name


@dataclass(frozen=True)
class TaskHead:
    """A source's own tensors after its last block, by their names in the source's memory layout; of a head that lies
    beside anchors, by those in its file."""

    task: str
    tensors: tuple[str, ...]


def task_head(source: AlignedSource) -> TaskHead | None:
    """What of a source is its task's own: everything after the last block; None for bare and language models."""
    layout = source.checkpoint.layout
    if not has_task_head(layout):
        return None
    where = regions(layout)
    own = tuple(name for name in source.checkpoint.names if where[name] == "after" or name in source.extra)
    return TaskHead(source.name, own) if own else None


def head_files(source: AlignedSource, head: TaskHead) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A task's own tensors by their names in its own checkpoint, and its own configuration."""
    layout = source.checkpoint.layout
    return layout.to_disk({name: source.checkpoint.read(name) for name in head.tensors}), layout.written_config()


def check_same_heads(sources: tuple[AlignedSource, ...]) -> None:
    """Refuse to average heads that are not of one task.

    Raises:
        InputError: when classes, shapes or labels differ.
    """
    first = sources[0]
    reference = first.checkpoint
    for source in sources[1:]:
        other = source.checkpoint
        if other.layout.model_class is not reference.layout.model_class or other.names != reference.names:
            raise InputError(
                f"heads='merge': '{source.name}' is a {other.layout.model_class.__name__}, '{first.name}' a "
                f"{reference.layout.model_class.__name__}; heads of different kinds cannot be averaged: heads='keep'"
            )
        differing = [name for name in source.extra if other.shape(name) != reference.shape(name)]
        if differing or other.config.id2label != reference.config.id2label:
            raise InputError(
                f"heads='merge': the heads of '{source.name}' and '{first.name}' have other shapes or labels; only "
                "heads of one task can be averaged: heads='keep'"
            )
