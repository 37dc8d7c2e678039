"""Targets for encoder-decoders whose rows have none: what the source itself writes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_fda.data.opening import fingerprint_of
from hf_fda.data.rows import TaskRows

DECODER = "decoder_input_ids"


@torch.no_grad()
def with_written_targets(model: PreTrainedModel, rows: TaskRows, max_new_tokens: int, batch_size: int = 8) -> TaskRows:
    """Rows with what a model writes on them, greedily.

    Args:
        model: an encoder-decoder with its weights; it stays as it is.
        rows: rows without `decoder_input_ids`, of kind "tokens".
        max_new_tokens: the most tokens it writes for a row.
        batch_size: rows that it writes for at once.

    Returns:
        the same rows with `decoder_input_ids`, of which every position counts: the start, then all that was written but
        for its last token, which is only predicted.
    """
    writer: Any = model
    written: dict[int, Tensor] = {}
    for numbers, batch in rows.batches(batch_size):
        inputs = batch.to(model.device).inputs
        texts = writer.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens).cpu()
        for number, text in zip(numbers, texts, strict=True):
            written[number] = text[: _length(text, writer.generation_config.eos_token_id) - 1]
    inputs_too = [{**own, DECODER: written[number]} for number, own in enumerate(rows.inputs)]
    scored = [torch.ones(len(written[number]), dtype=torch.bool) for number in range(len(rows))]
    fingerprint = fingerprint_of(rows.kind, inputs_too, scored)
    return replace(rows, inputs=inputs_too, scored=scored, fingerprint=fingerprint)


def _length(text: Tensor, ends: int | list[int] | None) -> int:
    """How many tokens a text has with its end; the first one only starts it, even where it is the same token."""
    if ends is None:
        return len(text)
    found = torch.isin(text[1:], torch.tensor(ends)).nonzero().flatten()
    return int(found[0]) + 2 if len(found) else len(text)
