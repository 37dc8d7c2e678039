"""A tokenizer with further tokens, made by the library's own means where it has some.

Tokens that a source added to its tokenizer are added to this one, with the same settings. Ordinary tokens of a
source's own vocabulary become ordinary tokens: of WordPiece and word-level vocabularies as they are, of BPE with the
merges that lead to them, after all merges there are. So text without any new token in it is encoded as before.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from hf_fda.checkpoint.location import Location
from hf_fda.errors import InputError, few
from hf_fda.vocabulary.tokens import CONFIG, Tokens, load_tokenizer

Donor = tuple[Tokens, PreTrainedTokenizerBase]

OF_THE_PLACE = ("is_local", "local_files_only", "name_or_path")
"""What the library writes down about the folder a tokenizer came from."""


@dataclass(frozen=True)
class Extended:
    """A tokenizer with further tokens: its files, and the ids of all of its tokens."""

    files: Mapping[str, bytes]
    ids: Mapping[str, int]


def new_tokens(
    tokenizer: PreTrainedTokenizerBase, donors: Sequence[Donor], more: Iterable[str]
) -> dict[str, AddedToken | None]:
    """The tokens that a tokenizer lacks, in the donors' order and by their ids; with the settings of those that were
    added to a donor, None for its ordinary ones.

    Args:
        tokenizer: what is extended.
        donors: further tokenizers, and the tokens of each that count.
        more: tokens that may be in none of them.
    """
    known = tokenizer.get_vocab()
    found: dict[str, AddedToken | None] = {}
    for tokens, donor in donors:
        added = {own.content: own for own in donor.added_tokens_decoder.values()}
        for token in tokens.ids:
            if token not in known and token not in found:
                found[token] = added.get(token)
    for token in more:
        if token not in known and token not in found:
            found[token] = AddedToken(token, normalized=False)
    return found


def extend(
    tokenizer: PreTrainedTokenizerBase,
    new: Mapping[str, AddedToken | None],
    donors: Sequence[Donor],
    label: str,
    trust_remote_code: bool = False,
) -> Extended:
    """A tokenizer with new tokens after all of its own.

    Args:
        tokenizer: what is extended; it stays as it is.
        new: from `new_tokens`.
        donors: as there.
        label: what to call the tokenizer's model in errors.
        trust_remote_code: run tokenizer code that comes with it.

    Raises:
        InputError: when the tokenizer is of a kind that cannot be extended so.
    """
    ordinary = [token for token, added in new.items() if added is None]
    state = _state(tokenizer)
    if ordinary and state is None:
        raise InputError(
            f"the tokenizer of {label} ({type(tokenizer).__name__}) has another vocabulary than the sources' "
            f"({few(map(repr, ordinary))}) and its kind can only be given added tokens; choose tokenizer='base' or a "
            "source's name"
        )
    uneven = sorted(tokenizer.get_vocab().values()) != list(range(len(tokenizer.get_vocab())))
    with tempfile.TemporaryDirectory(prefix="hf_fda-") as place:
        folder = Path(place)
        longer = copy.deepcopy(tokenizer)
        if state is None or not (ordinary or uneven):
            longer.add_tokens([added for added in new.values() if added is not None])
            longer.save_pretrained(folder)
        else:
            longer.save_pretrained(folder)
            state = _spelled_out(state, tokenizer.get_vocab(), new, donors, label)  # copies lose ids that two share
            (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        _forget_place(folder / CONFIG)
        ids = load_tokenizer(Location("with further tokens", folder=folder), label, trust_remote_code).get_vocab()
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    moved = [token for token, number in tokenizer.get_vocab().items() if ids.get(token) != number]
    lost = [token for token in new if token not in ids]
    if moved or lost:
        raise InputError(
            f"the tokenizer of {label} ({type(tokenizer).__name__}) cannot be given further tokens without changing "
            f"others ({few(moved or lost)}); choose tokenizer='base' or a source's name"
        )
    return Extended(files, ids)


def _state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """What a tokenizer is, as its file says it; None of a kind whose tokens cannot be given any id."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    return state if isinstance(state.get("model", {}).get("vocab"), dict) else None


def _spelled_out(
    state: dict[str, Any],
    ids: Mapping[str, int],
    new: Mapping[str, AddedToken | None],
    donors: Sequence[Donor],
    label: str,
) -> dict[str, Any]:
    """A tokenizer's file with new tokens after its own; all of them stand in its model with their ids, as the library
    would number added tokens anew where ids have gaps, and ordinary ones come after added ones."""
    model = state["model"]
    first = max(ids.values()) + 1
    numbers = {token: first + position for position, token in enumerate(new)}
    every = {**model["vocab"], **ids, **numbers}
    model["vocab"] = dict(sorted(every.items(), key=lambda item: (item[1], item[0])))
    for token, added in new.items():
        if added is not None:
            state["added_tokens"].append({"id": numbers[token], "content": token, **_settings(added)})
    ordinary = {token for token, added in new.items() if added is None}
    for tokens, donor in donors:
        backend = getattr(donor, "backend_tokenizer", None)
        own = {} if backend is None else json.loads(backend.to_str())["model"]
        if own.get("type") != model["type"] and ordinary & tokens.ids.keys():
            raise InputError(
                f"the tokenizers of {label} and {tokens.label} are of different kinds ({model['type']}, "
                f"{own.get('type', type(donor).__name__)}); choose tokenizer='base' or a source's name"
            )
        if model["type"] == "BPE":
            model["merges"].extend(_further_merges(model, own.get("merges", []), ordinary))
    return state


def _further_merges(model: Mapping[str, Any], merges: Iterable[Any], ordinary: set[str]) -> list[list[str]]:
    """The merges of a donor that lead to new tokens, in its order."""
    known = {tuple(_pair(own)) for own in model["merges"]}
    prefix = model.get("continuing_subword_prefix") or ""
    found = []
    for own in merges:
        left, right = _pair(own)
        possible = left in model["vocab"] and right in model["vocab"] and (left, right) not in known
        if possible and left + right.removeprefix(prefix) in ordinary:
            found.append([left, right])
    return found


def _pair(merge: Any) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _settings(added: AddedToken) -> dict[str, bool]:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: getattr(added, name) for name in names}


def _forget_place(config: Path) -> None:
    """Leave out what differs from one run to the next."""
    said = json.loads(config.read_text(encoding="utf-8"))
    kept = {name: value for name, value in said.items() if name not in OF_THE_PLACE}
    config.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
