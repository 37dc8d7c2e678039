"""Losses of models that share a body, on rows of their tasks: by what is right, or by what the fine-tunes answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from hf_fda.data.opening import OpenedData, nothing_in
from hf_fda.data.rows import Kind, TaskRows
from hf_fda.data.tables import Row
from hf_fda.divergence.measures import Target, divergence
from hf_fda.divergence.outputs import RecordedOutputs
from hf_fda.divergence.task_models import logits_of

Reader = Callable[[Row, int], Any]
"""What is right for a row, from the row and its number, as `evaluation.labels.label_reader` gives it."""

MEASURED: Mapping[Kind, str] = {
    "labels": "cross entropy (nats)",
    "flags": "binary cross entropy (nats)",
    "values": "mean squared error",
}
"""What is measured of each kind of logits where it is known what is right."""

DIVERGENCE = "Jensen-Shannon divergence from the fine-tune (nats)"
"""What is measured where it is not; of values it is the mean squared error from the fine-tune's."""


@dataclass(frozen=True)
class TaskLoss:
    """The loss of a task's model on its rows.

    `aims` gives, for rows by their numbers, what is right as a tensor or what the fine-tune answers; `unit` names what
    is measured.
    """

    model: PreTrainedModel
    rows: TaskRows
    aims: Callable[[Sequence[int], torch.device], Tensor | Target]
    unit: str

    @torch.no_grad()
    def __call__(self, device: torch.device, batch_size: int, limit: int | None = None) -> float:
        """The mean over rows (of token models over positions).

        Args:
            device: where the model is.
            batch_size: rows at a time.
            limit: only so many of the rows.
        """
        chosen = None if limit is None else list(range(min(limit, len(self.rows))))
        total, count = torch.zeros((), dtype=torch.float64, device=device), 0
        for numbers, batch in self.rows.batches(batch_size, chosen):
            logits = logits_of(self.model, batch.to(device))
            losses = loss_of(self.rows.kind, logits, self.aims(numbers, device))
            total += losses.double().sum()
            count += len(losses)
        return float(total) / count


def loss_of(kind: Kind, logits: Tensor, aim: Tensor | Target) -> Tensor:
    """The loss at each row or position, (n,).

    Args:
        kind: what the logits mean.
        logits: (n, C).
        aim: what is right: of "labels" ids (n,), of "flags" (n, C) of 0 and 1, of "values" (n, C); or what a fine-tune
            answers.
    """
    if isinstance(aim, Target):
        return divergence("jensen-shannon", kind, logits, aim)
    if kind == "labels":
        return functional.cross_entropy(logits.float(), aim, reduction="none")
    if kind == "flags":
        return functional.binary_cross_entropy_with_logits(logits.float(), aim.float(), reduction="none").mean(-1)
    return (logits.float() - aim.reshape(logits.shape)).square().mean(-1)


def by_answers(model: PreTrainedModel, rows: TaskRows, answers: RecordedOutputs) -> TaskLoss:
    """The divergence of a model's answers from a fine-tune's.

    Args:
        model: whose.
        rows: of its task.
        answers: the fine-tune's, on the same rows.
    """
    unit = "mean squared error from the fine-tune" if rows.kind == "values" else DIVERGENCE
    return TaskLoss(model, rows, answers.target, unit)


def by_labels(model: PreTrainedModel, rows: TaskRows, right: Sequence[Any]) -> TaskLoss:
    """A model's loss on rows of which it is known what is right.

    Args:
        model: whose.
        rows: of its task, of any kind but "tokens".
        right: for each row an id, a list of 0 and 1 for each label, or numbers.
    """
    whole = torch.tensor(right)

    def aims(numbers: Sequence[int], device: torch.device) -> Tensor:
        return whole[list(numbers)].to(device)

    return TaskLoss(model, rows, aims, MEASURED[rows.kind])


def labelled(opened: OpenedData, reader: Reader) -> tuple[TaskRows, list[Any]]:
    """Rows with what is right for each.

    Args:
        opened: the rows.
        reader: of what is right.

    Raises:
        InputError: when a row's label cannot be used, or no row has anything in it.
    """
    found = opened.table.sample(opened.given.rows, opened.seed, opened.task)
    pairs = [(opened.encoder(row), reader(row, number)) for number, row in enumerate(found)]
    used = [(row, right) for row, right in pairs if row is not None]
    if not used:
        raise nothing_in(opened.table, len(found))
    rows = TaskRows(opened.task, opened.kind, [row.inputs for row, _ in used], None, opened.encoder.padding, "")
    return rows, [right for _, right in used]
