"""Scores as the Hub reads them: `model-index` in a card's metadata, and files in `.eval_results/`."""

from __future__ import annotations

import math
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from hf_fda.evaluation.scores import Scores, TaskScores

EVAL_RESULTS = ".eval_results"
"""The folder of the newer form, a file for each task."""


def model_index(scores: Scores, name: str) -> list[dict[str, Any]]:
    """The `model-index` of a card: a result for each task and dataset, with all metrics that are defined.

    What the fine-tune alone reached is no score of this model; it stands beside each metric, under "args".

    Args:
        scores: of the merged model.
        name: what to call it.
    """
    indexes = [eval_results_to_model_index(name, _results(task, own)) for task, own in scores.tasks.items()]
    results = [result for index in indexes for result in index[0].get("results", [])]
    return [{"name": name, "results": results}] if results else []


def eval_results(scores: Scores) -> dict[str, str]:
    """The files of `.eval_results/` by their names: for each task on a dataset of the Hub its metrics that are defined.

    Rows that are not on the Hub have no id there, and so no place in this form.
    """
    return {
        f"{EVAL_RESULTS}/{task}.yaml": yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        for task, own in scores.tasks.items()
        if (entries := _entries(own))
    }


def _results(task: str, own: TaskScores) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=own.modality,
            task_name=task,
            dataset_type=own.data.name,
            dataset_name=f"{task} ({own.data.name})",
            dataset_config=own.data.config,
            dataset_split=own.data.split,
            dataset_revision=own.data.revision,
            metric_type=metric,
            metric_value=value,
            metric_name=metric,
            metric_args=_alone(own, metric),
        )
        for metric, value in own.merged.items()
        if math.isfinite(value)
    ]


def _entries(own: TaskScores) -> list[EvalResultEntry]:
    if not own.data.on_hub:
        return []
    return [
        EvalResultEntry(
            dataset_id=own.data.name,
            task_id=own.data.config or "default",
            value=value,
            dataset_revision=own.data.revision,
            notes=_notes(own, metric),
        )
        for metric, value in own.merged.items()
        if math.isfinite(value)
    ]


def _notes(own: TaskScores, metric: str) -> str:
    """What of a score has no field of its own."""
    said = [metric, f"{own.data.rows} rows" + (f" of split {own.data.split}" if own.data.split else "")]
    alone = _alone(own, metric)
    return ", ".join(said) + (f"; fine-tune alone: {alone['individual']:.4g}" if alone else "")


def _alone(own: TaskScores, metric: str) -> dict[str, float] | None:
    value = (own.individual or {}).get(metric, math.nan)
    return {"individual": value} if math.isfinite(value) else None
