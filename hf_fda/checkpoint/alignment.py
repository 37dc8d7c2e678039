"""Which tensor of a source belongs to which tensor of the base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.errors import InputError, few
from hf_fda.lowrank import LowRank

SHAPELESS = ("num_attention_heads", "num_key_value_heads", "head_dim", "num_experts_per_tok", "hidden_act")
"""Settings that change what a model computes but no tensor's shape."""


@dataclass
class AlignedSource:
    """A source whose tensors are asked for by the base's names.

    `name` is the task's name, `tensor_of` maps a base tensor's name to the source's own, `extra` are the source's
    tensors that the base does not have (a head), `absent` the base's that the source does not have.
    """

    name: str
    checkpoint: Checkpoint
    tensor_of: dict[str, str]
    extra: tuple[str, ...]
    absent: tuple[str, ...]

    def has(self, base_names: Iterable[str]) -> bool:
        """Whether the source has all of these (a vision fine-tune of a CLIP lacks the text tower)."""
        return all(name in self.tensor_of for name in base_names)

    def read(self, base_name: str, part: slice | None = None) -> Tensor:
        """The source's tensor for one of the base's, on the CPU, as `Checkpoint.read`."""
        return self.checkpoint.read(self.tensor_of[base_name], part)

    def task(self, base_name: str, base: Tensor, part: slice | None = None) -> Tensor:
        """The source's task vector for one of the base's tensors, as `Checkpoint.task`."""
        return self.checkpoint.task(self.tensor_of[base_name], base, part)

    def in_parts(self, base_name: str) -> bool:
        """Whether parts of its tensor for one of the base's are read without all of it."""
        return self.checkpoint.in_parts(self.tensor_of[base_name])

    def may_move(self, base_name: str) -> bool:
        """Whether the source may differ from the base in a tensor."""
        return base_name in self.tensor_of and self.checkpoint.may_move(self.tensor_of[base_name])

    def factors(self, base_name: str) -> LowRank | None:
        """The source's task vector for one of the base's tensors as thin factors, where it is known as such."""
        return self.checkpoint.factors(self.tensor_of[base_name])

    def rank(self, base_name: str) -> int | None:
        """The rank of these factors."""
        return self.checkpoint.rank(self.tensor_of[base_name])

    def dtype(self, base_name: str) -> torch.dtype:
        """The stored type of the source's tensor for one of the base's."""
        return self.checkpoint.dtype(self.tensor_of[base_name])


def align(base: Checkpoint, source: Checkpoint, name: str) -> AlignedSource:
    """Match a source's tensors to the base's by name.

    A bare encoder's tensors have no prefix, a classifier's have one ("bert."); any prefix under which either model
    holds a bare model is tried, and the pair that matches most names wins.

    Args:
        base: the base.
        source: the source.
        name: the source's task name, for messages.

    Raises:
        InputError: when hardly anything matches, or a shape differs (vocabularies get a message of their own).
    """
    best = match_names(base.names, base.layout.body_prefixes, source.names, source.layout.body_prefixes)
    few_match = len(best) < len(base.names) // 2 and len(best) < len(source.names) // 2
    if not best or few_match or not _same_architecture(base.config, source.config):
        raise InputError(
            f"source '{name}' ({_kind(source)}) is another architecture than the base ({_kind(base)}): they share "
            f"{len(best)} of {len(base.names)} tensor names"
        )
    _check_settings(base, source, name)
    taken = set(best.values())
    return AlignedSource(
        name,
        source,
        best,
        extra=tuple(other for other in source.names if other not in taken),
        absent=tuple(own for own in base.names if own not in best),
    )


def _kind(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.id}, {checkpoint.layout.model_class.__name__}, model type '{checkpoint.config.model_type}'"


def _parts(config: PretrainedConfig) -> dict[str, PretrainedConfig]:
    """A configuration and those of its towers, by model type."""
    towers = [getattr(config, name, None) for name in config.sub_configs]
    return {part.model_type: part for part in (*towers, config) if isinstance(part, PretrainedConfig)}


def _same_architecture(base: PretrainedConfig, source: PretrainedConfig) -> bool:
    return bool(_parts(base).keys() & _parts(source).keys())


def _check_settings(base: Checkpoint, source: Checkpoint, name: str) -> None:
    """Refuse a source whose configuration means another function by tensors of the same shapes."""
    ours, theirs = _parts(base.config), _parts(source.config)
    for kind in sorted(ours.keys() & theirs.keys()):
        for setting in SHAPELESS:
            mine, other = getattr(ours[kind], setting, None), getattr(theirs[kind], setting, None)
            if mine is not None and other is not None and mine != other:
                raise InputError(
                    f"source '{name}' ({source.id}) is another architecture than the base ({base.id}): its config says "
                    f"{setting}={other}, the base's {mine}"
                )


def match_names(
    base: Sequence[str], base_prefixes: Sequence[str], source: Sequence[str], source_prefixes: Sequence[str]
) -> dict[str, str]:
    """Which of one model's tensor names mean which of another's: the pair of prefixes that matches most, one to one.

    >>> match_names(["layer.weight"], [""], ["bert.layer.weight", "head.weight"], ["", "bert."])
    {'layer.weight': 'bert.layer.weight'}
    """
    best: dict[str, str] = {}
    for base_prefix in base_prefixes:
        for source_prefix in source_prefixes:
            names = _matches(base, source, base_prefix, source_prefix)
            if len(names) > len(best):
                best = names
    return best


def _matches(base: Sequence[str], source: Sequence[str], base_prefix: str, source_prefix: str) -> dict[str, str]:
    known = set(source)
    found = {}
    for name in base:
        other = source_prefix + name.removeprefix(base_prefix)
        if name.startswith(base_prefix) and other in known:
            found[name] = other
    taken = set(found.values())
    same = {name: name for name in base if name not in found and name in known - taken}
    return {name: (found | same)[name] for name in base if name in found or name in same}


def check_shapes(base: Checkpoint, source: AlignedSource, names: Iterable[str]) -> None:
    """Refuse a source whose tensors have other shapes than the base's.

    Args:
        base: the base.
        source: the source.
        names: the base's names to compare.

    Raises:
        InputError: naming the first tensor and both shapes.
    """
    differing = [name for name in names if base.shape(name) != source.checkpoint.shape(source.tensor_of[name])]
    if not differing:
        return
    first = differing[0]
    mine, theirs = base.shape(first), source.checkpoint.shape(source.tensor_of[first])
    vocabularies = [
        config.get_text_config().to_dict().get("vocab_size") for config in (base.config, source.checkpoint.config)
    ]
    if vocabularies[0] != vocabularies[1]:
        raise InputError(
            f"source '{source.name}' ({source.checkpoint.id}) has a vocabulary of {vocabularies[1]} tokens, the base "
            f"{vocabularies[0]} (tensor '{first}': {theirs} against {mine}), and it cannot be told which tokens; put "
            "each model's tokenizer into its folder and choose the output's (tokenizer='union', 'base' or a source's "
            "name), or resize it to the base's vocabulary (model.resize_token_embeddings)"
        )
    raise InputError(
        f"source '{source.name}' ({source.checkpoint.id}): tensor '{source.tensor_of[first]}' is {theirs}, the base's "
        f"is {mine} ({len(differing)} differ: {few(differing)}); a source must be fine-tuned from this very base"
    )
