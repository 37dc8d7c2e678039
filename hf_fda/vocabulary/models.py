"""The models of a merge with their tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hf_fda.adapters import AdapterCheckpoint
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.location import Location
from hf_fda.errors import InputError
from hf_fda.vocabulary.configuration import vocabulary_size
from hf_fda.vocabulary.tokens import Tokens, has_tokenizer, load_tokenizer, same_files, tokens_of


@dataclass(frozen=True)
class Model:
    """A model of the merge with its tokenizer: the base, which is called "base", or a source."""

    name: str
    label: str
    checkpoint: Checkpoint
    location: Location
    tokenizer: PreTrainedTokenizerBase
    tokens: Tokens


def models_of(base: Checkpoint, sources: Sequence[AlignedSource], trust_remote_code: bool) -> list[Model]:
    """Base and sources with their tokenizers, each of which is needed; tokenizers of the same files are loaded once.

    Raises:
        InputError: naming the model whose tokens are not known.
    """
    models: list[Model] = []
    for name, checkpoint in (("base", base), *((source.name, source.checkpoint) for source in sources)):
        label = f"source '{name}'" if models else "the base"
        rows = vocabulary_size(checkpoint.config)
        if rows is None:
            raise InputError(f"{label} ({checkpoint.id}) is no model of one vocabulary; leave tokenizer out")
        location = _place(checkpoint, label, base)
        known = next((own for own in models if same_files(own.location, location)), None)
        tokenizer = load_tokenizer(location, label, trust_remote_code) if known is None else known.tokenizer
        models.append(Model(name, label, checkpoint, location, tokenizer, tokens_of(tokenizer, rows, label)))
    return models


def _place(checkpoint: Checkpoint, label: str, base: Checkpoint) -> Location:
    """Where a model's tokenizer is; an adapter that comes without has the base's."""
    if isinstance(checkpoint, AdapterCheckpoint) and not has_tokenizer(checkpoint.location):
        return require_tokenizer(base, "the base")
    return require_tokenizer(checkpoint, label)


def require_tokenizer(checkpoint: Checkpoint, label: str) -> Location:
    """Where a tokenizer is that is needed.

    Raises:
        InputError: when the model comes without.
    """
    location = checkpoint.location
    if location is None or not has_tokenizer(location):
        raise InputError(
            f"{label} ({checkpoint.id}) has no tokenizer files beside its weights, so its tokens are not known; save "
            "its tokenizer into its folder (tokenizer.save_pretrained) and give the folder"
        )
    return location
