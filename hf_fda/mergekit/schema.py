"""The content of a mergekit configuration, checked against its schema but not yet against any model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hf_fda.errors import nearest
from hf_fda.mergekit.values import Setting, read_setting
from hf_fda.mergekit.yamlnodes import Node

KEYS = (
    "name",
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "modules",
    "hf_fda",
)
DTYPES = ("float32", "bfloat16", "float16", "float64")
SETTINGS = ("seed", "heads", "max_shard_bytes", "as_adapter", "rank", "energy", "data")
"""What a document may say under `hf_fda`, which mergekit does not know: arguments of `hf_fda.merge`."""


@dataclass(frozen=True)
class Reference:
    """A model: where it is ("org/name@revision" or a folder), and an adapter to put on it."""

    model: str
    adapter: str | None
    node: Node

    @property
    def key(self) -> str:
        """The reference as mergekit writes it; equal for equal models."""
        return self.model if self.adapter is None else f"{self.model}+{self.adapter}"


@dataclass(frozen=True)
class Input:
    """A model in a merge, or some of its layers (first, last + 1), with parameters of its own."""

    reference: Reference
    parameters: dict[str, Setting]
    layers: tuple[int, int] | None
    node: Node


@dataclass(frozen=True)
class OutputSlice:
    """Consecutive layers of the output: what they are merged from, with parameters of their own."""

    inputs: tuple[Input, ...]
    base: Reference | None
    parameters: dict[str, Setting]
    node: Node


@dataclass(frozen=True)
class Vocabulary:
    """What is said of the vocabulary: whose it is, rules for single tokens, a multiple for its size, a chat template.
    `node` is where it is said."""

    node: Node
    source: Node | Literal["union"] | None
    tokens: Node | None
    multiple: Node | None
    template: Node | None


@dataclass(frozen=True)
class Document:
    """One merge, as a mergekit configuration describes it: `models`, or `slices` of their layers.

    `settings` are arguments of `hf_fda.merge`, `plain` is all of the document in plain values.
    """

    node: Node
    name: str | None
    method: Node
    base: Reference | None
    models: tuple[Input, ...]
    slices: tuple[OutputSlice, ...]
    parameters: dict[str, Setting]
    dtype: str | None
    vocabulary: Vocabulary | None
    settings: dict[str, Any]
    plain: dict[str, Any]

    @property
    def references(self) -> tuple[Reference, ...]:
        """Every model that is named, once, in the order of the file, the base first."""
        named = [own.reference for own in self.models]
        named += [own.reference for part in self.slices for own in part.inputs]
        named += [part.base for part in self.slices if part.base is not None]
        every = [self.base, *named] if self.base is not None else named
        return tuple({reference.key: reference for reference in reversed(every)}.values())[::-1]


def read_document(node: Node) -> Document:
    """A document from YAML.

    Raises:
        InputError: naming the line, for an unknown key, a wrong type, or what is not supported.
    """
    fields = node.fields(KEYS)
    if "merge_method" not in fields:
        node.refuse("merge_method is missing; say how to merge")
    if "modules" in fields:
        fields["modules"].refuse("merging the towers of a model by rules of their own is not supported; use models")
    if ("models" in fields) == ("slices" in fields):
        node.refuse("give either models or slices, one of the two")
    base = _reference(fields["base_model"]) if "base_model" in fields else None
    models = tuple(_input(item) for item in fields["models"].items()) if "models" in fields else ()
    slices = tuple(_slice(item) for item in fields["slices"].items()) if "slices" in fields else ()
    if not models and not slices:
        node.refuse("there is nothing to merge")
    return Document(
        node=node,
        name=fields["name"].text() if "name" in fields else None,
        method=fields["merge_method"],
        base=base,
        models=models,
        slices=slices,
        parameters=_parameters(fields.get("parameters")),
        dtype=_dtype(fields),
        vocabulary=_vocabulary(fields),
        settings={name: own.plain() for name, own in fields["hf_fda"].fields(SETTINGS).items()}
        if "hf_fda" in fields
        else {},
        plain=node.plain(),
    )


def _dtype(fields: dict[str, Node]) -> str | None:
    """The type to write: `out_dtype`, else `dtype`. Whatever is said, the computation is in float32 at least."""
    found = None
    for key in ("dtype", "out_dtype"):
        if key in fields:
            found = fields[key].text().removeprefix("torch.")
            if found not in DTYPES:
                fields[key].refuse(f"'{found}' is no type that can be written: {nearest(found, DTYPES)}")
    return found


def _vocabulary(fields: dict[str, Node]) -> Vocabulary | None:
    """What the document says of the vocabulary, where it says something."""
    if "tokenizer" in fields and "tokenizer_source" in fields:
        fields["tokenizer"].refuse("give either tokenizer or tokenizer_source, one of the two")
    said = [fields[name] for name in ("tokenizer", "tokenizer_source", "chat_template") if name in fields]
    if not said:
        return None
    inner = fields["tokenizer"].fields(("source", "tokens", "pad_to_multiple_of")) if "tokenizer" in fields else {}
    source: Node | Literal["union"] | None = fields.get("tokenizer_source")
    if "tokenizer" in fields:
        source = inner.get("source") or "union"
    return Vocabulary(
        said[0], source, inner.get("tokens"), inner.get("pad_to_multiple_of"), fields.get("chat_template")
    )


def _input(node: Node) -> Input:
    fields = node.fields(("model", "parameters"))
    if "model" not in fields:
        node.refuse("model is missing")
    return Input(_reference(fields["model"]), _parameters(fields.get("parameters")), None, node)


def _slice(node: Node) -> OutputSlice:
    fields = node.fields(("sources", "base_model", "parameters", "residual_weight"))
    if "residual_weight" in fields:
        fields["residual_weight"].refuse("is not supported; leave it out")
    if "sources" not in fields or not fields["sources"].items():
        node.refuse("sources are missing")
    inputs = tuple(_layers(item) for item in fields["sources"].items())
    lengths = [own.layers[1] - own.layers[0] for own in inputs if own.layers is not None]
    for own, length in zip(inputs, lengths, strict=True):
        if length != lengths[0]:
            own.node.refuse(f"has {length} layers, the first source of the slice {lengths[0]}")
    base = _reference(fields["base_model"]) if "base_model" in fields else None
    return OutputSlice(inputs, base, _parameters(fields.get("parameters")), node)


def _layers(node: Node) -> Input:
    fields = node.fields(("model", "layer_range", "parameters"))
    for name in ("model", "layer_range"):
        if name not in fields:
            node.refuse(f"{name} is missing")
    ends = fields["layer_range"].plain()
    whole = isinstance(ends, list) and len(ends) == 2 and all(type(end) is int for end in ends)
    if not whole or not 0 <= ends[0] < ends[1]:
        fields["layer_range"].refuse("must be [first, last + 1], two whole numbers, the first from 0 up and smaller")
    return Input(_reference(fields["model"]), _parameters(fields.get("parameters")), (ends[0], ends[1]), node)


def _reference(node: Node) -> Reference:
    """A model from "path", "org/name@revision", "model+adapter" or the same as a mapping."""
    if not node.is_mapping:
        model, plus, adapter = node.text().partition("+")
        if "+" in adapter:
            node.refuse("at most one adapter can be put on a model (model+adapter)")
        if not model or (plus and not adapter):
            node.refuse("must name a model, as model or model+adapter")
        return Reference(model, adapter or None, node)
    fields = node.fields(("model", "lora", "override_architecture"))
    if "override_architecture" in fields:
        fields["override_architecture"].refuse("is not supported; change config.json of the model instead")
    if "model" not in fields:
        node.refuse("model is missing")
    return Reference(_path(fields["model"]), _path(fields["lora"]) if "lora" in fields else None, node)


def _path(node: Node) -> str:
    if not node.is_mapping:
        return node.text()
    fields = node.fields(("path", "revision"))
    if "path" not in fields:
        node.refuse("path is missing")
    return fields["path"].text() + (f"@{fields['revision'].text()}" if "revision" in fields else "")


def _parameters(node: Node | None) -> dict[str, Setting]:
    return {} if node is None else {name: read_setting(value) for name, value in node.fields().items()}
