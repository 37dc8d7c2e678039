"""The base and the sources of a merge: opened, named, matched to each other, and refused by name if they do not fit."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_fda.adapters import AdapterCheckpoint, adapter_of, open_source
from hf_fda.anchors.container import ON_HUB, FunctionalDualAnchors
from hf_fda.anchors.manifest import MANIFEST
from hf_fda.blocks import Unit, find_blocks, regions
from hf_fda.checkpoint.alignment import AlignedSource, align, check_shapes
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.reader import open_checkpoint
from hf_fda.checkpoint.view import Untied
from hf_fda.errors import InputError, few, nearest
from hf_fda.vocabulary import Vocabulary, VocabularyRequest, align_vocabularies, check_request


@dataclass
class Source:
    """One model to merge: its weights matched to the base, its anchors, or both.

    `name` is the task's name, used for folders and in messages. `rest` is, of a source that is anchors only, what it
    changed outside the blocks, where that lies beside them and is merged.
    """

    name: str
    id: str
    weights: AlignedSource | None = None
    anchors: FunctionalDualAnchors | None = None
    rest: AlignedSource | None = None

    @property
    def has_rest(self) -> bool:
        """Whether what lies outside its blocks is at hand: in its weights, or beside its anchors."""
        return self.weights is not None or (self.anchors is not None and self.anchors.info.rest is not None)

    def has(self, unit: Unit) -> bool:
        """Whether the source has a unit of the base."""
        if self.weights is not None:
            return self.weights.has(unit.tensors)
        return self.anchors is not None and unit.name in self.anchors


@dataclass
class Inputs:
    """Everything a merge reads; base and sources have the same tokens in the same rows.

    `asked` is what was asked of the vocabulary, as plain values; `with_base` says whether there is a base, or only a
    model that gives shapes and a tokenizer.
    """

    base: Checkpoint
    sources: tuple[Source, ...]
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    asked: dict[str, Any] = field(default_factory=dict)
    with_base: bool = True

    @property
    def weighted(self) -> tuple[AlignedSource, ...]:
        """The sources that have weights."""
        return tuple(source.weights for source in self.sources if source.weights is not None)

    @property
    def moving(self) -> tuple[AlignedSource, ...]:
        """The sources that have task vectors: those with weights, and those whose rest lies beside their anchors."""
        found = (source.weights or source.rest for source in self.sources)
        return tuple(own for own in found if own is not None)


def open_inputs(
    base: Any,
    sources: Any,
    anchors: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    tokens: Any = None,
    chat_template: Any = None,
    pad_to_multiple_of: Any = None,
    with_base: bool = True,
) -> Inputs:
    """Open base and sources and match them.

    Args:
        base: folder, Hub id or model.
        sources: a list of folders, Hub ids, models or anchors, or the same by task name.
        anchors: anchors that were already constructed, by task name of a source that is given as weights.
        trust_remote_code: run model code that comes with the checkpoints.
        tokenizer: the output's vocabulary, as `hf_fda.plan`; so are `tokens`, `chat_template` and `pad_to_multiple_of`.
        with_base: whether the base is one, or only gives shapes and a tokenizer.

    Raises:
        InputError: when one cannot be used, or two do not belong together.
    """
    named = name_sources(sources)
    request = check_request(tokenizer, tokens, chat_template, pad_to_multiple_of, list(named))
    theta = open_checkpoint(base, trust_remote_code=trust_remote_code, label="base")
    absent = [name for name in theta.missing if regions(theta.layout)[name] != "after"]
    if absent:
        raise InputError(f"base: {theta.id} lacks {len(absent)} of its tensors ({few(absent)}); fetch or save it again")
    if not isinstance(anchors, (Mapping, type(None))):
        raise InputError(f"anchors must be a mapping from task name to anchors, not {type(anchors).__name__}")
    given = dict(anchors or {})
    for name in given:
        if name not in named:
            raise InputError(f"anchors: there is no source '{name}': {nearest(name, named)}")
    opened = tuple(_open(theta, name, value, given.get(name), trust_remote_code) for name, value in named.items())
    inputs = _with_vocabulary(theta, opened, replace(request, with_base=with_base), trust_remote_code)
    asked = {
        "tokenizer": tokenizer,
        "tokens": tokens,
        "chat_template": chat_template,
        "pad_to_multiple_of": pad_to_multiple_of,
    }
    return replace(inputs, asked={name: _plain(value) for name, value in asked.items() if value is not None})


def _plain(value: Any) -> Any:
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _with_vocabulary(
    base: Checkpoint, sources: tuple[Source, ...], request: VocabularyRequest, trust_remote_code: bool
) -> Inputs:
    """Base and sources with the same tokens in the same rows, and so with tensors of the same shapes."""
    for source in sources:
        if source.weights is None and source.name in request.models:
            raise InputError(f"source '{source.name}' is anchors only and has no tokens; name another model")
    weighted = [source.weights for source in sources if source.weights is not None]
    aligned = align_vocabularies(base, weighted, request, trust_remote_code)
    for own in aligned.sources:
        check_shapes(aligned.base, own, [name for name in own.tensor_of if not _is_head(aligned.base, own, name)])
    seen = iter(aligned.sources)
    found = tuple(replace(source, weights=next(seen)) if source.weights is not None else source for source in sources)
    return Inputs(aligned.base, found, aligned.vocabulary)


def with_ties_apart(inputs: Inputs) -> Inputs:
    """Inputs in which each place of a tied tensor has one of its own, where an adapter does not change them alike; else
    as they are. What is merged from them can be written as an adapter only.

    Raises:
        InputError: when the base lacks a place that an adapter changes.
    """
    adapters = [adapter_of(source.checkpoint) for source in inputs.weighted]
    if not any(adapter.apart for adapter in adapters if adapter is not None):
        return inputs
    base = Untied(inputs.base)

    def apart(source: Source) -> Source:
        if source.weights is None:
            return source
        checkpoint = source.weights.checkpoint
        if isinstance(checkpoint, AdapterCheckpoint):
            seen: Checkpoint = checkpoint.untied(base)
        elif (adapter := adapter_of(checkpoint)) is not None and adapter.apart:
            raise InputError(
                f"source '{source.name}' ({checkpoint.id}): the adapter does not change alike what the model ties to "
                f"{few(adapter.apart)}, and comes with other tokens than the base; merge it without its tokenizer"
            )
        else:
            seen = Untied(checkpoint)
        return replace(source, weights=align(base, seen, source.name))

    return replace(inputs, base=base, sources=tuple(map(apart, inputs.sources)))


def _open(base: Checkpoint, name: str, value: Any, anchors: Any, trust_remote_code: bool) -> Source:
    dual = _as_anchors(value)
    if dual is not None:
        return Source(name, dual.info.source.get("id", name), anchors=dual)
    try:
        checkpoint = open_source(base, value, trust_remote_code, f"source '{name}'")
    except InputError:
        dual = _as_dataset(value)
        if dual is None:
            raise
        return Source(name, dual.info.source.get("id", name), anchors=dual)
    _check_known(base, checkpoint, name)
    aligned = align(base, checkpoint, name)
    _check_complete(base, aligned)
    own_anchors = None
    if anchors is not None:
        try:
            own_anchors = _as_anchors(anchors) or FunctionalDualAnchors.from_pretrained(anchors)
        except (InputError, TypeError) as error:
            raise InputError(f"anchors of '{name}': {error}") from None
    return Source(name, checkpoint.id, aligned, own_anchors)


def _check_known(base: Checkpoint, source: Checkpoint, name: str) -> None:
    """Refuse to match a model that transformers knows to one that it does not: their names mean different things."""
    if base.layout.known == source.layout.known:
        return
    strange, label = (source, f"source '{name}'") if base.layout.known else (base, "the base")
    raise InputError(
        f"source '{name}' ({source.id}) and the base ({base.id}) are not of one architecture: config.json of {label} "
        f"names {strange.layout.model_class.__name__}, which transformers does not know; update transformers, or pass "
        "trust_remote_code=True if it comes with code that you trust"
    )


def _is_head(base: Checkpoint, source: AlignedSource, name: str) -> bool:
    """A tensor outside the bare model in both: heads of different sizes may bear one name."""
    own = f"{base.layout.model.base_model_prefix}."
    other = f"{source.checkpoint.layout.model.base_model_prefix}."
    inside = name.startswith(own) or source.tensor_of[name].startswith(other)
    bare = own not in base.layout.body_prefixes
    return not inside and not bare


def _check_complete(base: Checkpoint, source: AlignedSource) -> None:
    """Refuse a source that lacks tensors the base has, or has more in its blocks.

    What follows the last block may differ, and a whole tower may be absent (a vision fine-tune of a CLIP).
    """
    where = regions(base.layout)
    towers: dict[str, list[str]] = {}
    for block in find_blocks(base.layout.model):
        towers.setdefault(block.rpartition(".")[0], []).append(f"{block}.")
    present = [
        tuple(blocks) for blocks in towers.values() if any(name.startswith(tuple(blocks)) for name in source.tensor_of)
    ]
    if not present or len(present) == len(towers):
        lacking = [name for name in source.absent if where[name] != "after"]
    else:
        lacking = [name for name in source.absent if name.startswith(tuple(b for blocks in present for b in blocks))]
    if lacking:
        raise InputError(
            f"source '{source.name}' ({source.checkpoint.id}) lacks {len(lacking)} of the base's {len(base.names)} "
            f"tensors ({few(lacking)}); it is no fine-tune of {base.id}, or its files are incomplete"
        )
    own_blocks = tuple(f"{block}." for block in find_blocks(source.checkpoint.layout.model))
    extra = [name for name in source.extra if name.startswith(own_blocks)] if own_blocks else []
    if extra:
        raise InputError(
            f"source '{source.name}' ({source.checkpoint.id}) has {len(extra)} tensors in its blocks that the base "
            f"lacks ({few(extra)}); it is no fine-tune of {base.id}"
        )


def _as_anchors(value: Any) -> FunctionalDualAnchors | None:
    """`value` as anchors if that is what it is: a container, the folder of one, or "datasets/org/name"."""
    if isinstance(value, FunctionalDualAnchors):
        return value
    if not isinstance(value, (str, os.PathLike)):
        return None
    is_folder = (Path(value).expanduser() / MANIFEST).is_file()
    on_hub = str(value).startswith(ON_HUB) and not Path(value).is_dir()
    return FunctionalDualAnchors.from_pretrained(value) if is_folder or on_hub else None


def _as_dataset(value: Any) -> FunctionalDualAnchors | None:
    """The anchors dataset on the Hub that a bare "org/name" means where there is no model of that name."""
    if not isinstance(value, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", value) or Path(value).exists():
        return None
    try:
        return FunctionalDualAnchors.from_pretrained(value)
    except InputError:
        return None


def name_sources(sources: Any) -> dict[str, Any]:
    """Sources by task name; those of a list are named after the last part of their path.

    >>> list(name_sources(["models/sst2", "me/bert-mnli@main"]))
    ['sst2', 'bert-mnli']

    Raises:
        InputError: when there are none, two have one name, or a name cannot be a folder's.
    """
    if isinstance(sources, (str, os.PathLike)) or not isinstance(sources, (Mapping, Sequence)):
        raise InputError("sources must be a list of checkpoints, or a mapping from task name to checkpoint")
    if not sources:
        raise InputError("no sources: give at least one model that was fine-tuned from the base")
    if isinstance(sources, Mapping):
        named = {str(name): value for name, value in sources.items()}
    else:
        named = {}
        for position, value in enumerate(sources):
            name = _default_name(value, position)
            if name in named:
                raise InputError(
                    f"two sources are named '{name}'; give each a name: sources={{'first': ..., 'second': ...}} "
                    "(--source first=... --source second=...)"
                )
            named[name] = value
    for name in named:
        if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name):
            raise InputError(f"source name '{name}': use letters, digits, '.', '_' and '-' (it names a folder)")
    return named


def _default_name(value: Any, position: int) -> str:
    if isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        return os.path.basename(os.path.abspath(text if os.path.isdir(text) else text.partition("@")[0]))
    return f"source{position}"
