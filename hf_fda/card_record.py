"""What a card is made of, kept beside it, so that it can be made anew when scores are known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_fda.block_losses import LOSSES_PICTURE
from hf_fda.cards import Found, model_card
from hf_fda.coefficients import HEAT_MAP
from hf_fda.drawing import can_draw
from hf_fda.errors import InputError
from hf_fda.evaluation.published import EVAL_RESULTS, eval_results
from hf_fda.evaluation.scores import SCORES, Scores, read_scores
from hf_fda.merged import Merged
from hf_fda.pictures import draw_scores
from hf_fda.progress import logger
from hf_fda.store import Store

RECORD = "card.json"
"""The file in a merged folder that says what its card states: the merge's arguments and the facts known to it."""

README = "README.md"

SCORES_PICTURE = "scores.png"
"""The picture of the scores, where matplotlib is installed."""

ANALYSIS = "analysis"
"""The folder of what `hf_fda.analyze` saw of a merge."""

SEEN = {
    f"{ANALYSIS}/moves.png": "How far each part of the model moved",
    f"{ANALYSIS}/interference.png": "Cosines of the sources' task vectors",
    f"{ANALYSIS}/bought.png": "What each part's move bought on rows of data",
    f"{ANALYSIS}/landscape.png": "The loss on rows of data, over a plane through the base and merges",
}
"""Its pictures that a card shows, and what they show."""

PICTURES = (HEAT_MAP, LOSSES_PICTURE, SCORES_PICTURE)


def record_card(
    store: Store, arguments: Mapping[str, Any], facts: Mapping[str, Any], spent: Mapping[str, Any] | None
) -> None:
    """Write the card of a merge that is finished, and what it is made of.

    Scores of the same weights that lie in the folder are in it; those and the analysis of an earlier merge are removed.

    Args:
        store: the merged folder.
        arguments: the merge as `merge_config.yaml` records it.
        facts: what the plan knows, as plain values.
        spent: what the run took (`Run.spent`); None where it had nothing to do: then what the earlier one took stays.
    """
    if spent is not None:
        store.remove(ANALYSIS)  # of an earlier merge
    elif (store.folder / RECORD).is_file():
        spent = read_record(store.folder)["facts"].get("spent")
    scores = read_scores(store.folder)
    if scores is None:
        store.remove(SCORES)
    own, known = json.loads(json.dumps([arguments, {**facts, "spent": spent}]))  # as they will be read again
    _write(store, own, known, scores)


def remake_card(folder: Path, scores: Scores | None = None) -> Path:
    """Make the card of a merged folder anew, from what is recorded there.

    Args:
        folder: the merged folder.
        scores: of its weights; None: those that lie in it.

    Returns:
        the card's file.

    Raises:
        InputError: when the folder does not say what its card is made of.
    """
    record = read_record(folder)
    _write(Store(folder), record["arguments"], record["facts"], scores or read_scores(folder))
    return folder / README


def refresh_card(folder: Path, scores: Scores | None = None) -> None:
    """As `remake_card`, but a card that was changed by hand is left as it is, which is said."""
    if is_unchanged(folder):
        remake_card(folder, scores)
    else:
        logger.warning("%s was changed by hand and is left; hf-fda card %s makes it anew", folder / README, folder)


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a folder's card.

    Raises:
        InputError: when there is none, or it is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        raise InputError(f"{folder}: no {RECORD} in it, which a finished merge leaves; run the merge again")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"arguments": dict(record["arguments"]), "facts": dict(record["facts"]), "card": str(record["card"])}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged; run the merge again") from None


def is_unchanged(folder: Path) -> bool:
    """Whether a folder's card is still the one that was made, or there is none."""
    card = folder / README
    return not card.is_file() or _hash(card.read_text(encoding="utf-8")) == read_record(folder)["card"]


def _write(store: Store, arguments: dict[str, Any], facts: dict[str, Any], scores: Scores | None) -> None:
    merged = Merged(store.folder)
    if scores is None or not scores.tasks:
        store.remove(SCORES_PICTURE)
    elif can_draw():
        store.write_plainly(SCORES_PICTURE, lambda path: draw_scores(scores, path))
    pictures = [name for name in PICTURES if (store.folder / name).is_file()]
    seen = {name: words for name, words in SEEN.items() if (store.folder / name).is_file()}
    found = Found(merged.report, merged.coefficients, merged.block_losses, scores, pictures, seen)
    card = model_card(arguments, facts, found)
    store.remove(EVAL_RESULTS)
    for name, text in (eval_results(scores) if scores is not None else {}).items():
        store.write_text(name, text)
    record = {"arguments": arguments, "facts": facts, "card": _hash(card)}
    store.write_text(RECORD, json.dumps(record, indent=1) + "\n")
    store.write_text(README, card)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
