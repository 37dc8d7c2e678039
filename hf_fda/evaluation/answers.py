"""What a model answers on rows, as metrics take it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_fda.data.encoding import EncodedRow
from hf_fda.data.rows import Kind, TaskRows
from hf_fda.divergence.task_models import logits_of
from hf_fda.errors import InputError, RunError
from hf_fda.evaluation.choice import Answer

DECIDE: Mapping[Kind, Callable[[Tensor], list[Any]]] = {
    "labels": lambda logits: logits.argmax(-1).tolist(),
    "flags": lambda logits: (logits > 0).long().tolist(),
    "values": lambda logits: logits.double().squeeze(-1).tolist(),
}
"""What logits (n, C) of whole rows say: the likeliest label, the labels of probability above one half, the values."""


@dataclass
class Answers:
    """What a model says and what is right, row by row, for one kind of answer."""

    predictions: list[Any] = field(default_factory=list)
    references: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Asking:
    """How a model is asked: `batch_size` rows at once, and for at most `max_new_tokens` that it writes.

    `report` is called when a batch is answered.
    """

    batch_size: int
    max_new_tokens: int
    device: torch.device
    report: Callable[[], None] = lambda: None


class Respondent:
    """A model that answers rows.

    Args:
        model: with its weights, on its device.
        kind: what its logits mean.
        answers: which to ask for.
        asking: how.
        tokenizer: of texts that it writes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kind: Kind,
        answers: Collection[Answer],
        asking: Asking,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.model, self.kind, self.asking, self.tokenizer = model, kind, asking, tokenizer
        self.answers: dict[Answer, Answers] = {answer: Answers() for answer in sorted(answers)}

    @torch.no_grad()
    def respond(self, rows: TaskRows, encoded: Sequence[EncodedRow], references: Sequence[Any]) -> None:
        """Ask for the answers to some rows.

        Args:
            rows: the rows, to be filled up to batches.
            encoded: the same.
            references: what is right for them; of models that write text that is in the rows.
        """
        for answer, found in self.answers.items():
            if answer == "likelihoods":
                said: list[Any] = self._likelihoods(rows, encoded)
                right: Sequence[Any] = [len(own) for own in map(target_tokens, encoded)]
            elif answer == "texts":
                said, right = self._texts(rows, encoded), [self._decoded(target_tokens(row)) for row in encoded]
            else:
                said, right = self._decisions(rows), references
            found.predictions.extend(said)
            found.references.extend(right)

    def _decisions(self, rows: TaskRows) -> list[Any]:
        said: list[Any] = [None] * len(rows)
        for numbers, batch in rows.batches(self.asking.batch_size):
            logits = self._finite(logits_of(self.model, batch.to(self.asking.device)))
            for number, own in zip(numbers, DECIDE[self.kind](logits.cpu()), strict=True):
                said[number] = own
            self.asking.report()
        return said

    def _likelihoods(self, rows: TaskRows, encoded: Sequence[EncodedRow]) -> list[float]:
        """The negative log-likelihood of each row's text, summed over the tokens that count."""
        said = [0.0] * len(rows)
        for numbers, batch in rows.batches(self.asking.batch_size):
            logits = self._finite(logits_of(self.model, batch.to(self.asking.device)))
            targets = [target_tokens(encoded[number]) for number in numbers]
            parts = logits.split([len(own) for own in targets])
            for number, own, part in zip(numbers, targets, parts, strict=True):
                right = part.float().log_softmax(-1).gather(1, own.to(part.device)[:, None])
                said[number] = -float(right.double().sum())
            self.asking.report()
        return said

    def _texts(self, rows: TaskRows, encoded: Sequence[EncodedRow]) -> list[str]:
        """What the model writes on each row, greedily."""
        said = [""] * len(rows)
        writer: Any = self.model
        for numbers, batch in rows.batches(self.asking.batch_size):
            if "decoder_input_ids" in batch.inputs:
                inputs = {name: own for name, own in batch.inputs.items() if name != "decoder_input_ids"}
                start = 1
            else:
                inputs = _filled_up_left([prompt_of(encoded[number]) for number in numbers], rows.padding["input_ids"])
                start = inputs["input_ids"].shape[1]
            written = writer.generate(
                **{name: own.to(self.asking.device) for name, own in inputs.items()},
                do_sample=False,
                num_beams=1,
                max_new_tokens=self.asking.max_new_tokens,
                pad_token_id=rows.padding["input_ids"],
            )
            for number, text in zip(numbers, written[:, start:].cpu(), strict=True):
                said[number] = self._decoded(text)
            self.asking.report()
        return said

    def _decoded(self, tokens: Tensor) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _finite(self, logits: Tensor) -> Tensor:
        if not bool(logits.isfinite().all()):
            raise RunError(
                f"the model's answers are not all finite numbers in {self.model.dtype}; score it in float32, and if "
                "they are not then either, the merge is at fault"
            )
        return logits


def target_tokens(row: EncodedRow) -> Tensor:
    """The tokens (n,) that are right at the positions of a row that count.

    Raises:
        InputError: when an encoder-decoder's row does not say them.
    """
    if row.written is not None:
        return row.written
    if row.scored is None or "decoder_input_ids" in row.inputs:
        raise InputError(
            "rows do not say what is to be written on them; name its column: {'path': ..., 'label': '...'} "
            "(--label TASK=...)"
        )
    return row.inputs["input_ids"][1:][row.scored[:-1]]


def prompt_of(row: EncodedRow) -> Tensor:
    """The tokens of a language model's row on which all others are to be written.

    Raises:
        InputError: when the row is not a prompt and what follows on it.
    """
    scored = row.scored
    first = 0 if scored is None else int(scored.nonzero()[0])
    if scored is None or first == 0 or not bool(scored[first:-1].all()):
        raise InputError(
            "what a model writes is compared with the target of a prompt, and rows are not of these two; name their "
            "columns: {'path': ..., 'columns': ['...'], 'label': '...'} (--columns TASK=... --label TASK=...)"
        )
    return row.inputs["input_ids"][: first + 1]


def _filled_up_left(prompts: Sequence[Tensor], fill: int) -> dict[str, Tensor]:
    """Prompts of one batch, filled up in front: a model goes on writing at the end."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), fill)
    mask = torch.zeros_like(ids)
    for place, prompt in enumerate(prompts):
        ids[place, longest - len(prompt) :] = prompt
        mask[place, longest - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
