"""What a document says of the vocabulary, as arguments of a merge."""

from __future__ import annotations

from typing import Any

from hf_fda.errors import InputError
from hf_fda.mergekit.opening import Opened
from hf_fda.mergekit.schema import Document
from hf_fda.mergekit.yamlnodes import Node
from hf_fda.vocabulary import check_request


def vocabulary_of(document: Document, opened: Opened) -> dict[str, Any]:
    """The arguments `tokenizer`, `tokens`, `chat_template` and `pad_to_multiple_of` of `hf_fda.merge`.

    Args:
        document: in which models are named by where they are.
        opened: what they are called in the merge.

    Raises:
        InputError: naming the line, when one cannot be used.
    """
    if document.vocabulary is None:
        return {}
    said = document.vocabulary
    found: dict[str, Any] = {"tokenizer": None, "tokens": None, "chat_template": None, "pad_to_multiple_of": None}
    if said.source is not None:
        found["tokenizer"] = (
            said.source if isinstance(said.source, str) else _named(said.source, opened, ("base", "union"))
        )
    if said.template is not None:
        template = said.template.text()
        found["chat_template"] = opened.names.get(template, template)
    if said.multiple is not None:
        found["pad_to_multiple_of"] = said.multiple.plain()
    if said.tokens is not None:
        found["tokens"] = {token: _rule(rule, opened) for token, rule in said.tokens.fields().items()}
    try:
        check_request(**found, sources=list(opened.sources))
    except InputError as error:
        said.node.refuse(str(error))
    return found


def _named(node: Node, opened: Opened, words: tuple[str, ...] = ()) -> str:
    """A model as it is called in the merge."""
    text = node.text()
    if text in words:
        return text
    if text not in opened.names:
        node.refuse(f"'{text}' is no model of this merge; it merges {', '.join(opened.names)}")
    return opened.names[text]


def _rule(node: Node, opened: Opened) -> dict[str, Any]:
    """Where a token's row comes from, with models as they are called in the merge."""
    fields = node.fields(("source", "force"))
    rule: dict[str, Any] = {name: value.plain() for name, value in fields.items()}
    source = fields.get("source")
    if source is None:
        node.refuse("source is missing; say which model's row the token gets")
    if not source.is_mapping:
        return {**rule, "source": _named(source, opened)}
    inner = source.fields()
    if "model" in inner:
        rule["source"] = {**source.plain(), "model": _named(inner["model"], opened)}
    return rule
