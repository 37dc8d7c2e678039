"""Which metrics a task gets: those a user names or gives, or those that are usual for what its model predicts."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_fda.data.forms import Form
from hf_fda.errors import InputError, RunError, nearest
from hf_fda.hub import first_line

Answer = Literal["labels", "flags", "values", "texts", "likelihoods"]
"""What a model is asked for on a row: its label, a yes or no for each label, its value or values, the text that it
writes, or the negative log-likelihood of the text that is right."""

TAKES: Mapping[str, tuple[Answer, ...]] = {
    "accuracy": ("labels", "flags"),
    "exact_match": ("texts",),
    "f1": ("labels", "flags"),
    "mae": ("values",),
    "matthews_correlation": ("labels",),
    "mse": ("values",),
    "pearsonr": ("values",),
    "perplexity": ("likelihoods",),
    "spearmanr": ("values",),
}
"""What the bundled metrics are computed from."""

GIVES: Mapping[str, tuple[Answer, ...]] = {
    "labels": ("labels",),
    "flags": ("flags",),
    "values": ("values",),
    "tokens": ("texts", "likelihoods"),
}
"""What can be asked for, by what a model's logits mean; first what metrics that are not bundled get."""

USUAL: Mapping[str, tuple[str, ...]] = {
    "labels": ("accuracy",),
    "flags": ("f1",),
    "values": ("mse", "pearsonr"),
    "causal": ("perplexity",),
    "seq2seq": ("exact_match",),
}
"""Metrics where none is asked for, by what logits mean, or of models that write text by how they do it."""


@dataclass(frozen=True)
class ChosenMetric:
    """A metric of one task: its name, what it is computed from, and the metric, or None for a bundled one."""

    name: str
    answer: Answer
    module: Any = None

    def compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """The metric's numbers by name; what it gives beside numbers is left out.

        Raises:
            RunError: when it fails.
        """
        with tempfile.TemporaryDirectory(prefix="hf_fda-") as folder:
            metric = self._bundled(folder) if self.module is None else self.module
            try:
                found: Any = metric.compute(predictions=list(predictions), references=list(references))
            except Exception as error:  # anything may go wrong in a user's metric
                raise RunError(f"metric '{self.name}' fails ({first_line(error)})") from error
        numbers = found if isinstance(found, Mapping) else {self.name: found}
        floats = {str(name): _number(value) for name, value in numbers.items()}
        return {name: value for name, value in floats.items() if value is not None}

    def _bundled(self, folder: str) -> Any:
        from hf_fda.evaluation.metrics import BUNDLED

        config = "multilabel" if self.answer == "flags" else None
        return BUNDLED[self.name](config_name=config, keep_in_memory=True, cache_dir=folder)


def choose_metrics(asked: Any, form: Form, label: str) -> list[ChosenMetric]:
    """The metrics of one task.

    Args:
        asked: None, or one or a list of: names of bundled metrics, folders of metrics, objects of `evaluate`.
        form: what the task's model predicts.
        label: what to call the task in errors.

    Raises:
        InputError: when there is no such metric, it is of something else, or the model predicts nothing to score.
    """
    if form.head in ("words", "masked"):
        what = "labels of words" if form.head == "words" else "words that are masked"
        raise InputError(f"{label}: its model predicts {what}, which are not scored; leave the task out")
    if asked is None:
        asked = USUAL[form.head if form.kind == "tokens" else form.kind]
    listed = asked if isinstance(asked, (list, tuple)) else [asked]
    if not listed:
        raise InputError(f"{label}: no metrics; name some, or leave them out for the usual ones")
    chosen = [_choose(item, form, label) for item in listed]
    for metric in chosen:
        if [other.name for other in chosen].count(metric.name) > 1:
            raise InputError(f"{label}: metric '{metric.name}' is asked for twice")
    return chosen


def _choose(asked: Any, form: Form, label: str) -> ChosenMetric:
    possible = GIVES[form.kind]
    if isinstance(asked, str) and asked in TAKES:
        fitting = [answer for answer in TAKES[asked] if answer in possible]
        if not fitting:
            usable = [name for name, answers in TAKES.items() if set(answers) & set(possible)]
            raise InputError(
                f"{label}: metric '{asked}' is computed from {' or '.join(TAKES[asked])}, and its model gives "
                f"{' and '.join(possible)}; use {', '.join(usable)}"
            )
        return ChosenMetric(asked, fitting[0])
    if isinstance(asked, str) or hasattr(asked, "__fspath__"):
        return ChosenMetric(Path(asked).name, possible[0], _from_folder(asked, label))
    if not callable(getattr(asked, "compute", None)):
        raise InputError(
            f"{label}: a metric must be a name ({', '.join(TAKES)}), a folder or an object of evaluate, not "
            f"{type(asked).__name__}"
        )
    return ChosenMetric(str(getattr(asked, "name", type(asked).__name__)), possible[0], asked)


def _from_folder(path: Any, label: str) -> Any:
    """A metric that a user has in a folder."""
    folder = Path(path).expanduser()
    if not folder.exists():
        raise InputError(
            f"{label}: no metric '{path}': {nearest(str(path), TAKES)} Others are given as a folder or an object: "
            f"metrics=evaluate.load('{path}') fetches one from the Hub"
        )
    import evaluate

    try:
        return evaluate.load(str(folder))
    except Exception as error:  # a metric's folder is code
        raise InputError(f"{label}: metric '{path}' cannot be loaded ({first_line(error)})") from None


def _number(value: Any) -> float | None:
    """A value as a plain number; None where it is no single one."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
