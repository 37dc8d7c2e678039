"""Scores of a merged model by task and metric, before and after the merge: their file, their table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_fda.checkpoint.hashed import digest
from hf_fda.errors import RunError
from hf_fda.printing import html_table, text_table
from hf_fda.store import key_of

SCORES = "scores.json"
"""The file in a merged folder."""

TITLES = ("task", "metric", "fine-tune alone", "merged", "rows", "data")


@dataclass(frozen=True)
class ScoredData:
    """The rows that a score is of, in words for readers elsewhere.

    `name` is the dataset's id on the Hub, or the name of a file, folder or object; `fingerprint` changes when the rows,
    their labels or how they are encoded does.
    """

    name: str
    on_hub: bool
    rows: int
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    fingerprint: str = ""

    def __str__(self) -> str:
        where = self.name + (f":{self.config}" if self.config else "") + (f", {self.split}" if self.split else "")
        return where + (f" ({self.revision[:7]})" if self.revision else "")


@dataclass(frozen=True)
class TaskScores:
    """Scores on one task, by metric: of the merged model, and of the fine-tune that went into it (None: not scored).

    A score that is not defined on the rows (a correlation with what is the same everywhere) is not a number.
    `modality` is what the model does, by its name on the Hub ("text-classification").
    """

    modality: str
    data: ScoredData
    merged: Mapping[str, float]
    individual: Mapping[str, float] | None = None


@dataclass(frozen=True, repr=False)
class Scores:
    """Scores by task, as a table where they are shown.

    `weights` is a hash of the weights that were scored.
    """

    tasks: Mapping[str, TaskScores] = field(default_factory=dict)
    weights: str = ""

    @property
    def titles(self) -> tuple[str, ...]:
        """The columns of the table."""
        return TITLES

    def __getitem__(self, task: str) -> TaskScores:
        return self.tasks[task]

    def rows(self) -> list[tuple[str, ...]]:
        """A table in words: a row for each task and metric, with the columns of `TITLES`."""
        return [
            (task, name, _cell(own.individual, name), _shown(value), f"{own.data.rows:,}", str(own.data))
            for task, own in self.tasks.items()
            for name, value in own.merged.items()
        ]

    def updated(self, earlier: Scores | None) -> Scores:
        """These and what was known before of the same weights: of other tasks, and of fine-tunes on the same rows."""
        if earlier is None or earlier.weights != self.weights:
            return self
        known = {task: _completed(own, earlier.tasks.get(task)) for task, own in self.tasks.items()}
        return Scores({**earlier.tasks, **known}, self.weights)

    @classmethod
    def read(cls, path: Path) -> Scores:
        """What a file holds.

        Raises:
            RunError: when it is damaged.
        """
        try:
            facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            tasks = {task: _read_task(own) for task, own in facts["tasks"].items()}
            return cls(tasks, facts["weights"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path}: damaged ({error}); remove it and score the model again") from None

    def text(self) -> str:
        """The content of the file."""
        return json.dumps(_without_nan(asdict(self)), indent=1, allow_nan=False) + "\n"

    def __str__(self) -> str:
        return "\n".join(text_table([TITLES, *self.rows()], right=(2, 3, 4)))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table("", self.rows(), TITLES)


def weights_hash(folder: Path) -> str:
    """A hash of all weights of a merged folder: of its body or adapter and of its heads."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("task_heads/*/*.safetensors")])
    return key_of({str(path.relative_to(folder)): digest(path) for path in files})


def read_scores(folder: Path) -> Scores | None:
    """The scores in a merged folder; None where there are none, or they are of other weights."""
    path = folder / SCORES
    if not path.is_file():
        return None
    found = Scores.read(path)
    return found if found.weights == weights_hash(folder) else None


def _completed(own: TaskScores, earlier: TaskScores | None) -> TaskScores:
    """Scores with those of the fine-tune, where only these were found earlier, by the same metrics on the same rows."""
    if earlier is None or own.individual is not None or earlier.individual is None or own.data != earlier.data:
        return own
    known = {name: value for name, value in earlier.individual.items() if name in own.merged}
    return TaskScores(own.modality, own.data, own.merged, known or None)


def _read_task(facts: dict[str, Any]) -> TaskScores:
    merged, individual = (_numbers(facts[name]) for name in ("merged", "individual"))
    return TaskScores(facts["modality"], ScoredData(**facts["data"]), merged or {}, individual)


def _numbers(values: Mapping[str, float | None] | None) -> dict[str, float] | None:
    if values is None:
        return None
    return {name: math.nan if value is None else float(value) for name, value in values.items()}


def _without_nan(value: Any) -> Any:
    """Plain values with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(scores: Mapping[str, float] | None, name: str) -> str:
    return "" if scores is None or name not in scores else _shown(scores[name])


def _shown(value: float) -> str:
    """A score in words.

    >>> _shown(0.123456), _shown(1234.56), _shown(float("nan"))
    ('0.1235', '1235', 'undefined')
    """
    if not math.isfinite(value):
        return "undefined"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"
