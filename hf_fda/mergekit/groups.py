"""Which models a document merges, layer by layer, and which of them is the base."""

from __future__ import annotations

from dataclasses import dataclass

from hf_fda.errors import InputError
from hf_fda.merge_methods import method_class
from hf_fda.mergekit.schema import Document, Input, OutputSlice, Reference

BASE_IS_AN_INPUT = ("linear", "karcher", "passthrough")
"""Methods of models, not of task vectors: to them the base is a model as the others are."""

BASE_IS_OPTIONAL = ("nuslerp", "multislerp")
"""Methods that merge task vectors where a base is given, else the models themselves."""


@dataclass(frozen=True)
class Group:
    """What one part of the output is merged from.

    `sources` are the inputs in order without the base, `base` the base's, None where there is none; `slice` gives the
    parameters of the part. `length` is its number of layers, None for all that the models have.
    """

    sources: tuple[Input, ...]
    base: Input | None
    slice: OutputSlice | None
    length: int | None


def groups_of(document: Document) -> tuple[Group, ...]:
    """The parts of a document's output, from the first layer to the last.

    Raises:
        InputError: naming the line, where the method is unknown, the base is missing, or sources do not go together.
    """
    method = document.method.text()
    try:
        method_class(method)
    except InputError as error:
        document.method.refuse(str(error))
    if document.models:
        inputs = document.models
        if document.base is not None and all(own.reference.key != document.base.key for own in inputs):
            inputs = (*inputs, Input(document.base, {}, None, document.base.node))
        return (_group(document, method, inputs, document.base, None),)
    found = tuple(_group(document, method, part.inputs, part.base or document.base, part) for part in document.slices)
    for part, group in zip(document.slices, found, strict=True):
        if len(group.sources) != len(found[0].sources):
            part.node.refuse(
                f"has {len(group.sources)} sources, the first slice {len(found[0].sources)}; all slices must have as "
                "many (a model may be repeated with weight 0)"
            )
    return found


def _group(
    document: Document, method: str, inputs: tuple[Input, ...], base: Reference | None, part: OutputSlice | None
) -> Group:
    node = document.node if part is None else part.node
    if base is not None and all(own.reference.key != base.key for own in inputs):
        base.node.refuse("the base model must be one of the slice's sources, with the layers that count as the base's")
    seen: set[str] = set()
    for own in inputs:
        if own.reference.key in seen:
            own.node.refuse(f"'{own.reference.key}' is listed twice; give it once, with the sum of its weights")
        seen.add(own.reference.key)
    length = None if part is None or part.inputs[0].layers is None else _length(part.inputs[0].layers)
    if method in BASE_IS_AN_INPUT:
        return Group(inputs, None, part, length)
    if base is None and method not in BASE_IS_OPTIONAL:
        node.refuse(f"method '{method}' needs a base_model")
    own_base = next((own for own in inputs if base is not None and own.reference.key == base.key), None)
    sources = tuple(own for own in inputs if own is not own_base)
    if not sources:
        node.refuse("there is nothing to merge but the base")
    return Group(sources, own_base, part, length)


def _length(layers: tuple[int, int]) -> int:
    return layers[1] - layers[0]
