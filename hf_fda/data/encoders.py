"""Which encoder the rows of a source need: its form, their columns, its tokenizer or image processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.data.chats import Chats
from hf_fda.data.columns import Columns, find_columns
from hf_fda.data.encoded import AsTheyAre, is_encoded
from hf_fda.data.encoding import Encoder, Taker
from hf_fda.data.forms import form_of
from hf_fda.data.images import Images
from hf_fda.data.processors import image_processor_of, tokenizer_of
from hf_fda.data.request import Given, Reading, is_path
from hf_fda.data.tables import IMAGE, MESSAGES, Table
from hf_fda.data.texts import Continued, Rewritten, Texts
from hf_fda.errors import InputError
from hf_fda.inputs import Inputs
from hf_fda.vocabulary.output import GENERATION

START = "decoder_start_token_id"


@dataclass(frozen=True)
class Chosen:
    """The encoder of one source's rows, what of it has to be said to choose it again, and its tokenizer if it has
    one."""

    encoder: Encoder
    facts: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerBase | None = None


def taker_of(source: AlignedSource, compared: bool = True) -> Taker:
    """What takes the rows of a source.

    Args:
        source: the source.
        compared: whether its outputs are compared on the rows, and not hidden states alone.

    Raises:
        InputError: when its outputs cannot be compared on rows.
    """
    layout, label = source.checkpoint.layout, f"source '{source.name}'"
    return Taker.of(layout, form_of(layout, f"{label} ({source.checkpoint.id})", compared), label)


def choose_encoder(
    inputs: Inputs, source: AlignedSource, taker: Taker, table: Table, given: Given, reading: Reading
) -> Chosen:
    """The encoder of a source's rows.

    Args:
        inputs: base and sources.
        source: the source.
        taker: the source, as `taker_of`.
        table: its rows.
        given: what a user says of them.
        reading: how rows are read.

    Raises:
        InputError: when it is not known which columns to take, or tokenizer or image processor are missing.
    """
    if not given.named and is_encoded(table.columns, taker):
        start = _decoder_start(inputs, source, taker) if taker.form.head == "seq2seq" else None
        return Chosen(AsTheyAre(taker, start), {})
    columns = find_columns(table.columns, taker.form, given, table.label)
    if taker.form.takes == "image":
        processor = image_processor_of(inputs, source, reading.trust_remote_code)
        folder = Path(given.path).expanduser() if is_path(given.path) else Path()
        images = Images(processor, taker, str(columns.image), folder.parent if folder.is_file() else folder)
        return Chosen(images, _said(columns))
    if IMAGE in table.columns.values():
        raise InputError(
            f"{table.label}: its rows have images, and a {taker.layout.model_class.__name__} is run on text alone; "
            "leave the images out (remove_columns), or use a method that needs no data"
        )
    tokenizer = tokenizer_of(inputs, source, reading.trust_remote_code)
    length = reading.max_length if given.max_length is None else given.max_length
    encoder = _of_texts(inputs, source, taker, tokenizer, length, columns, table)
    return Chosen(encoder, {**_said(columns), "max_length": encoder.limit}, tokenizer)


def _of_texts(
    inputs: Inputs,
    source: AlignedSource,
    taker: Taker,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    columns: Columns,
    table: Table,
) -> Texts | Continued | Rewritten | Chats:
    if taker.form.head == "seq2seq":
        return Rewritten(tokenizer, taker, length, columns, _decoder_start(inputs, source, taker))
    if taker.form.head != "causal":
        return Texts(tokenizer, taker, length, columns)
    told = MESSAGES in [table.columns[name] for name in (*columns.prompt, columns.target) if name is not None]
    answered = columns.joint is None and tokenizer.chat_template is not None
    kind = Chats if columns.chat is not None or told or answered else Continued
    return kind(tokenizer, taker, length, columns)


def _said(columns: Columns) -> dict[str, Any]:
    """Columns as a user names them; none where they are found only by their usual names, as a prompt of parts is."""
    if columns.joint is None:
        return {}
    if columns.target is not None:
        return {"prompt": columns.prompt[0], "target": columns.target}
    single = (columns.image, columns.words, columns.chat)
    named = [name for name in (*columns.text, *columns.prompt, *single) if name is not None]
    return {"columns": named}


def _decoder_start(inputs: Inputs, source: AlignedSource, taker: Taker) -> int:
    """The token that an encoder-decoder's decoder starts with.

    Raises:
        InputError: when no file says it.
    """
    said = getattr(source.checkpoint.config, START, None)
    for place in (source.checkpoint.location, inputs.base.location):
        if said is None and place is not None and GENERATION in place.names:
            said = place.json(GENERATION).get(START)
    if said is None:
        raise InputError(
            f"{taker.label}: its configuration has no {START}, so what its decoder starts with is not known; write it "
            "into config.json"
        )
    return int(said)
