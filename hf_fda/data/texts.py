"""Texts and pairs of them, by the tokenizer of the model that takes them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_fda.data.columns import Columns
from hf_fda.data.encoding import EncodedRow, Encoder, Taker, next_tokens, text_of
from hf_fda.data.tables import Row

SPECIAL = "special_tokens_mask"


class Tokenizing(Encoder):
    """A tokenizer with a length that nothing exceeds.

    Args:
        tokenizer: the model's.
        taker: the model.
        max_length: the most tokens; the model's own maximum where that is less.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, taker: Taker, max_length: int) -> None:
        self.tokenizer, self.taker = tokenizer, taker
        self.limit = min(max_length, tokenizer.model_max_length, taker.limit or max_length)
        pad = taker.pad(tokenizer.pad_token_id)
        types = tokenizer.pad_token_type_id
        self.padding = {"input_ids": pad, "decoder_input_ids": pad, "token_type_ids": types}

    def encode(self, *texts: Any, **options: Any) -> tuple[dict[str, Any], bool]:
        """A text or a pair as lists by name, cut to the limit, and whether it was cut."""
        call: Any = self.tokenizer
        found = call(*texts, truncation=True, max_length=self.limit, verbose=False, **options)
        size = len(found["input_ids"])
        cut = size >= self.limit and len(call(*texts, verbose=False, **options)["input_ids"]) > size
        return dict(found), cut


class Texts(Tokenizing):
    """Texts or pairs for classifiers, masked language models and models that label tokens.

    Of the latter two all positions count but those of special tokens; masked language models see unmasked text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, taker: Taker, max_length: int, columns: Columns) -> None:
        super().__init__(tokenizer, taker, max_length)
        self.columns = columns

    def __call__(self, row: Row) -> EncodedRow | None:
        """One row."""
        if self.columns.words is not None:
            words = row.get(self.columns.words)
            if not words or not all(isinstance(word, str) for word in words):
                return None
            found, cut = self.encode(list(words), is_split_into_words=True, return_special_tokens_mask=True)
        else:
            texts = text_of(row, self.columns.text)
            if texts is None:
                return None
            found, cut = self.encode(*texts, return_special_tokens_mask=True)
        inputs = self.taker.taken(found)
        if self.taker.form.kind != "tokens":
            return EncodedRow(inputs, cut=cut)
        scored = ~torch.tensor(found[SPECIAL], dtype=torch.bool)
        return EncodedRow(inputs, scored, cut) if scored.any() else None


class Continued(Tokenizing):
    """Plain text, or prompts with what follows on them, for causal language models.

    The logits at a position predict the next token, so those at the last one do not count. Of a prompt and its target
    only the tokens of the target are predicted: all from the first on that the prompt alone does not have.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, taker: Taker, max_length: int, columns: Columns) -> None:
        super().__init__(tokenizer, taker, max_length)
        self.columns = columns
        tokenizer.truncation_side = "right"  # targets are told by how a text begins

    def __call__(self, row: Row) -> EncodedRow | None:
        """One row."""
        columns = self.columns
        if columns.target is None:
            texts = text_of(row, columns.text)
            return None if texts is None else self._counted(*self.encode(texts[0]), 0)
        target = text_of(row, [columns.target])
        prompt = prompt_of(row, columns, "\n")
        if prompt is None or target is None:
            return None
        prompt += "\n" if columns.joint is None else columns.joint
        alone, _ = self.encode(prompt)
        found, cut = self.encode(prompt + target[0])
        return self._counted(found, cut, common(alone["input_ids"], found["input_ids"]))

    def _counted(self, found: dict[str, Any], cut: bool, start: int) -> EncodedRow | None:
        """A row of which the tokens from `start` on are predicted."""
        counted = torch.arange(len(found["input_ids"])) >= start
        scored = next_tokens(counted)
        return EncodedRow(self.taker.taken(found), scored, cut) if scored.any() else None


class Rewritten(Tokenizing):
    """Texts for encoder-decoders, with what is to be written where rows say it.

    The decoder sees the target one position late, behind the token that starts it, and every position counts. Without
    targets there are no `decoder_input_ids`; `with_written_targets` adds them.

    Args:
        tokenizer: the model's.
        taker: the model.
        max_length: the most tokens of either text.
        columns: of the text and the target.
        start: the token that the decoder starts with.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, taker: Taker, max_length: int, columns: Columns, start: int
    ) -> None:
        super().__init__(tokenizer, taker, max_length)
        self.columns, self.start = columns, start

    def __call__(self, row: Row) -> EncodedRow | None:
        """One row."""
        prompt = prompt_of(row, self.columns, "\n")
        if prompt is None:
            return None
        found, cut = self.encode(prompt)
        inputs = self.taker.taken(found)
        if self.columns.target is None:
            return EncodedRow(inputs, cut=cut)
        target = text_of(row, [self.columns.target])
        if target is None:
            return None
        found, cut_too = self.encode(text_target=target[0])
        written = torch.tensor(found["input_ids"])
        inputs["decoder_input_ids"] = torch.cat([written.new_tensor([self.start]), written[:-1]])
        return EncodedRow(inputs, torch.ones(len(written), dtype=torch.bool), cut or cut_too, written)


def prompt_of(row: Row, columns: Columns, between: str) -> str | None:
    """A row's prompt: of its parts the first has to be there."""
    first = text_of(row, columns.prompt[:1])
    if first is None:
        return None
    further = [row.get(name) for name in columns.prompt[1:]]
    return between.join([first[0], *(str(part) for part in further if part and str(part).strip())])


def common(one: list[int], other: list[int]) -> int:
    """How many tokens two texts begin with in common.

    >>> common([1, 2, 3], [1, 2, 4, 5])
    2
    """
    differing = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))
