"""One model on one task, checked before any is scored: its metrics, its rows, and what is right for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.data.encoders import taker_of
from hf_fda.data.encoding import EncodedRow
from hf_fda.data.forms import Form
from hf_fda.data.opening import TRIED, OpenedData, open_data
from hf_fda.data.processors import tokenizer_of
from hf_fda.data.request import Reading
from hf_fda.data.tables import Row
from hf_fda.errors import InputError
from hf_fda.evaluation.answers import prompt_of, target_tokens
from hf_fda.evaluation.candidates import generation_settings
from hf_fda.evaluation.choice import ChosenMetric, choose_metrics
from hf_fda.evaluation.labels import label_column, label_reader
from hf_fda.inputs import Inputs

MODALITIES: Mapping[str, str] = {
    "classes": "text-classification",
    "causal": "text-generation",
    "seq2seq": "text2text-generation",
}
"""What models of text do, by its name on the Hub."""


@dataclass(frozen=True)
class Trial:
    """A model that is to be scored on a task.

    `right` gives what is right for a row, by the row and its number; None where the model's own rows hold it. `writing`
    are the settings by which the model writes, `tokenizer` reads what it wrote, where texts are asked for.
    """

    task: str
    source: AlignedSource
    form: Form
    metrics: tuple[ChosenMetric, ...]
    opened: OpenedData
    right: Callable[[Row, int], Any] | None
    writing: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def modality(self) -> str:
        """What the model does, by its name on the Hub."""
        return "image-classification" if self.form.takes == "image" else MODALITIES[self.form.head]


def prepare(inputs: Inputs, task: str, data: Any, metrics: Any, reading: Reading) -> Trial:
    """Check that a model can be scored on a task.

    Args:
        inputs: with the model as their only source.
        task: its name.
        data: the task's rows, as `open_data` takes them; a mapping may also name the column of what is right, "label".
        metrics: as `choose_metrics` takes them.
        reading: how rows are read.

    Raises:
        InputError: naming what cannot be used.
    """
    (source,) = inputs.weighted
    taker = taker_of(source)
    chosen = choose_metrics(metrics, taker.form, f"task '{task}'")
    given, label = parted(data, task)
    if label is not None and taker.form.kind == "tokens":
        given["target"] = label
    opened = open_data({task: given}, inputs, reading)[task]
    asked = {metric.answer for metric in chosen}
    right = None
    if taker.form.kind == "tokens":
        _check_targets(opened, "texts" in asked and taker.form.head == "causal")
    else:
        column = label_column(opened.table, opened.kind, label, opened.record.get("columns", ()))
        right = label_reader(opened.table, opened.kind, column, source.checkpoint.config)
        right(next(iter(opened.table.first())), 0)
    tokenizer = tokenizer_of(inputs, source, reading.trust_remote_code) if "texts" in asked else None
    writing = generation_settings(inputs) if "texts" in asked else {}
    return Trial(task, source, taker.form, tuple(chosen), opened, right, writing, tokenizer)


def parted(data: Any, task: str) -> tuple[dict[str, Any], str | None]:
    """What is said of rows, and of the column that says what is right."""
    if not isinstance(data, Mapping) or hasattr(data, "num_rows"):
        return {"path": data}, None
    label = data.get("label")
    if not isinstance(label, (str, type(None))):
        raise InputError(f"data of '{task}': label must name one column, not {label!r}")
    return {name: value for name, value in data.items() if name != "label"}, label


def _check_targets(opened: OpenedData, prompted: bool) -> None:
    """Refuse rows whose first one does not say what is to be written, or on which prompt."""
    encoded = map(opened.encoder, itertools.islice(opened.table.first(), TRIED))
    first: EncodedRow = next(row for row in encoded if row is not None)
    try:
        target_tokens(first)
        if prompted:
            prompt_of(first)
    except InputError as error:
        raise InputError(f"{opened.table.label}: {error}") from None
