"""The merged model on rows of its tasks, with weights that can be moved: one body in memory under every task's head."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from hf_fda.analysis.forecasts import Forecast, seconds_of
from hf_fda.analysis.losses import TaskLoss, by_answers, by_labels, labelled
from hf_fda.analysis.opened import OpenedMerge
from hf_fda.analysis.walking import Shared
from hf_fda.data.opening import OpenedData, open_data
from hf_fda.data.request import Reading
from hf_fda.data.rows import TaskRows
from hf_fda.devices import release_memory
from hf_fda.divergence.outputs import RecordedOutputs, record
from hf_fda.divergence.task_models import source_model, task_model
from hf_fda.errors import InputError, nearest
from hf_fda.evaluation.candidates import merged_model
from hf_fda.evaluation.labels import label_column, label_reader
from hf_fda.evaluation.preparing import parted

TOP_K = 256
"""Tokens of a large vocabulary that a divergence tells apart at a position; all others are one."""


@dataclass(frozen=True)
class TaskData:
    """The rows of one task, found and checked, not yet read; `label` is the column of what is right, or None."""

    opened: OpenedData
    label: str | None


@dataclass(frozen=True)
class Measuring:
    """The merged weights, and the loss of every task under them."""

    shared: Shared
    losses: Mapping[str, TaskLoss]
    device: torch.device
    batch_size: int

    def __call__(self) -> dict[str, float]:
        """The loss of every task where the weights are now."""
        return {task: loss(self.device, self.batch_size) for task, loss in self.losses.items()}

    @property
    def unit(self) -> str:
        """What is measured, where it is the same for all tasks."""
        units = {loss.unit for loss in self.losses.values()}
        return units.pop() if len(units) == 1 else "loss of each task's own kind"

    def seconds(self) -> float:
        """How long one look at all rows takes, from one batch of each task."""
        total = 0.0
        for loss in self.losses.values():
            rows = min(self.batch_size, len(loss.rows))
            one = seconds_of(lambda loss=loss, rows=rows: loss(self.device, self.batch_size, rows))  # type: ignore[misc]
            total += one * len(loss.rows) / rows
        return total


def open_task_data(opened: OpenedMerge, data: Mapping[str, Any], reading: Reading) -> dict[str, TaskData]:
    """The rows of every task, checked; no more are read than that takes.

    Args:
        opened: the merge.
        data: rows by task, as `hf_fda.evaluate` takes them.
        reading: how they are read.

    Raises:
        InputError: naming the task whose rows cannot be used, or for which neither labels nor a fine-tune are there.
    """
    found = {}
    known = {own.name for own in opened.sources}
    for task, value in data.items():
        if opened.tasks and task not in opened.tasks:
            raise InputError(f"data: the merge has no task '{task}': {nearest(str(task), opened.tasks)}")
        given, label = parted(value, task)
        if label is None and task not in known:
            raise InputError(
                f"data of '{task}': its fine-tune is not at hand, so that answers have nothing to be compared with; "
                "name the column of what is right: {'path': ..., 'label': '...'} (--label TASK=...)"
            )
        adapter = "config.json" not in opened.location.names
        inputs = merged_model(opened.location, task, opened.base.id if adapter else None, opened.trust_remote_code)
        own = open_data({task: given}, inputs, reading)[task]
        if label is not None and own.kind == "tokens":
            raise InputError(
                f"data of '{task}': a label is for classifiers and regressions; of a language model the divergence "
                "from its fine-tune is measured: leave the label out"
            )
        if own.lacks_targets:
            raise InputError(f"data of '{task}': rows do not say what is written on them; name prompt and target")
        found[task] = TaskData(own, label)
    return found


def forecast(opened: OpenedMerge, data: Mapping[str, TaskData], grid: bool) -> Forecast:
    """Memory and disk that measuring takes; the seconds are known once one batch has run.

    Args:
        opened: the merge.
        data: rows by task.
        grid: whether a landscape is measured, for which base and directions lie on the disk.
    """
    largest = 4 * max(prod(opened.base.shape(name)) for name in opened.names)
    fine_tune = 0 if all(own.label for own in data.values()) else opened.nbytes
    return Forecast(0.0, max(opened.nbytes, fine_tune) + 3 * largest, 3 * opened.nbytes if grid else 0)


def prepare(opened: OpenedMerge, data: Mapping[str, TaskData], device: torch.device, batch_size: int) -> Measuring:
    """Read the rows, ask the fine-tunes where there are no labels, then make the merged model.

    Args:
        opened: the merge.
        data: rows by task.
        device: where to compute.
        batch_size: rows at a time.

    Raises:
        InputError: when rows cannot be used.
        RunError: when a fine-tune's answers are not finite.
    """
    aims: dict[str, tuple[TaskRows, Any]] = {}
    for task, own in data.items():
        if own.label is None:
            rows = own.opened.encode()
            aims[task] = rows, _answers(opened, task, rows, device, batch_size)
        else:
            checkpoint = opened.model(task).checkpoint
            column = label_column(own.opened.table, own.opened.kind, own.label)
            reader = label_reader(own.opened.table, own.opened.kind, column, checkpoint.config)
            aims[task] = labelled(own.opened, reader)
    shared = Shared.of(opened.names, opened.merged_tensor, device)
    losses = {}
    for task, (rows, aim) in aims.items():
        model = task_model(opened.model(task), shared.tensors, device)
        losses[task] = by_answers(model, rows, aim) if isinstance(aim, RecordedOutputs) else by_labels(model, rows, aim)
    return Measuring(shared, losses, device, batch_size)


def _answers(opened: OpenedMerge, task: str, rows: TaskRows, device: torch.device, batch_size: int) -> RecordedOutputs:
    """What a task's fine-tune answers; it is in memory meanwhile."""
    source = next(own for own in opened.sources if own.name == task)
    model = source_model(source, device)
    found = record(model, rows, device, batch_size=batch_size, top_k=TOP_K)
    del model
    gc.collect()  # parts of a model may refer to each other
    release_memory()
    return found
