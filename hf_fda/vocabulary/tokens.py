"""A checkpoint's tokens and chat template, from the tokenizer files beside its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_fda.checkpoint.location import Location
from hf_fda.errors import InputError

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"

WITH_TOKENS = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Files that say which tokens there are; a checkpoint with one of them has a tokenizer."""

TOKENIZER_FILES = (
    *WITH_TOKENS,
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    TEMPLATE,
    "chat_template.json",
)
"""All files of a tokenizer."""


@dataclass(frozen=True)
class Tokens:
    """The tokens that have a row in one model.

    `label` names the model in messages ("the base", "source 'chat'"), `ids` maps a token to its row, below `rows`.
    """

    label: str
    ids: Mapping[str, int]
    rows: int


def has_tokenizer(location: Location | None) -> bool:
    """Whether a checkpoint comes with a tokenizer."""
    return location is not None and any(name in location.names for name in WITH_TOKENS)


def same_files(one: Location, other: Location) -> bool:
    """Whether two tokenizers are the same by their files; what is only said about them elsewhere does not count."""
    return _facts(one) == _facts(other)


def _facts(location: Location) -> dict[str, Any]:
    names = [name for name in (*WITH_TOKENS, "added_tokens.json", "merges.txt") if name in location.names]
    facts: dict[str, Any] = {name: hashlib.sha256(location.path(name).read_bytes()).hexdigest() for name in names}
    said = _said(location)
    tokens = ("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", "tokenizer_class")
    return facts | {name: value for name, value in said.items() if name.endswith("_token") or name in tokens}


def _said(location: Location) -> dict[str, Any]:
    """A tokenizer's configuration; empty where there is none."""
    said = location.json(CONFIG) if CONFIG in location.names else {}
    if not isinstance(said, dict):
        raise InputError(f"{location.id}: {CONFIG} must be a mapping; fetch or save it again")
    return said


def load_tokenizer(location: Location, label: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Args:
        location: where it is.
        label: what to call the checkpoint in errors.
        trust_remote_code: run tokenizer code that comes with it.

    Raises:
        InputError: when transformers cannot load it.
        UnreachableError: when the Hub does not give its files.
    """
    for name in WITH_TOKENS:
        if name in location.names:
            location.path(name)
    where = str(location.folder or location.repo_id)
    remote = {"revision": location.commit, "subfolder": location.subfolder} if location.folder is None else {}
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **remote)
    except Exception as error:  # the library raises many kinds here, all of which mean the same to a user
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{label} ({location.id}): its tokenizer cannot be loaded ({lines[0]})") from None


def tokens_of(tokenizer: PreTrainedTokenizerBase, rows: int, label: str) -> Tokens:
    """A tokenizer's tokens, by their ids in order; those beyond the model's rows (padding tokens that were added for
    training alone) are none of the model's."""
    ids = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return Tokens(label, {token: number for token, number in ids if number < rows}, rows)


def differences(base: Tokens, source: Tokens, limit: int = 3) -> str | None:
    """The first tokens that are not the same row in both, in words; None where all are.

    >>> differences(Tokens("the base", {"a": 0, "b": 1}, 2), Tokens("source 'x'", {"a": 0, "c": 1}, 2))
    "'b' (1 in the base only), 'c' (1 in source 'x' only)"
    """
    if base.ids == source.ids:
        return None
    found = []
    for token in sorted(base.ids.keys() | source.ids.keys(), key=lambda own: (_first_id(own, base, source), own)):
        mine, theirs = base.ids.get(token), source.ids.get(token)
        if mine == theirs:
            continue
        if mine is None or theirs is None:
            number, where = (theirs, source.label) if mine is None else (mine, base.label)
            found.append(f"'{token}' ({number} in {where} only)")
        else:
            found.append(f"'{token}' ({mine} in {base.label}, {theirs} in {source.label})")
    more = len(found) - limit
    return ", ".join(found[:limit]) + (f" and {more} more" if more > 0 else "")


def _first_id(token: str, base: Tokens, source: Tokens) -> int:
    return min(own.ids[token] for own in (base, source) if token in own.ids)


def chat_template(location: Location | None) -> str | None:
    """The chat template that comes with a checkpoint's tokenizer; of several, the default one."""
    if location is None:
        return None
    if TEMPLATE in location.names:
        return location.path(TEMPLATE).read_text(encoding="utf-8")
    said = _said(location).get("chat_template")
    if isinstance(said, list):
        said = next((own.get("template") for own in said if own.get("name") == "default"), None)
    return said if isinstance(said, str) else None


def without_template(config: str) -> str:
    """The text of a tokenizer's configuration without the chat template in it."""
    said = json.loads(config)
    said.pop("chat_template", None)
    return json.dumps(said, indent=2, ensure_ascii=False) + "\n"
