"""YAML whose every value knows its line, so that a refusal can say where."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from hf_fda.checkpoint.untrusted import check_yaml_size
from hf_fda.errors import InputError, nearest

Scalar = bool | int | float | str
"""What one YAML word may mean."""

_SCIENTIFIC = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+")
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map", "timestamp")}


@dataclass(frozen=True)
class Node:
    """A value in a YAML file.

    Args:
        file: what to call the file in messages.
        path: where in the document the value is, as keys joined by dots; "" for all of it.
        node: the parsed value.
    """

    file: str
    path: str
    node: yaml.Node

    @property
    def line(self) -> int:
        """Its line, from 1 on."""
        return int(self.node.start_mark.line) + 1

    def refuse(self, reason: str) -> NoReturn:
        """Raise an error that says where."""
        raise InputError(f"{self.file}, line {self.line}: {self.path + ': ' if self.path else ''}{reason}")

    @property
    def is_mapping(self) -> bool:
        """Whether it has keys."""
        return isinstance(self.node, yaml.MappingNode)

    @property
    def is_list(self) -> bool:
        """Whether it is a list."""
        return isinstance(self.node, yaml.SequenceNode)

    @property
    def is_null(self) -> bool:
        """Whether it is nothing (`null`, `~` or empty)."""
        return isinstance(self.node, yaml.ScalarNode) and self.node.tag == "tag:yaml.org,2002:null"

    def fields(self, known: Iterable[str] | None = None) -> dict[str, Node]:
        """The values of a mapping by key; those that are nothing are left out.

        Args:
            known: the keys that it may have; None: any.

        Raises:
            InputError: when it is no mapping, or a key is unknown or given twice.
        """
        if not isinstance(self.node, yaml.MappingNode):
            self.refuse("must be a mapping of keys to values")
        found: dict[str, Node] = {}
        for key, value in self.node.value:
            name = str(Node(self.file, self.path, key).scalar())
            here = Node(self.file, f"{self.path}.{name}" if self.path else name, value)
            at = Node(self.file, self.path, key)
            if known is not None and name not in known:
                at.refuse(f"unknown key '{name}': {nearest(name, list(known))}")
            if name in found:
                at.refuse(f"'{name}' is given twice")
            found[name] = here
        return {name: value for name, value in found.items() if not value.is_null}

    def items(self) -> tuple[Node, ...]:
        """The values of a list.

        Raises:
            InputError: when it is no list.
        """
        if not isinstance(self.node, yaml.SequenceNode):
            self.refuse("must be a list")
        return tuple(Node(self.file, f"{self.path}[{n}]", value) for n, value in enumerate(self.node.value))

    def scalar(self) -> Scalar:
        """A single word or number.

        Raises:
            InputError: when it is none.
        """
        if not isinstance(self.node, yaml.ScalarNode) or self.is_null:
            self.refuse("must be a single value")
        value = _plain(self)
        if isinstance(value, str) and _SCIENTIFIC.fullmatch(value):  # YAML 1.1 takes 1e-5 for a word
            return float(value)
        return value if isinstance(value, (bool, int, float, str)) else str(self.node.value)

    def text(self) -> str:
        """A word, as it is written.

        Raises:
            InputError: when it is none.
        """
        self.scalar()
        return str(self.node.value)

    def plain(self) -> Any:
        """The value in Python's own types."""
        return _plain(self)


def read_documents(text: str, file: str) -> tuple[Node, ...]:
    """The documents of a YAML file.

    Args:
        text: its content.
        file: what to call it in messages.

    Raises:
        InputError: when it is no YAML, or uses tags of its own.
    """
    try:
        nodes = [node for node in yaml.compose_all(text, Loader=yaml.SafeLoader) if node is not None]
        check_yaml_size(nodes)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{file}{where}: not valid YAML ({reason})") from None
    except (RecursionError, ValueError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"{file}: not valid YAML ({reason})") from None
    for node in nodes:
        _check_tags(file, node)
    return tuple(Node(file, "", node) for node in nodes)


def _check_tags(file: str, root: yaml.Node) -> None:
    """Refuse tags that would make other things than plain values; every value is looked at once."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.tag not in _PLAIN:
            Node(file, "", node).refuse(
                f"the tag or key '{node.tag.removeprefix('tag:yaml.org,2002:')}' is not allowed"
            )
        if isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            waiting.extend(part for pair in node.value for part in pair)


def _plain(node: Node) -> Any:
    constructor = yaml.constructor.SafeConstructor()
    try:
        return constructor.construct_document(node.node)
    except (yaml.YAMLError, ValueError):
        node.refuse("cannot be read as a value")
