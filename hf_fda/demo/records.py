"""Trained models and beside each the record of what it was made from, so that it is not trained twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def made_from(folder: Path, facts: dict[str, Any]) -> bool:
    """Whether a folder holds a whole model that was made from these facts."""
    try:
        return bool(json.loads(_record(folder).read_text(encoding="utf-8")) == facts)
    except (OSError, ValueError):
        return False


def save(folder: Path, facts: dict[str, Any], *parts: Any) -> None:
    """Write a model, then its record: an interruption leaves a model without one, which is trained again.

    Args:
        folder: where.
        facts: what the model was made from, as plain values.
        parts: what has a `save_pretrained`: the model, perhaps its tokenizer.
    """
    _record(folder).unlink(missing_ok=True)
    for part in parts:
        part.save_pretrained(folder)
    _record(folder).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _record(folder: Path) -> Path:
    return folder.with_suffix(".json")
