"""Licences that models' own cards state; never guessed."""

from __future__ import annotations

from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.location import Location
from hf_fda.checkpoint.untrusted import parse_yaml

UNKNOWN = "unknown"
"""What stands for the licence of a model whose card states none."""


def licences_of(checkpoint: Checkpoint) -> list[str]:
    """The licences of what a checkpoint is made of, each once, with "unknown" where a card states none."""
    return list(dict.fromkeys(_licence(own.location) for own in checkpoint.origins))


def _licence(location: Location | None) -> str:
    """The licence that a checkpoint's own card states, or "unknown"."""
    if location is None or "README.md" not in location.names:
        return UNKNOWN
    text = location.path("README.md").read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return UNKNOWN
    try:
        metadata = parse_yaml(text.split("---", 2)[1])
    except ValueError:
        return UNKNOWN
    licence = metadata.get("license") if isinstance(metadata, dict) else None
    return licence if isinstance(licence, str) else UNKNOWN
