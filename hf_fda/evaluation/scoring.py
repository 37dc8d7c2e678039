"""One model's scores on one task."""

from __future__ import annotations

import gc
import hashlib
import itertools
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from hf_fda.data.encoding import EncodedRow
from hf_fda.data.opening import fingerprint_of, nothing_in, report_rows
from hf_fda.data.rows import TaskRows
from hf_fda.data.tables import Row
from hf_fda.devices import release_memory
from hf_fda.divergence.task_models import source_model
from hf_fda.evaluation.answers import Asking, Respondent
from hf_fda.evaluation.preparing import Trial
from hf_fda.evaluation.scores import ScoredData
from hf_fda.settings import DTYPES

WINDOW = 16
"""Batches of rows that are in memory at once, from which batches of similar lengths are made."""


def score(trial: Trial, asking: Asking, dtype: str) -> tuple[dict[str, float], ScoredData]:
    """Score a model on its task.

    Args:
        trial: which on which.
        asking: how the model is asked.
        dtype: type of its weights by name; "auto": as they are stored.

    Returns:
        the scores by metric, and what they are of.

    Raises:
        InputError: when a row's label cannot be used, or no row has anything in it.
        RunError: when answers are no finite numbers, or a metric fails.
    """
    answers = {metric.answer for metric in trial.metrics}
    respondent = Respondent(_model(trial, asking, dtype), trial.opened.kind, answers, asking, trial.tokenizer)
    data = _ask(trial, respondent)
    scores: dict[str, float] = {}
    for metric in trial.metrics:
        found = respondent.answers[metric.answer]
        for name, value in metric.compute(found.predictions, found.references).items():
            scores[f"{metric.name}/{name}" if name in scores else name] = value
    del respondent
    gc.collect()  # parts of a model may refer to each other
    release_memory()
    return scores, data


def _model(trial: Trial, asking: Asking, dtype: str) -> Any:
    """A trial's model with its weights on its device."""
    checkpoint = trial.source.checkpoint
    stored = (checkpoint.dtype(name) for name in checkpoint.names)
    kind = DTYPES.get(dtype) or next((own for own in stored if own.is_floating_point), torch.float32)
    model: Any = source_model(trial.source, asking.device, kind)
    if trial.writing:
        model.generation_config = GenerationConfig.from_dict(dict(trial.writing))
    return model


def _ask(trial: Trial, respondent: Respondent) -> ScoredData:
    """Ask for the answers to all rows of a trial, some at a time."""
    opened, digest = trial.opened, hashlib.sha256()
    rows = enumerate(opened.table.sample(opened.given.rows, opened.seed, opened.task))
    read, answered, cut = 0, 0, list[int]()
    while window := list(itertools.islice(rows, WINDOW * respondent.asking.batch_size)):
        read += len(window)
        encoded, right = _encoded(trial, window)
        if not encoded:
            continue
        answered += len(encoded)
        cut += [row.length for row in encoded if row.cut]
        inputs = [row.inputs for row in encoded]
        scored = [row.scored for row in encoded if row.scored is not None] or None
        digest.update(f"{fingerprint_of(opened.kind, inputs, scored)} {right}".encode())
        together = TaskRows(opened.task, opened.kind, inputs, scored, opened.encoder.padding, "")
        respondent.respond(together, encoded, right)
    if not answered:
        raise nothing_in(opened.table, read)
    report_rows(opened.table.label, read, answered, cut)
    record = opened.record
    return ScoredData(
        name=str(record["path"]) if opened.on_hub else Path(str(record["path"])).name,
        on_hub=opened.on_hub,
        rows=answered,
        config=record.get("name"),
        split=record.get("split"),
        revision=record.get("revision"),
        fingerprint=digest.hexdigest(),
    )


def _encoded(trial: Trial, window: list[tuple[int, Row]]) -> tuple[list[EncodedRow], list[Any]]:
    """The rows that have something in them, and what is right for them where the rows themselves do not say it."""
    encoded, right = [], []
    for number, row in window:
        own = trial.opened.encoder(row)
        if own is None:
            continue
        encoded.append(own)
        if trial.right is not None:
            right.append(trial.right(row, number))
    return encoded, right
