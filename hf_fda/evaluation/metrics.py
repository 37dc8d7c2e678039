"""Metrics as subclasses of `evaluate.Metric`, defined here so that none is fetched from the Hub.

Names and the keys of what they give are those of the metrics of the same names on the Hub.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate
import torch
from torch import Tensor

LABEL, NUMBER, TEXT = datasets.Value("int64"), datasets.Value("float64"), datasets.Value("string")


class Bundled(evaluate.Metric):
    """A metric of `predictions` and `references`, one of each for every row.

    `of` is what each of them is; of a `config_name` "multilabel" a list of that. `about` says what is computed.
    """

    of: datasets.Value
    other: datasets.Value | None = None
    about: str

    def _info(self) -> evaluate.MetricInfo:
        references = self.other or self.of
        lists = self.config_name == "multilabel"
        shapes = {"predictions": self.of, "references": references}
        features = datasets.Features({name: datasets.List(own) if lists else own for name, own in shapes.items()})
        return evaluate.MetricInfo(
            description=self.about, citation="", inputs_description="predictions, references", features=features
        )


class Accuracy(Bundled):
    """The share of rows whose label is right; of several labels a row, those in which all are."""

    of, about = LABEL, "The share of rows that are right."

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        right = sum(said == known for said, known in zip(predictions, references, strict=True))
        return {"accuracy": right / len(references)}


class F1(Bundled):
    """The mean over labels of ``2 tp / (2 tp + fp + fn)``.

    It is over the labels that are predicted or right for any row; of several labels a row over all of them, with 0 for
    one that is neither anywhere.
    """

    of, about = LABEL, "The unweighted mean over labels of the harmonic mean of precision and recall."

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        said, known = torch.tensor(predictions), torch.tensor(references)
        if said.ndim == 1:
            labels = torch.cat([said, known]).unique()
            said, known = (own[:, None] == labels for own in (said, known))
        said, known = said.bool(), known.bool()
        hits, wrong = (said & known).sum(0).double(), (said ^ known).sum(0)
        scores = 2 * hits / (2 * hits + wrong).clamp(min=1)
        return {"f1": float(scores.mean())}


class MatthewsCorrelation(Bundled):
    """The correlation of predicted and right labels (Gorodkin 2004, R_K); 0 where either is the same everywhere."""

    of, about = LABEL, "The correlation of predicted and right labels, of any number of them."

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        said, known = torch.tensor(predictions), torch.tensor(references)
        labels = torch.cat([said, known]).unique()
        one, other = ((own[:, None] == labels).double() for own in (said, known))
        one, other = one - one.mean(0), other - other.mean(0)
        spread = float(one.square().sum() * other.square().sum())
        return {"matthews_correlation": float((one * other).sum()) / math.sqrt(spread) if spread else 0.0}


class MeanSquaredError(Bundled):
    """The mean squared difference."""

    of, about = NUMBER, "The mean squared difference."

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        return {"mse": float((_numbers(predictions) - _numbers(references)).square().mean())}


class MeanAbsoluteError(Bundled):
    """The mean absolute difference."""

    of, about = NUMBER, "The mean absolute difference."

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        return {"mae": float((_numbers(predictions) - _numbers(references)).abs().mean())}


class Pearson(Bundled):
    """The correlation of predicted and right numbers; not a number where either is the same everywhere."""

    of, about = NUMBER, "Pearson's correlation."

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        return {"pearsonr": _correlation(_numbers(predictions), _numbers(references))}


class Spearman(Bundled):
    """The correlation of the ranks of predicted and right numbers, with mean ranks for equal ones."""

    of, about = NUMBER, "Spearman's correlation of ranks."

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        return {"spearmanr": _correlation(_ranks(_numbers(predictions)), _ranks(_numbers(references)))}


class ExactMatch(Bundled):
    """The share of texts that are the right ones, but for white space around them."""

    of, about = TEXT, "The share of texts that are the right ones."

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        right = sum(said.strip() == known.strip() for said, known in zip(predictions, references, strict=True))
        return {"exact_match": right / len(references)}


class Perplexity(Bundled):
    """``exp(sum of n_i / sum of t_i)``: predictions are the negative log-likelihoods n_i of texts, references the
    numbers t_i of their tokens that are predicted, so that every token counts the same."""

    of, other, about = NUMBER, LABEL, "The exponential of the mean negative log-likelihood of a token."

    def _compute(self, predictions: Sequence[float], references: Sequence[int]) -> dict[str, float]:
        mean = math.fsum(predictions) / sum(references)
        return {"perplexity": math.exp(mean) if mean < math.log(torch.finfo(torch.float64).max) else math.inf}


BUNDLED: Mapping[str, type[Bundled]] = {
    "accuracy": Accuracy,
    "exact_match": ExactMatch,
    "f1": F1,
    "mae": MeanAbsoluteError,
    "matthews_correlation": MatthewsCorrelation,
    "mse": MeanSquaredError,
    "pearsonr": Pearson,
    "perplexity": Perplexity,
    "spearmanr": Spearman,
}
"""The metrics by name."""


def _numbers(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _correlation(one: Tensor, other: Tensor) -> float:
    one, other = one - one.mean(), other - other.mean()
    spread = float(one.square().sum() * other.square().sum())
    return float((one * other).sum()) / math.sqrt(spread) if spread else math.nan


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1 on, with the mean rank for equal values.

    >>> _ranks(torch.tensor([3.0, 1.0, 3.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[place]
