"""How a model's own predictions weigh changes of its logits: the Fisher information of what it answers."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fda.data.rows import Kind

FEW = 10
"""Labels (flags, values) up to which the exact expectation is taken where nothing else is asked for."""


def directions(
    logits: Tensor, scored: Tensor | None, kind: Kind, samples: int | None, generator: torch.Generator
) -> list[Tensor]:
    """Directions l_k in the space of one row's logits with ``sum_k l_k l_k^T = E_y[s s^T]``, where the score s is the
    gradient of ``log p(y)`` by the logits and y is drawn from the model's own predictions.

    So the diagonal Fisher information of the parameters is ``sum_k (gradient of <z, l_k>)^2``, one backward pass each.
    For C labels there are C - 1 exact ones, from the eigenvectors of ``diag(p) - p p^T``; for C flags
    ``sqrt(p (1 - p))`` of each; for C values, as of a Gaussian likelihood of variance 1, the unit vectors. For
    logits by position, or where C is large, a sample of y gives one direction: its score.

    Args:
        logits: of one row: (C,), or (T, C) of kind "tokens".
        scored: (T,), which positions count; of kind "tokens".
        kind: what the logits mean.
        samples: how many are drawn; None: the exact ones where they are few, else one sample.
        generator: of the samples, on the CPU.

    Returns:
        tensors of the logits' shape, on their device.
    """
    z = logits.detach().double().cpu()
    if kind != "tokens" and samples is None and len(z) <= FEW:
        found = _exact(z, kind)
    else:
        found = [_sampled(z, scored, kind, generator) / (samples or 1) ** 0.5 for _ in range(samples or 1)]
    return [own.to(logits.device, logits.dtype) for own in found]


def _exact(z: Tensor, kind: Kind) -> list[Tensor]:
    """Vectors whose outer products add up to the Fisher information of the logits (C,)."""
    if kind == "values":
        return list(torch.eye(len(z), dtype=z.dtype))
    if kind == "flags":
        p = z.sigmoid()
        return list(torch.diag((p * (1 - p)).sqrt()))
    p = z.softmax(-1)
    values, vectors = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
    kept = values > len(p) * torch.finfo(p.dtype).eps * values[-1]
    return list((vectors[:, kept] * values[kept].sqrt()).mT)


def _sampled(z: Tensor, scored: Tensor | None, kind: Kind, generator: torch.Generator) -> Tensor:
    """The score of an answer that is drawn, position by position where logits are of positions."""
    if kind == "values":
        return torch.randn(z.shape, generator=generator, dtype=z.dtype)
    if kind == "flags":
        p = z.sigmoid()
        return torch.bernoulli(p, generator=generator) - p
    p = z.softmax(-1)
    drawn = torch.multinomial(p.view(-1, p.shape[-1]), 1, generator=generator).view(p.shape[:-1])
    score = -p
    score.scatter_add_(-1, drawn[..., None], torch.ones_like(p[..., :1]))
    return score if scored is None else score * scored.cpu().to(score.dtype)[..., None]
