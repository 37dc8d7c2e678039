"""The merged model's tokenizer: which tokens it has in which rows, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hf_fda.checkpoint.location import Location
from hf_fda.errors import InputError, few
from hf_fda.vocabulary.configuration import TOKEN_IDS, Rename, renamed
from hf_fda.vocabulary.extension import extend, new_tokens
from hf_fda.vocabulary.models import Model
from hf_fda.vocabulary.request import VocabularyRequest
from hf_fda.vocabulary.tokens import (
    CONFIG,
    TEMPLATE,
    TOKENIZER_FILES,
    Tokens,
    chat_template,
    without_template,
)

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of a tokenizer: those of `location`, but for `written`, which are there in these words."""

    location: Location | None
    written: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The files by name."""
        copied = [] if self.location is None else [name for name in TOKENIZER_FILES if name in self.location.names]
        return tuple(dict.fromkeys([*copied, *self.written]))

    def content(self, name: str) -> bytes:
        """One file's content."""
        if name in self.written:
            return self.written[name]
        assert self.location is not None
        return self.location.path(name).read_bytes()


def output_tokens(
    models: Sequence[Model], request: VocabularyRequest, trust_remote_code: bool
) -> tuple[Tokens, TokenizerFiles]:
    """The merged model's tokens in their rows, and its tokenizer.

    Args:
        models: the base, then the sources.
        request: what a user asked for.
        trust_remote_code: run tokenizer code that comes with the checkpoints.

    Raises:
        InputError: when a tokenizer cannot be given the tokens it needs.
    """
    base, *sources = models
    chosen = next((own for own in sources if own.name == request.tokenizer), base)
    donors = [(own.tokens, own.tokenizer) for own in sources] if request.tokenizer == "union" else []
    new = new_tokens(chosen.tokenizer, donors, request.tokens)
    if new:
        extended = extend(chosen.tokenizer, new, donors, chosen.label, trust_remote_code)
        ids, files = extended.ids, TokenizerFiles(None, extended.files)
    else:
        ids, files = chosen.tokenizer.get_vocab(), TokenizerFiles(chosen.location)
    count = max(ids.values()) + 1
    multiple = request.pad_to_multiple_of
    if multiple is not None:
        rows = -(-count // multiple) * multiple
    else:
        rows = max(chosen.tokens.rows, count) if new else chosen.tokens.rows
    ordered = sorted(ids.items(), key=lambda item: (item[1], item[0]))
    return Tokens("the output", {token: number for token, number in ordered if number < rows}, rows), files


def with_chat_template(files: TokenizerFiles, template: str) -> TokenizerFiles:
    """A tokenizer's files with a chat template in place of their own."""
    written = {**files.written, TEMPLATE: template.encode()}
    if CONFIG in files.names:
        written[CONFIG] = without_template(files.content(CONFIG).decode()).encode()
    return TokenizerFiles(files.location, written)


def choose_template(request: VocabularyRequest, locations: Mapping[str, Location | None]) -> str | None:
    """The chat template that a user asked for; None where that is the one of the chosen tokenizer.

    Args:
        request: what a user asked for; "auto" is the template that most of the sources have (of several, the first
            source's), or the base's where no source has one.
        locations: of base ("base") and sources, by name.

    Raises:
        InputError: when the named model has none.
    """
    wanted = request.chat_template
    if wanted is None:
        return None
    if wanted == "auto":
        found = [chat_template(location) for name, location in locations.items() if name != "base"]
        known = [template for template in found if template is not None]
        return max(known, key=known.count) if known else chat_template(locations["base"])
    if wanted not in locations:
        return wanted
    template = chat_template(locations[wanted])
    if template is None:
        having = [f"'{name}'" for name, location in locations.items() if chat_template(location) is not None]
        raise InputError(f"chat_template: '{wanted}' has none; models with one: {few(having) if having else 'none'}")
    return template


def generation_settings(base: Location, chosen: Location, rename: Rename) -> bytes | None:
    """The generation configuration that goes with the output's tokens, where it is not the base's own file.

    Args:
        base: the base.
        chosen: the model whose tokenizer the output has.
        rename: from the base's ids to the output's.

    Returns:
        the file of the chosen model; where it has none, the base's with the same tokens by their new ids.
    """
    if chosen is base:
        return None
    if GENERATION in chosen.names:
        return chosen.path(GENERATION).read_bytes()
    if GENERATION not in base.names:
        return None
    said = base.json(GENERATION)
    settings = {name: renamed(value, rename) if TOKEN_IDS.fullmatch(name) else value for name, value in said.items()}
    return (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()
