"""Where anchors start from, before they are optimised (FDA, Section 3.3)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def initial_anchors(
    kind: str, weights: Iterable[Tensor], n: int, tokens: int, size: int, generator: torch.Generator
) -> Tensor:
    """Starting anchors of one unit.

    Args:
        kind: "weights" (linear weight sampling) or "gaussian" (0.01 N(0, 1)).
        weights: the source unit's linear weights, each (d_out, d_in).
        n: number of anchors.
        tokens: T, tokens per anchor.
        size: d, the width of the unit's input.
        generator: on the CPU.

    Returns:
        (n, T, d), float32 on the CPU.
    """
    if kind == "gaussian":
        return 0.01 * torch.randn(n, tokens, size, generator=generator)
    rows = [weight.float().cpu() for weight in weights if weight.shape[1] == size]
    if not rows:
        return 0.01 * torch.randn(n, tokens, size, generator=generator)
    return sample_rows(torch.cat(rows), n * tokens, generator).view(n, tokens, size)


def sample_rows(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows of `pool` drawn without replacement; when it has too few, means of random pairs are added.

    Args:
        pool: (r, d).
        count: rows wanted.
        generator: on the CPU.

    Returns:
        (count, d).
    """
    chosen = pool[torch.randperm(len(pool), generator=generator)[:count]]
    lacking = count - len(chosen)
    if lacking == 0:
        return chosen
    pairs = torch.randint(len(pool), (2, lacking), generator=generator)
    return torch.cat([chosen, (pool[pairs[0]] + pool[pairs[1]]) / 2])
