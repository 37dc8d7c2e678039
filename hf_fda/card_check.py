"""Whether a folder's card is one that the Hub takes, looked at before anything is uploaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, ModelCard, RepoCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_fda.checkpoint.untrusted import parse_yaml
from hf_fda.errors import InputError
from hf_fda.hub import first_line

RELATIONS = ("merge", "adapter", "finetune", "quantized")
NAMES = ("base_model", "datasets")
"""Entries that name repositories: one, or a list."""
WORDS = ("license", "language", "pipeline_tag", "library_name", "tags")
"""Entries that are words: one, or a list."""


def check_card(folder: Path, kind: str) -> None:
    """Refuse a card that is missing, or whose metadata is broken.

    Args:
        folder: holds `README.md`.
        kind: "model" or "dataset".

    Raises:
        InputError: naming the entry, and the way out.
    """
    path = folder / "README.md"
    if not path.is_file():
        raise InputError(f"{path}: there is no card; make the merge or the anchors again into this folder")
    text = path.read_text(encoding="utf-8")
    card_class: type[RepoCard] = ModelCard if kind == "model" else DatasetCard
    if not text.startswith("---\n"):
        raise InputError(f"{path}: it has no metadata (a block between two lines of ---); put it back")
    try:
        card_class(text, ignore_metadata_errors=False)
        metadata = parse_yaml(text.split("\n---", 1)[0])
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise InputError(f"{path}: its metadata is broken ({first_line(error)}); mend it") from None
    for problem in _problems(metadata):
        raise InputError(f"{path}: its metadata is broken: {problem}; mend it")


def _problems(metadata: Mapping[str, Any]) -> list[str]:
    """What is wrong with entries, in words."""
    found = []
    for name in (*NAMES, *WORDS):
        values = metadata.get(name, [])
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str):
                found.append(f"{name} holds {value!r}, which is no text")
            elif name in NAMES and not _is_repository(value):
                found.append(f"{name} holds '{value}', which is no name of a repository on the Hub")
    relation = metadata.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        found.append(f"base_model_relation is {relation!r}, not one of {', '.join(RELATIONS)}")
    return found


def _is_repository(id: str) -> bool:
    try:
        validate_repo_id(id)
    except HFValidationError:
        return False
    return True
