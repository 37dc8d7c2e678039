"""What a user asks of the merged model's vocabulary, checked before anything is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_fda.errors import InputError, nearest


@dataclass(frozen=True)
class TokenRule:
    """Where the row of one token comes from, for the models that lack it; for all of them with `force`.

    `model` is "base" or a source's name, None for a row of zeros; its row is that of `token`, or row `token_id`.
    """

    model: str | None
    token: str
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class VocabularyRequest:
    """The output's vocabulary as asked for.

    `tokenizer` is None (all must have the same), "base", "union" or a source's name; `tokens` are rules by token;
    `chat_template` None (what comes with the tokenizer), "auto", "base", a source's name, or the template itself;
    `pad_to_multiple_of` makes the number of rows the least such multiple that holds all tokens. `with_base` says
    whether the base is one, or gives shapes and a tokenizer to a merge without a base.
    """

    tokenizer: str | None
    tokens: Mapping[str, TokenRule]
    chat_template: str | None
    pad_to_multiple_of: int | None
    with_base: bool = True

    @property
    def models(self) -> set[str]:
        """The names of models that it may mention."""
        named = (self.tokenizer, self.chat_template, *(rule.model for rule in self.tokens.values()))
        return {name for name in named if name is not None}


RESERVED = ("base", "union", "auto")
"""Words that a source cannot be called where it is spoken of by name."""


def check_request(
    tokenizer: Any, tokens: Any, chat_template: Any, pad_to_multiple_of: Any, sources: Sequence[str]
) -> VocabularyRequest:
    """The request of plain values.

    Args:
        tokenizer: None, "base", "union" or a source's name.
        tokens: None, or by token a mapping with `source` (a model's name, {"kind": "zero"}, or {"kind": "model_token",
            "model": name, and "token": text or "token_id": number}) and `force`.
        chat_template: None, "auto", "base", a source's name or a template.
        pad_to_multiple_of: None or a whole number.
        sources: names of the sources.

    Raises:
        InputError: naming the argument, the token or the source.
    """
    named = [name for name in sources if name in RESERVED]
    if named and (tokenizer is not None or chat_template is not None):
        raise InputError(f"source '{named[0]}': here the word means something else; give the source another name")
    if tokenizer is not None and tokenizer not in ("base", "union", *sources):
        raise InputError(f"tokenizer '{tokenizer}': {nearest(str(tokenizer), ['base', 'union', *sources])}")
    for name, value in (("tokens", tokens), ("pad_to_multiple_of", pad_to_multiple_of)):
        if tokenizer is None and value:
            raise InputError(f"{name} is of an output vocabulary; say which: tokenizer='base', 'union' or a source")
    whole = isinstance(pad_to_multiple_of, int) and not isinstance(pad_to_multiple_of, bool)
    if pad_to_multiple_of is not None and (not whole or pad_to_multiple_of < 1):
        raise InputError(f"pad_to_multiple_of must be a whole number, at least 1, not {pad_to_multiple_of!r}")
    if tokens is not None and not isinstance(tokens, Mapping):
        raise InputError(f"tokens must be a mapping from token to its rule, not {type(tokens).__name__}")
    rules = {str(token): _rule(str(token), rule, ("base", *sources)) for token, rule in (tokens or {}).items()}
    _check_template(chat_template, sources)
    return VocabularyRequest(tokenizer, rules, chat_template, pad_to_multiple_of)


def _check_template(template: Any, sources: Sequence[str]) -> None:
    if template is None or template in ("auto", "base", *sources):
        return
    if not isinstance(template, str) or "{" not in template:
        known = ["auto", "base", *sources]
        raise InputError(
            f"chat_template {template!r} is neither a template nor a name: {nearest(str(template), known)}"
        )


def _rule(token: str, rule: Any, models: Sequence[str]) -> TokenRule:
    if not isinstance(rule, Mapping) or not set(rule) <= {"source", "force"} or rule.get("source") is None:
        raise InputError(f"tokens: '{token}' needs a mapping with source, and force if wanted, not {rule!r}")
    source, force = rule["source"], rule.get("force", False)
    if not isinstance(force, bool):
        raise InputError(f"tokens: force of '{token}' must be true or false, not {force!r}")
    if isinstance(source, str):
        return TokenRule(_model(token, source, models), token, force=force)
    if not isinstance(source, Mapping) or source.get("kind") not in ("zero", "model_token"):
        raise InputError(
            f"tokens: source of '{token}' must be a model's name, {{kind: zero}} or {{kind: model_token, model: ..., "
            f"token: ...}}, not {source!r}"
        )
    if source["kind"] == "zero":
        if set(source) != {"kind"}:
            raise InputError(f"tokens: source of '{token}' is zero and takes nothing else, not {source!r}")
        return TokenRule(None, token, force=force)
    return _model_token(token, source, force, models)


def _model_token(token: str, source: Mapping[str, Any], force: bool, models: Sequence[str]) -> TokenRule:
    strange = set(source) - {"kind", "model", "token", "token_id"}
    text, number = source.get("token"), source.get("token_id")
    if strange or "model" not in source or (text is None) == (number is None):
        raise InputError(f"tokens: source of '{token}' needs model, and either token or token_id, not {source!r}")
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 0):
        raise InputError(f"tokens: token_id of '{token}' must be a whole number, at least 0, not {number!r}")
    return TokenRule(_model(token, source["model"], models), str(text), number, force)


def _model(token: str, name: Any, models: Sequence[str]) -> str:
    if name not in models:
        raise InputError(f"tokens: source of '{token}' is no model of this merge: {nearest(str(name), models)}")
    return str(name)
