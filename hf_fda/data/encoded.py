"""Rows that are encoded already: taken as they are, without padding and labels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_fda.data.encoding import EncodedRow, Encoder, Taker, next_tokens
from hf_fda.data.tables import IMAGE, TEXT, Row
from hf_fda.errors import InputError

LABELS = ("labels", "label", "label_ids")
DECODER = ("decoder_input_ids", "decoder_attention_mask")
IGNORED = -100
"""The label of positions that do not count, as the library's losses take it."""


def is_encoded(types: Mapping[str, str], taker: Taker) -> bool:
    """Whether a table's rows are what the model's forward takes."""
    main = taker.layout.model.main_input_name
    return types.get(main, TEXT) not in (TEXT, IMAGE)


class AsTheyAre(Encoder):
    """Rows with the model's own arguments. All others are left out, labels too.

    Padding is left out by the attention mask. Of models that predict tokens, those count whose label is not -100;
    without labels all count that are no padding.

    Args:
        taker: the model.
        start: the token that an encoder-decoder's decoder starts with; None of other models.
    """

    def __init__(self, taker: Taker, start: int | None) -> None:
        self.taker, self.start = taker, start
        pad = taker.pad()
        self.padding = {"input_ids": pad, "decoder_input_ids": pad}

    def __call__(self, row: Row) -> EncodedRow | None:
        """One row."""
        arguments = {name: value for name, value in row.items() if name not in LABELS and value is not None}
        inputs = self.taker.taken(arguments)
        main = self.taker.layout.model.main_input_name
        if main not in inputs or not inputs[main].numel():
            return None
        said = row.get(LABELS[0])
        labels = torch.as_tensor(said) if said is not None and self.taker.form.kind == "tokens" else None
        if main == "input_ids":
            inputs, labels = self._without_padding(inputs, labels)
            if not inputs[main].numel():
                return None
            self._check_length(inputs[main])
        if self.taker.form.kind != "tokens":
            return EncodedRow(inputs)
        if self.taker.form.head == "seq2seq":
            return self._rewritten(inputs, labels)
        counted = torch.ones_like(inputs[main], dtype=torch.bool) if labels is None else labels != IGNORED
        scored = next_tokens(counted) if self.taker.form.head == "causal" else counted
        return EncodedRow(inputs, scored) if scored.any() else None

    def _without_padding(
        self, inputs: dict[str, Tensor], labels: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The tensors at the positions that are attended to."""
        size = len(inputs["input_ids"])
        real = inputs.get("attention_mask", torch.ones(size)).bool()
        if inputs["input_ids"].ndim != 1 or real.shape != (size,):
            shape = tuple(inputs["input_ids"].shape)
            raise InputError(f"{self.taker.label}: 'input_ids' of a row must be (tokens,), not {shape}")
        along = {name: own for name, own in inputs.items() if own.shape[:1] == (size,) and name not in DECODER}
        inputs = {**inputs, **{name: tensor[real] for name, tensor in along.items()}}
        inputs.setdefault("attention_mask", torch.ones(int(real.sum()), dtype=torch.long))
        if labels is not None and self.taker.form.head != "seq2seq":
            if labels.shape != (size,):
                raise InputError(f"{self.taker.label}: 'labels' of a row must be ({size},), not {tuple(labels.shape)}")
            labels = labels[real]
        return inputs, labels

    def _check_length(self, ids: Tensor) -> None:
        limit = self.taker.limit
        if limit is not None and len(ids) > limit:
            raise InputError(f"{self.taker.label}: a row has {len(ids)} tokens, and the model takes at most {limit}")

    def _rewritten(self, inputs: dict[str, Tensor], labels: Tensor | None) -> EncodedRow | None:
        """A row of an encoder-decoder: labels are what its decoder writes, one position early."""
        if labels is not None:
            labels = labels[labels != IGNORED]
            if not len(labels):
                return None
            inputs["decoder_input_ids"] = torch.cat([labels.new_tensor([self.start]), labels[:-1]])
        inputs.pop("decoder_attention_mask", None)
        decoder = inputs.get("decoder_input_ids")
        if decoder is None:
            return EncodedRow(inputs)
        real = (decoder != self.padding["decoder_input_ids"]).nonzero().flatten()
        inputs["decoder_input_ids"] = decoder = decoder[: int(real[-1]) + 1 if len(real) else 1]
        written = labels if labels is not None and len(labels) == len(decoder) else None
        return EncodedRow(inputs, torch.ones_like(decoder, dtype=torch.bool), written=written)
