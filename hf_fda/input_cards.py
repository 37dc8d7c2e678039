"""What the cards of the models that are merged state: licences and languages; never guessed."""

from __future__ import annotations

from typing import Any

from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.location import Location
from hf_fda.checkpoint.untrusted import parse_yaml

UNKNOWN = "unknown"
"""What stands for the licence of a model whose card states none."""


def licences_of(checkpoint: Checkpoint) -> list[str]:
    """The licences of what a checkpoint is made of, each once, with "unknown" where a card states none."""
    stated = (_metadata(own.location).get("license") for own in checkpoint.origins)
    return list(dict.fromkeys(licence if isinstance(licence, str) else UNKNOWN for licence in stated))


def languages_of(checkpoint: Checkpoint) -> list[str]:
    """The languages that the cards of what a checkpoint is made of state, each once."""
    stated = [_metadata(own.location).get("language") for own in checkpoint.origins]
    languages = [language for own in stated for language in (own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(language for language in languages if isinstance(language, str)))


def _metadata(location: Location | None) -> dict[str, Any]:
    """The metadata of a checkpoint's own card; nothing where it has none, or none that can be read."""
    if location is None or "README.md" not in location.names:
        return {}
    text = location.path("README.md").read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return {}
    try:
        metadata = parse_yaml(text.split("---", 2)[1])
    except ValueError:
        return {}
    return metadata if isinstance(metadata, dict) else {}
