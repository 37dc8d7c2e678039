"""Scores of a merged model on its tasks, and of the fine-tunes that it was merged from."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hf_fda.card_record import RECORD, refresh_card
from hf_fda.checkpoint.location import Location, locate
from hf_fda.data.request import Reading, check_number
from hf_fda.devices import resolve_device
from hf_fda.errors import InputError, nearest
from hf_fda.evaluation.answers import Asking
from hf_fda.evaluation.candidates import individual_model, merged_model
from hf_fda.evaluation.preparing import Trial, prepare
from hf_fda.evaluation.scores import SCORES, ScoredData, Scores, TaskScores, weights_hash
from hf_fda.evaluation.scoring import score
from hf_fda.merged import Merged
from hf_fda.progress import Progress
from hf_fda.settings import DTYPES
from hf_fda.store import Store


def evaluate(
    merged: Merged | str | os.PathLike[str],
    data: Mapping[str, Any],
    metrics: Any = None,
    *,
    individual: bool = False,
    rows: int | None = None,
    batch_size: int = 16,
    max_length: int = 512,
    max_new_tokens: int = 128,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    seed: int = 0,
    base: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    save: bool = True,
    quiet: bool = False,
) -> Scores:
    """Score a merged model on rows with labels, each task under its own head.

    In a folder that a merge made the scores are kept in `scores.json`, beside those of other tasks, and go into the
    card: as a table, as `model-index` metadata and, of datasets on the Hub, in `.eval_results/`.

    Args:
        merged: a merged model or adapter: what `merge` returned, its folder or its Hub id; or any other model, which is
            scored alone.
        data: rows by task name, as `hf_fda.merge` takes them. A mapping may also name the column of what is right,
            {"path": ..., "label": ...}: the label, the number, or the text to be written. Labels are names that the
            model knows or its numbers of them; of multi-label models lists of these, or one of 0 and 1 for each.
            A model without task heads takes any task names.
        metrics: names ("accuracy", "exact_match", "f1", "mae", "matthews_correlation", "mse", "pearsonr", "perplexity",
            "spearmanr"), folders of metrics, or objects of `evaluate`; one, a list, or either by task. None: accuracy
            of classifiers, F1 where rows have several labels, mean squared error and Pearson's correlation of
            regressions, perplexity of language models, exact match of encoder-decoders.
        individual: score each task's own fine-tune too, one at a time, on the same rows.
        rows: at most so many rows of a task, a sample by `seed`; None: all.
        batch_size: rows at a time.
        max_length: the most tokens of a text; what is longer is cut.
        max_new_tokens: the most tokens that a model writes, where it does.
        device: "auto" (Accelerate's choice) or a torch device.
        dtype: type of the weights while they are scored; "auto": as they are stored.
        seed: of the sample of rows.
        base: of a merged adapter, where its base is now; None: where it was when the adapter was made.
        trust_remote_code: run model code that comes with the checkpoints.
        save: keep the scores in the folder and its card.
        quiet: show no progress.

    Returns:
        the scores of these tasks, and of others that the folder had.

    Raises:
        InputError: naming the task, column, label or metric that cannot be used, and the way out.
        RunError: when a model's answers are no finite numbers, or a metric fails.

    Example:
        >>> scores = evaluate("merged/", {"sst2": "sst2-test.jsonl"}, individual=True)  # doctest: +SKIP
        >>> scores["sst2"].merged["accuracy"]  # doctest: +SKIP
    """
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        check_number(name, value)
    if dtype not in ("auto", *DTYPES):
        raise InputError(f"dtype '{dtype}': {nearest(str(dtype), ['auto', *DTYPES])}")
    if not isinstance(data, Mapping) or hasattr(data, "num_rows") or not data:
        raise InputError("data must be a mapping from task name to its rows, with one task at least")
    location = locate(merged.folder if isinstance(merged, Merged) else merged)
    reading = Reading(rows, max_length, seed, trust_remote_code)
    trials: list[tuple[Trial, Trial | None]] = []
    for task, given in data.items():
        inputs = merged_model(location, task, base, trust_remote_code)
        asked = _of_task(metrics, task, data)
        trial = prepare(inputs, task, given, asked, reading)
        alone = individual_model(location, task, inputs.base, trust_remote_code) if individual else None
        trials.append((trial, None if alone is None else prepare(alone, task, given, asked, reading)))
    on, found = resolve_device(device), {}
    with Progress(sum(_batches(own, batch_size) for pair in trials for own in pair if own is not None), quiet) as bar:

        def scored(own: Trial, what: str) -> tuple[dict[str, float], ScoredData]:
            return score(own, Asking(batch_size, max_new_tokens, on, _teller(bar, f"{own.task}, {what}")), dtype)

        for trial, before in trials:
            after, of = scored(trial, "merged")
            alone_scores = None if before is None else scored(before, "fine-tune alone")[0]
            found[trial.task] = TaskScores(trial.modality, of, after, alone_scores)
    return _kept(location, found, save)


def _teller(bar: Progress, what: str) -> Callable[[], None]:
    """What says that a batch is done and the next one begun."""
    bar.now(what)

    def tell() -> None:
        bar.finish(what)
        bar.now(what)

    return tell


def _batches(trial: Trial, batch_size: int) -> int:
    """How many batches a trial takes, as far as it is known."""
    answers = {metric.answer for metric in trial.metrics}
    return math.ceil((trial.opened.count or 0) / batch_size) * len(answers)


def _of_task(metrics: Any, task: str, data: Mapping[str, Any]) -> Any:
    """The metrics that are asked for of one task."""
    if not isinstance(metrics, Mapping):
        return metrics
    for name in metrics:
        if name not in data:
            raise InputError(f"metrics: there is no data of a task '{name}': {nearest(str(name), data)}")
    return metrics.get(task)


def _kept(location: Location, found: dict[str, TaskScores], save: bool) -> Scores:
    """Scores with those that the folder has, kept there where it is a merge's and that is asked for."""
    folder = location.folder
    if folder is None or RECORD not in location.names:
        return Scores(found)
    earlier = Scores.read(folder / SCORES) if (folder / SCORES).is_file() else None
    scores = Scores(found, weights_hash(folder)).updated(earlier)
    if save:
        Store(folder).write_text(SCORES, scores.text())
        refresh_card(folder, scores)
    return scores
