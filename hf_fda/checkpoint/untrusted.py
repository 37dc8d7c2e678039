"""Text and names that come from elsewhere, taken with limits: what would hang a program or lead out of a folder is
refused."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from hf_fda.errors import InputError

MOST_JSON = 100_000_000
"""Bytes of a JSON file; a safetensors header may have as many."""

MOST_VALUES = 100_000
"""Values that a YAML file may hold once its aliases are followed."""


def parse_json(text: str | bytes) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: when it is no JSON, or nested deeper than can be followed.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json(path: Path, label: str = "") -> Any:
    """The content of a JSON file.

    Args:
        path: the file.
        label: what to call it in errors; its path if empty.

    Raises:
        InputError: when it is no JSON, too large, or nested too deep.
    """
    where = label or str(path)
    if path.stat().st_size > MOST_JSON:
        raise InputError(
            f"{where} is larger than {MOST_JSON // 1_000_000} MB, so it is not read; fetch or save it again"
        )
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{where} is not valid JSON; fetch or save it again") from None


def parse_yaml(text: str) -> Any:
    """The content of a YAML text with one document, of plain values.

    Raises:
        ValueError: saying why, when it is no YAML, uses tags that make other values, is nested too deep, or its aliases
            stand for too many values.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return None
        check_yaml_size([node])
        return yaml.constructor.SafeConstructor().construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    except RecursionError:
        raise ValueError("nested too deep") from None


def check_yaml_size(documents: Iterable[yaml.Node]) -> None:
    """Refuse documents whose aliases stand for too many values, or for themselves.

    Raises:
        ValueError: saying so.
    """
    sizes: dict[int, int] = {}
    for document in documents:
        if _size(document, sizes, set()) > MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {MOST_VALUES} values")


def _size(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Values that a node holds, each alias counted as what it stands for."""
    if id(node) in above:
        raise ValueError("an alias stands for what it is part of")
    if id(node) not in known:
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_size(part, known, above | {id(node)}) for part in parts)
    return known[id(node)]


def check_file_names(names: Iterable[str], where: str) -> None:
    """Refuse file names of a repository that lead out of it.

    Raises:
        InputError: naming the first such file.
    """
    for name in names:
        if not leads_inside(name):
            raise InputError(f"{where}: it lists the file '{name}', which lies outside the repository; refused")


def leads_inside(name: str) -> bool:
    """Whether a file name is a relative path that stays below where it starts.

    >>> leads_inside("blocks/layer.0.safetensors"), leads_inside("blocks/../../x"), leads_inside("/etc/passwd")
    (True, False, False)
    """
    parts = name.replace("\\", "/").split("/")
    return not any(part in ("", ".", "..") for part in parts) and ":" not in parts[0] and "\0" not in name


def check_link(path: Path, folder: Path) -> None:
    """Refuse a file of a folder that is a link to somewhere else; the Hub's cache links to its own store of files.

    Raises:
        InputError: naming the file.
    """
    target, root = path.resolve(), folder.resolve()
    cache = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not target.is_relative_to(root) and not target.is_relative_to(cache):
        raise InputError(f"{path}: is a link to {target}, outside its folder; refused")
