"""How far a merged model's answers are from a source's, from logits alone.

With p a source's distribution and q the merged model's at one position (a row of a classifier, a token of a language
model), *forward* is ``KL(p || q)``, *reverse* is ``KL(q || p)``, and Jensen-Shannon is
``1/2 KL(p || m) + 1/2 KL(q || m)`` with ``m = (p + q) / 2`` (DivMerge, arXiv 2509.02108). All are in nats and are
computed from log-probabilities. A distribution over a large vocabulary may be known by its most likely tokens alone,
all others being one bucket: the divergence is then a lower bound of the whole one (data processing inequality).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_fda.data.rows import Kind
from hf_fda.errors import InputError
from hf_fda.merge_methods.divmerge import Measure

FLOOR = -1e4
"""Log-probabilities below this are taken for it: their probability is zero, and zero times them is zero too."""

PIECE = 1 << 22
"""Probabilities that are compared at a time."""


@dataclass(frozen=True)
class Target:
    """What a source answered at n positions.

    Args:
        values: of kinds "labels" and "tokens" log-probabilities (n, C), or (n, k + 1) where only k tokens are known,
            the last being all others together; of "flags" logits (n, C), of "values" the values (n, C).
        ids: (n, k), which tokens these are; None where all are known.
    """

    values: Tensor
    ids: Tensor | None = None


def at_scored(logits: Tensor, scored: Tensor | None) -> Tensor:
    """The logits that count, (n, C): of every row, or of every scored position, row after row.

    Args:
        logits: (rows, C), or (rows, positions, C).
        scored: (rows, positions), or None for logits of whole rows.
    """
    if scored is not None:
        return logits[scored.bool()]
    return logits if logits.ndim > 1 else logits[:, None]


def answer(kind: Kind, logits: Tensor, ids: Tensor | None = None) -> Tensor:
    """Logits as they are compared, differentiable: what `Target.values` holds.

    The bucket's log-probability is the log-sum-exp of its own logits, not one minus the others: that would lose all
    digits where the bucket is nearly empty.

    Args:
        kind: what they mean.
        logits: (n, C).
        ids: (n, k) tokens to tell apart, k < C; None for all.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if kind in ("flags", "values"):
        return logits
    if ids is None:
        return logits.log_softmax(-1)
    whole = logits.logsumexp(-1, keepdim=True)
    rest = logits.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, ids), rest], -1) - whole


def divergence(measure: Measure, kind: Kind, logits: Tensor, target: Target) -> Tensor:
    """The divergence of a merged model's answers from a source's at each position, (n,).

    Of "flags" it is the mean over a row's labels, so that Jensen-Shannon is at most ln 2 there too; of "values" there
    is no distribution and it is the mean squared error over a row's values, whatever the measure.

    Args:
        measure: which divergence.
        kind: what the logits mean.
        logits: (n, C), the merged model's; gradients reach these alone.
        target: the source's answers at the same positions.
    """
    own = answer(kind, logits, target.ids)
    theirs = target.values.to(own.device, own.dtype)
    if kind == "values":
        return (own - theirs).square().mean(-1)
    if kind == "flags":
        return compare(measure, _yes_or_no(theirs), _yes_or_no(own)).mean(-1)
    return compare(measure, theirs.log_softmax(-1), own)  # normalised again: they may have been rounded


def compare(measure: Measure, source: Tensor, merged: Tensor) -> Tensor:
    """A divergence of distributions over the last dimension.

    Of what lies between it and the log-probabilities only its derivative is kept for the way back, one tensor of their
    size: over a large vocabulary that, not the model, is what takes memory.

    Args:
        measure: which.
        source: (..., C) log-probabilities p.
        merged: (..., C) log-probabilities q; gradients reach these alone.
    """
    shape = merged.shape
    found: Tensor = _Compared.apply(measure, source.reshape(-1, shape[-1]), merged.reshape(-1, shape[-1]))
    return found.view(shape[:-1])


class _Compared(torch.autograd.Function):
    """Divergences (n,) of distributions (n, C), some at a time."""

    @staticmethod
    def forward(ctx: Any, measure: Measure, source: Tensor, merged: Tensor) -> Tensor:
        slope = torch.empty_like(merged)
        rows = max(PIECE // max(merged.shape[-1], 1), 1)
        values = []
        for p, q, out in zip(source.split(rows), merged.split(rows), slope.split(rows), strict=True):
            value, own = _value_and_slope(measure, p.clamp_min(FLOOR), q.clamp_min(FLOOR))
            values.append(value)
            out.copy_(own)
        ctx.save_for_backward(slope)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        (slope,) = ctx.saved_tensors
        return None, None, gradients[0][:, None] * slope


def _value_and_slope(measure: Measure, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """A divergence (n,) and its derivative by log q, (n, C).

    For Jensen-Shannon, with d = log q - log p: ``log p/m = -relu(d) - h`` and ``log q/m = -relu(-d) - h``, where
    ``h = log((1 + exp(-|d|)) / 2)`` keeps its digits where p and q are nearly equal; what m itself contributes to the
    derivative cancels.
    """
    if measure == "forward-kl":
        of_p = p.exp()
        return (of_p * (p - q)).sum(-1), -of_p
    of_q, apart = q.exp(), q - p
    if measure == "reverse-kl":
        terms = of_q * apart
        return terms.sum(-1), terms + of_q
    half = torch.log1p(torch.expm1(-apart.abs()) / 2)
    own = -of_q * (functional.relu(-apart) + half) / 2
    return (own - p.exp() * (functional.relu(apart) + half) / 2).sum(-1), own


def entropy(kind: Kind, logits: Tensor) -> Tensor:
    """The entropy of a model's answers at each position, (n,), in nats (AdaMerging, arXiv 2310.02575).

    Of "flags" the mean over a row's labels.

    Args:
        kind: what the logits mean.
        logits: (n, C).

    Raises:
        InputError: of "values", which are no distribution.
    """
    if kind == "values":
        raise InputError("the answers of a regression have no entropy; leave its task out, or use method 'divmerge'")
    log_probabilities = answer(kind, logits)
    if kind == "flags":
        return _own_entropy(_yes_or_no(log_probabilities)).mean(-1)
    return _own_entropy(log_probabilities)


def _own_entropy(log_probabilities: Tensor) -> Tensor:
    kept = log_probabilities.clamp_min(FLOOR)
    return -(kept.exp() * kept).sum(-1)


def _yes_or_no(logits: Tensor) -> Tensor:
    """(..., 2) log-probabilities of yes and no."""
    return torch.stack([functional.logsigmoid(logits), functional.logsigmoid(-logits)], -1)
