"""Whether sources mean by every row the token that the base means, told from the tokenizer files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.errors import InputError
from hf_fda.vocabulary.configuration import vocabulary_axes, vocabulary_size
from hf_fda.vocabulary.tokens import Tokens, differences, has_tokenizer, load_tokenizer, same_files, tokens_of


@dataclass(frozen=True)
class Comparison:
    """The tokens of base and sources where all are the same.

    `base` is None where nothing had to be read. `padded` are the sources whose tokens are the base's, but with
    another number of padding rows; `unread` says by source why its tokenizer was not compared.
    """

    base: Tokens | None
    padded: dict[str, Tokens]
    unread: dict[str, str]


def compare(base: Checkpoint, sources: Sequence[AlignedSource], trust_remote_code: bool) -> Comparison:
    """Compare the sources' tokens with the base's, where both come with a tokenizer.

    Files that are the same are not looked into; models without text or without tokenizers are taken as they are.

    Raises:
        InputError: naming source, tokens and the way out, when a row means different tokens.
    """
    size = vocabulary_size(base.config)
    comparison = Comparison(None, {}, {})
    if size is None or base.location is None or not has_tokenizer(base.location):
        return comparison
    ours: Tokens | None = None
    for source in sources:
        location, rows = source.checkpoint.location, vocabulary_size(source.checkpoint.config)
        if rows is None or location is None or not has_tokenizer(location):
            continue
        if rows == size and same_files(base.location, location):
            continue
        label = f"source '{source.name}'"
        try:
            if ours is None:
                ours = tokens_of(load_tokenizer(base.location, "the base", trust_remote_code), size, "the base")
            theirs = tokens_of(load_tokenizer(location, label, trust_remote_code), rows, label)
        except InputError as error:
            comparison.unread[source.name] = str(error)
            continue
        if theirs.ids == ours.ids:
            if rows != size:
                comparison.padded[source.name] = theirs
        elif rows != size or vocabulary_axes(base.layout):
            raise InputError(_refusal(source, ours, theirs))
    return Comparison(ours, comparison.padded, comparison.unread)


def _refusal(source: AlignedSource, ours: Tokens, theirs: Tokens) -> str:
    sizes = f" (vocabularies of {theirs.rows} and {ours.rows})" if theirs.rows != ours.rows else ""
    return (
        f"source '{source.name}' ({source.checkpoint.id}) has other tokens than the base{sizes}: "
        f"{differences(ours, theirs)}; say which tokens the output shall have: tokenizer='union' (all), 'base', or "
        f"'{source.name}' (--tokenizer)"
    )
