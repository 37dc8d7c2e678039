"""Tokenizers and image processors: each source's rows are encoded by its own, as it was trained with them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, PreTrainedTokenizerBase

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.location import Location
from hf_fda.errors import InputError
from hf_fda.hub import first_line
from hf_fda.inputs import Inputs
from hf_fda.vocabulary.configuration import vocabulary_size
from hf_fda.vocabulary.output import TokenizerFiles
from hf_fda.vocabulary.tokens import (
    TEMPLATE,
    Tokens,
    chat_template,
    differences,
    has_tokenizer,
    load_tokenizer,
    tokens_of,
)

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def tokenizer_of(inputs: Inputs, source: AlignedSource, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a source's rows.

    Where an output vocabulary was asked for, all models have its tokens, and its tokenizer encodes for all; else it is
    the source's own, or the base's where it comes without. Conversations are written as the source was trained with
    them; the output's chat template is for sources without one.

    Args:
        inputs: base and sources.
        source: the source.
        trust_remote_code: run tokenizer code that comes with it.

    Raises:
        InputError: when there is none, or it cannot be loaded.
    """
    label = f"source '{source.name}'"
    files, own = inputs.vocabulary.files, source.checkpoint.location
    if files is not None and "tokenizer" in inputs.asked:
        tokenizer = _from_files(files, trust_remote_code)
    else:
        places = [place for place in (own, inputs.base.location) if place is not None and has_tokenizer(place)]
        if not places:
            raise InputError(
                f"{label} ({source.checkpoint.id}): neither it nor the base has tokenizer files beside its weights, so "
                "its rows cannot be encoded; save its tokenizer into its folder (tokenizer.save_pretrained), or give "
                "rows that are encoded already (columns 'input_ids' and 'attention_mask')"
            )
        tokenizer = load_tokenizer(places[0], label, trust_remote_code)
    template = chat_template(own)
    if template is None and files is not None and TEMPLATE in files.names:
        template = files.content(TEMPLATE).decode()
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _from_files(files: TokenizerFiles, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    with tempfile.TemporaryDirectory(prefix="hf_fda-") as place:
        for name in files.names:
            Path(place, name).write_bytes(files.content(name))
        return load_tokenizer(Location("its files", folder=Path(place)), "the output's vocabulary", trust_remote_code)


def check_tokens(inputs: Inputs, tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> None:
    """Refuse sources that mean different tokens by one row of the embedding that they share.

    Sources were compared with the base where it comes with a tokenizer; here they are compared with each other.

    Args:
        inputs: base and sources.
        tokenizers: by task name.

    Raises:
        InputError: naming both sources, the tokens and the way out.
    """
    first: Tokens | None = None
    for source in inputs.weighted:
        rows = vocabulary_size(source.checkpoint.config)
        if source.name not in tokenizers or rows is None:
            continue
        own = tokens_of(tokenizers[source.name], rows, f"source '{source.name}'")
        first = first or own
        differing = differences(first, own)
        if differing is not None:
            raise InputError(
                f"{own.label} has other tokens than {first.label}: {differing}; one merged embedding cannot serve "
                "both: save the base's tokenizer into its folder and say which tokens the output shall have "
                "(tokenizer='union', 'base' or a source's name)"
            )


def image_processor_of(inputs: Inputs, source: AlignedSource, trust_remote_code: bool) -> Any:
    """The image processor of a source's rows: its own, or the base's where it comes without.

    Raises:
        InputError: when there is none, or it cannot be loaded.
    """
    label = f"source '{source.name}' ({source.checkpoint.id})"
    for place in (source.checkpoint.location, inputs.base.location):
        if place is None or not any(name in place.names for name in PROCESSOR_FILES):
            continue
        remote = {"revision": place.commit, "subfolder": place.subfolder} if place.folder is None else {}
        where = str(place.folder or place.repo_id)
        try:
            return AutoImageProcessor.from_pretrained(where, trust_remote_code=trust_remote_code, **remote)
        except Exception as error:  # the library raises many kinds here, all of which mean the same to a user
            raise InputError(f"{label}: its image processor cannot be loaded ({first_line(error)})") from None
    raise InputError(
        f"{label}: neither it nor the base has a {PROCESSOR_FILES[0]} beside its weights, so its images cannot be "
        "encoded; save its image processor into its folder (processor.save_pretrained), or give rows that are encoded "
        "already (column 'pixel_values')"
    )
