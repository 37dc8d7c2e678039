"""Rows in place of data, drawn from what a fine-tune's embeddings show of the text that it was tuned on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_fda.blocks import token_table
from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.checkpoint.interface import Checkpoint, here
from hf_fda.data.encoding import Taker, longest_text
from hf_fda.data.processors import tokenizer_of
from hf_fda.data.request import SYNTHETIC, Given, Reading
from hf_fda.data.tables import TEXT, Row, Table
from hf_fda.errors import InputError, few
from hf_fda.inputs import Inputs
from hf_fda.randomness import random_stream

DRAWN = 128
"""Rows of a task that are drawn where no number is given for that task."""

SHORTEST, USUAL = 4, 64
"""Tokens of a row without special ones: the fewest, and the most where no positions show how long texts were."""

NEGLIGIBLE = 0.05
"""A position or kind of text was not used where it moved less than this fraction of the one that moved most."""

PART = 2**22
"""Entries of an embedding that are read at a time."""


@dataclass(frozen=True)
class Seen:
    """What the embeddings of a fine-tune show of its text.

    In a fine-tune of all weights the embedding of a token moves when the token occurs, and so does that of a position
    or of the second text of a pair; what did not occur stays as the base has it.

    `weights` (tokens,) is how far each token's embedding moved, in proportion to which it is drawn; `longest` is the
    most tokens of a text, and `pairs` says whether there were pairs of texts.
    """

    weights: Tensor
    longest: int
    pairs: bool

    @classmethod
    def assumed(cls, tokenizer: PreTrainedTokenizerBase, limit: int) -> Seen:
        """Of weights that nobody looked at yet: any token, in texts of a usual length."""
        weights = torch.ones(len(tokenizer))
        weights[[own for own in tokenizer.all_special_ids if own < len(weights)]] = 0
        return cls(weights, min(USUAL, limit), False)


def seen_by(
    base: Checkpoint, tokens: str, source: AlignedSource, tokenizer: PreTrainedTokenizerBase, limit: int
) -> Seen:
    """What a source's embeddings show.

    Args:
        base: the base.
        tokens: path of its embedding of tokens.
        source: a fine-tune of it that takes text.
        tokenizer: of its text.
        limit: tokens of a text at most.

    Raises:
        InputError: when the source's token embeddings are the base's.
    """
    model: Any = base.layout.model
    shift = _shift(base, source, tokens)
    if shift is not None:
        shift[len(tokenizer) :] = 0
        shift[[own for own in tokenizer.all_special_ids if own < len(shift)]] = 0
        # tokens that did not occur may have moved a little: with decay, or as an output layer's
        shift = (shift - shift.median()).clamp_min(0)
    if shift is None or not bool(shift.max() > 0):
        raise InputError(
            f"source '{source.name}' ({source.checkpoint.id}): its token embeddings are the base's (they were frozen, "
            "or it is an adapter), so nothing shows what text it was fine-tuned on; give rows of its task "
            f"(data={{'{source.name}': ...}}, --data {source.name}=...), or leave data out: 'fda' needs none"
        )
    positions = longest_text(base.layout)
    longest, pairs = min(USUAL, limit), False
    for path, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or path == tokens:
            continue
        if "type" in path.rpartition(".")[2]:
            pairs = pairs or bool(_used(base, source, path)[1:2].any())
        elif positions is not None and module.num_embeddings >= positions:
            used = int(_used(base, source, path).sum())
            longest = min(limit, used) if used else longest
    return Seen(shift, longest, pairs)


def draw_from(inputs: Inputs, source: AlignedSource, taker: Taker, given: Given, reading: Reading) -> Table:
    """Texts, or pairs of them, of tokens that are drawn one by one; how many is for the reader to say.

    Args:
        inputs: base and sources.
        source: the source whose rows they are to be.
        taker: the source, as what takes the rows.
        given: what a user says of them.
        reading: how rows are read.

    Raises:
        InputError: when the source takes no text, or its embeddings show nothing.
    """
    if taker.form.takes != "text":
        raise InputError(
            f"{taker.label} takes images, and only of text do weights show what they were tuned on; give rows of its "
            f"task (data={{'{source.name}': ...}}, --data {source.name}=...), or leave data out: 'fda' needs none"
        )
    tokenizer = tokenizer_of(inputs, source, reading.trust_remote_code)
    tokens = _tokens(inputs.base)
    _check_rows(inputs.base, tokens, source, tokenizer)
    limits = (given.max_length or reading.max_length, tokenizer.model_max_length, taker.limit)
    limit = min(own for own in limits if own is not None)
    told = not source.may_move(_name(inputs.base, tokens))  # without any weights
    assumed = not (reading.fetch or told or (here(inputs.base) and here(source.checkpoint)))
    seen = Seen.assumed(tokenizer, limit) if assumed else seen_by(inputs.base, tokens, source, tokenizer, limit)
    longest = max(SHORTEST, seen.longest - tokenizer.num_special_tokens_to_add(pair=seen.pairs))

    def read(most: int | None, stream: torch.Generator) -> list[Row]:
        lengths = torch.randint(SHORTEST, longest + 1, (DRAWN if most is None else most,), generator=stream).tolist()
        drawn = torch.multinomial(seen.weights, sum(lengths), replacement=True, generator=stream)
        return [_row(own.tolist(), tokenizer, seen.pairs) for own in drawn.split(lengths)]

    def first() -> Iterator[Row]:
        return iter(read(1, random_stream(reading.seed, "first row", source.name)))

    columns = {"text": TEXT, "text_pair": TEXT} if seen.pairs else {"text": TEXT}
    label = f"synthetic data of '{source.name}'"
    return Table(label, columns, None, first, read, {"path": SYNTHETIC}, assumed=assumed)


def _check_rows(base: Checkpoint, tokens: str, source: AlignedSource, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer of other tokens than those that have an embedding.

    Raises:
        InputError: naming a token and the way out.
    """
    rows, special = base.shape(_name(base, tokens))[0], set(tokenizer.all_special_ids)
    ids = tokenizer.get_vocab()
    beyond = sorted((token for token, own in ids.items() if own >= rows and own not in special), key=ids.__getitem__)
    if beyond:
        raise InputError(
            f"source '{source.name}': its tokenizer has tokens beyond the {rows} rows of the embedding "
            f"({few(map(repr, beyond))}), so it is not the model's; save the model's own into its folder"
        )


def _row(tokens: list[int], tokenizer: PreTrainedTokenizerBase, pair: bool) -> Row:
    parts = [tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]] if pair else [tokens]
    texts = [tokenizer.decode(part) for part in parts]
    return dict(zip(("text", "text_pair"), texts, strict=False))


def _tokens(base: Checkpoint) -> str:
    """The path of the embedding of tokens.

    Raises:
        InputError: when the model has none, or several.
    """
    model = base.layout.model
    table = token_table(model)
    if table is None or _name(base, table[0]) not in base.names:
        raise InputError(f"{type(model).__name__} has no embedding of tokens that could show what text it was tuned on")
    return table[0]


def _name(base: Checkpoint, path: str) -> str:
    """The tensor of the embedding at a path."""
    return base.layout.tied.get(f"{path}.weight", f"{path}.weight")


def _shift(base: Checkpoint, source: AlignedSource, path: str) -> Tensor | None:
    """How far each row of the embedding at a path moved, (rows,); None where the source has the base's."""
    name = _name(base, path)
    if not source.may_move(name):
        return None
    rows, width = base.shape(name)
    step, found = max(1, PART // width), []
    for start in range(0, rows, step):
        part = slice(start * width, min(start + step, rows) * width)
        task = source.task(name, base.read(name, part).float(), part)
        found.append(task.view(-1, width).norm(dim=1))
    return torch.cat(found)


def _used(base: Checkpoint, source: AlignedSource, path: str) -> Tensor:
    """Which rows of the embedding at a path were used, (rows,)."""
    shift = _shift(base, source, path)
    if shift is None or not bool(shift.max() > 0):
        return torch.zeros(0, dtype=torch.bool)
    return shift > NEGLIGIBLE * shift.max()
