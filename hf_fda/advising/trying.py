"""Trying a short list: each candidate is merged, scored on held-out rows with labels, and ranked by that."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_fda.advising.advice import Recommendation, Tried
from hf_fda.advising.candidates import Candidate
from hf_fda.card_record import read_record
from hf_fda.data.request import Reading
from hf_fda.engine import run
from hf_fda.errors import InputError, few, nearest
from hf_fda.evaluation.answers import Asking
from hf_fda.evaluation.evaluating import evaluate
from hf_fda.evaluation.preparing import Trial, prepare
from hf_fda.evaluation.scores import ScoredData
from hf_fda.evaluation.scoring import score
from hf_fda.inputs import Inputs
from hf_fda.merged import Merged
from hf_fda.progress import logger
from hf_fda.spending import forget_peak
from hf_fda.store import WORK

LOWER_IS_BETTER = ("mae", "mse", "perplexity")
"""Metrics of which less is better; of all others more is."""

BATCH, NEW_TOKENS = 16, 128
"""Rows at a time, and the most tokens that a model writes, where fine-tunes are scored: as `hf_fda.evaluate`."""


@dataclass(frozen=True)
class Held:
    """The held-out rows, checked: what is given for each task, each fine-tune's trial on them, and what they are
    scored by."""

    data: Mapping[str, Any]
    metrics: Any
    trials: Mapping[str, Trial]

    @property
    def named(self) -> dict[str, str]:
        """The metric that each task is ranked by."""
        return {task: trial.metrics[0].name for task, trial in self.trials.items()}

    @property
    def summary(self) -> str:
        """The metrics in words, and how they make one score."""
        names = sorted(set(self.named.values()))
        if len(names) > 1:
            return f"{', '.join(names)}; score: share of the other merges that are beaten, mean over tasks"
        if names[0] == "perplexity":
            return "perplexity; score: minus its logarithm, mean over tasks"
        return f"{names[0]}; score: {'minus the ' if names[0] in LOWER_IS_BETTER else ''}mean over tasks"


def check_held(inputs: Inputs, data: Any, metrics: Any, reading: Reading) -> Held:
    """Check held-out rows on the fine-tunes themselves, before any work.

    Args:
        inputs: base and sources.
        data: rows with labels of every source's task, as `hf_fda.evaluate` takes them.
        metrics: as `hf_fda.evaluate` takes them; candidates are ranked by each task's first.
        reading: how rows are read.

    Raises:
        InputError: naming the task, column, label or metric that cannot be used.
    """
    if not isinstance(data, Mapping) or hasattr(data, "num_rows") or not data:
        raise InputError("try_data must be a mapping from task name to its held-out rows with labels")
    names = [source.name for source in inputs.sources]
    for task in data:
        if task not in names:
            raise InputError(f"try_data: there is no source '{task}': {nearest(str(task), names)}")
    if isinstance(metrics, Mapping):
        for task in metrics:
            if task not in names:
                raise InputError(f"metrics: there is no source '{task}': {nearest(str(task), names)}")
    lacking = [name for name in names if name not in data]
    if lacking:
        raise InputError(
            f"try_data has no rows of {few(map(repr, lacking), 5)}; a choice by the others' would forget it: "
            f"try_data={{'{lacking[0]}': ...}} (--try {lacking[0]}=...)"
        )
    trials = {}
    for source in inputs.sources:
        if source.weights is None:
            raise InputError(f"source '{source.name}' is anchors only; rows can only be tried where all have weights")
        own = replace(inputs, sources=(source,))
        asked = metrics.get(source.name) if isinstance(metrics, Mapping) else metrics
        trials[source.name] = prepare(own, source.name, data[source.name], asked, reading)
    return Held(data, metrics, trials)


def try_out(
    found: Sequence[Candidate], held: Held, reading: Reading, quiet: bool
) -> tuple[list[Recommendation], dict[str, float]]:
    """Merge and score candidates, one after the other. What an earlier run finished is not done again.

    Args:
        found: the short list.
        held: rows to score them on.
        reading: how rows are read.
        quiet: show no progress.

    Returns:
        the recommendations, best first, and what the fine-tunes alone do.

    Raises:
        RunError: when a merge or a metric fails; the same call goes on from there.
    """
    (found[0].plan.output.parent / WORK).mkdir(parents=True, exist_ok=True)  # marks the folder as work of ours
    alone, rows = _fine_tunes(held, found[0].plan.device)
    tried: list[Tried] = []
    for number, one in enumerate(found, 1):
        if not quiet:
            logger.info("trying %d of %d: %s", number, len(found), one.recommendation.label)
        tried.append(_tried(one, held, rows, reading, quiet))
    by_task = [{task: _upwards(held.named[task], own.scores[task]) for task in held.trials} for own in tried]
    ranked = [
        replace(one.recommendation, tried=replace(own, score=value))
        for one, own, value in zip(found, tried, totals(by_task, len(set(held.named.values())) == 1), strict=True)
    ]
    ranked.sort(key=lambda one: -math.inf if one.tried is None else one.tried.score, reverse=True)
    return ranked, alone


def totals(scores: Sequence[Mapping[str, float]], alike: bool) -> list[float]:
    """One score a candidate from those by task, of which more is better.

    >>> totals([{"a": 0.5, "b": 7.0}, {"a": 0.4, "b": 9.0}], alike=False)
    [0.5, 0.5]

    Args:
        scores: of each candidate, by task; what is no number counts as worst.
        alike: whether all tasks have one metric, and their scores a mean; else it is the share of the other candidates
            that one beats, on the mean over tasks (half of those it equals).
    """
    known = [{task: -math.inf if math.isnan(value) else value for task, value in own.items()} for own in scores]
    if alike:
        return [statistics.fmean(own.values()) for own in known]
    others = max(1, len(known) - 1)

    def beaten(own: Mapping[str, float], task: str) -> float:
        return sum((own[task] > one[task]) + (own[task] == one[task]) / 2 for one in known if one is not own) / others

    return [statistics.fmean(beaten(own, task) for task in own) for own in known]


def _upwards(metric: str, value: float) -> float:
    """A score of which more is better; of perplexities the logarithm, whose mean no single task rules."""
    if metric == "perplexity":
        return -math.log(value) if value > 0 else math.nan
    return -value if metric in LOWER_IS_BETTER else value


def _fine_tunes(held: Held, device: torch.device) -> tuple[dict[str, float], dict[str, ScoredData]]:
    """What the fine-tunes do alone, and what rows these are."""
    scores, rows = {}, {}
    asking = Asking(BATCH, NEW_TOKENS, device, lambda: None)
    for task, trial in held.trials.items():
        found, rows[task] = score(trial, asking, "auto")
        scores[task] = next(iter(found.values()))
    return scores, rows


def _tried(one: Candidate, held: Held, rows: Mapping[str, ScoredData], reading: Reading, quiet: bool) -> Tried:
    """Merge and score a candidate, as far as that was not done before."""
    forget_peak()
    merged = Merged(run(one.plan, quiet))
    known = merged.scores
    lacking = [
        task
        for task, name in held.named.items()
        if known is None or task not in known.tasks or known[task].data != rows[task] or name not in known[task].merged
    ]
    if lacking:
        known = evaluate(
            merged,
            {task: held.data[task] for task in lacking},
            {task: held.metrics[task] for task in lacking if task in held.metrics}
            if isinstance(held.metrics, Mapping)
            else held.metrics,
            batch_size=BATCH,
            max_new_tokens=NEW_TOKENS,
            rows=reading.rows,
            max_length=reading.max_length,
            seed=reading.seed,
            device=one.plan.device,
            trust_remote_code=reading.trust_remote_code,
            quiet=quiet,
        )
    assert known is not None
    spent = read_record(merged.folder)["facts"].get("spent") or {}
    return Tried(
        scores={task: next(iter(known[task].merged.values())) for task in held.trials},
        score=math.nan,
        seconds=spent.get("seconds"),
        peak_bytes=spent.get("peak_bytes"),
        resumed=bool(spent.get("resumed")),
        folder=merged.folder,
    )
