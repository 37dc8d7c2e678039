"""Vocabularies of base and sources brought to one: compared, refused where they differ unasked, or mapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.vocabulary.comparison import compare
from hf_fda.vocabulary.configuration import renaming
from hf_fda.vocabulary.models import models_of, require_tokenizer
from hf_fda.vocabulary.output import (
    GENERATION,
    TokenizerFiles,
    choose_template,
    generation_settings,
    output_tokens,
    with_chat_template,
)
from hf_fda.vocabulary.request import VocabularyRequest
from hf_fda.vocabulary.tokens import Tokens
from hf_fda.vocabulary.views import Party, see


@dataclass(frozen=True)
class Vocabulary:
    """What a merge does about vocabularies.

    `files` is the merged model's tokenizer, None where it is the base's as it is; `summary` says which tokens it has,
    `notes` what is done to each model. `changes_base` says whether the output has other tokens or rows than the base,
    and `fingerprint` is a hash of what every row is made of, "" where all are as they were.
    """

    files: TokenizerFiles | None = None
    summary: str | None = None
    notes: tuple[str, ...] = ()
    changes_base: bool = False
    fingerprint: str = ""


@dataclass(frozen=True)
class Aligned:
    """Base and sources with the same tokens in the same rows, and what was done about it."""

    base: Checkpoint
    sources: tuple[AlignedSource, ...]
    vocabulary: Vocabulary


def align_vocabularies(
    base: Checkpoint, sources: Sequence[AlignedSource], request: VocabularyRequest, trust_remote_code: bool = False
) -> Aligned:
    """Let base and sources have the same tokens in the same rows.

    Args:
        base: the base.
        sources: the sources, matched to it by tensor names.
        request: what a user asked for.
        trust_remote_code: run tokenizer code that comes with the checkpoints.

    Raises:
        InputError: when tokens differ and nothing was asked for, or what was asked for cannot be done.
    """
    if request.tokenizer is None:
        return _as_they_are(base, sources, request, trust_remote_code)
    models = models_of(base, sources, trust_remote_code)
    out, files = output_tokens(models, request, trust_remote_code)
    chosen = next((own for own in models if own.name == request.tokenizer), models[0])
    files = _with_template(files, base, sources, request)
    generation = generation_settings(models[0].location, chosen.location, renaming(models[0].tokens, out))
    if generation is not None:
        files = replace(files, written={**files.written, GENERATION: generation})
    preferred = None if chosen is models[0] else chosen.checkpoint.config
    parties = _parties(base, sources, [own.tokens for own in models])
    seen = see(parties, out, request.tokens, preferred, request.with_base)
    whose = {"base": "the base's", "union": "those of base and sources"}
    vocabulary = Vocabulary(
        files=files,
        summary=f"{whose.get(request.tokenizer, f'those of {chosen.label}')}: {len(out.ids)} in {out.rows} rows",
        notes=seen.notes,
        changes_base=(out.ids, out.rows) != (models[0].tokens.ids, models[0].tokens.rows),
        fingerprint=seen.fingerprint,
    )
    return Aligned(seen.checkpoints[0], _seen_sources(sources, seen.checkpoints), vocabulary)


def _as_they_are(
    base: Checkpoint, sources: Sequence[AlignedSource], request: VocabularyRequest, trust_remote_code: bool
) -> Aligned:
    """Nothing was asked for: tokens have to be the same, and padding is brought to the base's."""
    found = compare(base, sources, trust_remote_code)
    files = None
    if request.chat_template is not None:
        files = _with_template(TokenizerFiles(require_tokenizer(base, "the base")), base, sources, request)
    notes = [f"tokens were not compared with the base's: {reason}" for reason in found.unread.values()]
    if not found.padded:
        return Aligned(base, tuple(sources), Vocabulary(files, notes=tuple(notes)))
    assert found.base is not None
    padded = [source for source in sources if source.name in found.padded]
    seen = see(_parties(base, padded, [found.base, *found.padded.values()]), found.base, {})
    views = dict(zip(found.padded, _seen_sources(padded, seen.checkpoints), strict=True))
    notes += [f"{note} (its tokens are the base's; rows that no token uses)" for note in seen.notes]
    vocabulary = Vocabulary(files, notes=tuple(notes), fingerprint=seen.fingerprint)
    return Aligned(base, tuple(views.get(source.name, source) for source in sources), vocabulary)


def _parties(base: Checkpoint, sources: Sequence[AlignedSource], tokens: Sequence[Tokens]) -> list[Party]:
    """The models with names of tensors that are the same in all: the base's, and the sources' own for what it lacks."""
    parties = [Party("base", "the base", base, tokens[0], {name: name for name in base.layout.names})]
    for source, its in zip(sources, tokens[1:], strict=True):
        known = {own: name for name, own in source.tensor_of.items()}
        common = {own: known.get(own, own) for own in source.checkpoint.layout.names}
        parties.append(Party(source.name, f"source '{source.name}'", source.checkpoint, its, common))
    return parties


def _seen_sources(sources: Sequence[AlignedSource], checkpoints: Sequence[Checkpoint]) -> tuple[AlignedSource, ...]:
    return tuple(replace(own, checkpoint=seen) for own, seen in zip(sources, checkpoints[1:], strict=True))


def _with_template(
    files: TokenizerFiles, base: Checkpoint, sources: Sequence[AlignedSource], request: VocabularyRequest
) -> TokenizerFiles:
    """The files with the chat template that was asked for."""
    places = {"base": base.location, **{source.name: source.checkpoint.location for source in sources}}
    template = choose_template(request, places)
    return files if template is None else with_chat_template(files, template)
