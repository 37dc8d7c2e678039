"""RegMean: every linear layer by least squares, to do to each source's inputs what the source does to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_fda.errors import InputError
from hf_fda.merge_methods.config import Scope, WeightedConfig, option
from hf_fda.merge_methods.linear import LinearConfig
from hf_fda.merge_methods.looking import RowsConfig
from hf_fda.merge_methods.per_source import numbers
from hf_fda.merge_methods.registry import register_config
from hf_fda.tensors import pseudo_inverse_right, total, weighted


@dataclass(frozen=True, kw_only=True)
class RegMeanConfig(WeightedConfig, RowsConfig):
    """Options of `regmean`."""

    name: ClassVar[str] = "regmean"
    summary: ClassVar[str] = "linear layers by least squares on every source's own inputs, the mean of the rest"
    paper: ClassVar[str] = "Dataless knowledge fusion by merging weights (RegMean), arXiv 2212.09849"
    scope: ClassVar[Scope] = "matrix"

    off_diagonal: float = option(
        0.9,
        "factor of the Gram matrices' entries beside the diagonal (the paper's alpha, 0.9 in most of its experiments)",
        minimum=0,
        maximum=1,
    )
    normalize: bool = option(
        False, "divide each source's Gram matrices by its number of tokens, so that longer rows do not count more"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_negative(self)

    def mean(self) -> LinearConfig:
        """What merges a tensor without Gram matrices."""
        return LinearConfig(weights=self.weights)

    def extra_bytes(self, shape: tuple[int, int]) -> int:
        """As `MethodConfig.extra_bytes`: a Gram matrix as it is read, and in float64 one, their sum, it scaled and its
        factor; in float64 the deviation, its product with a Gram matrix, their sum and the solution."""
        d_out, d_in = shape
        return d_in * d_in * (4 + 4 * 8) + d_out * d_in * 4 * 8


@dataclass(frozen=True, kw_only=True)
class RegMeanPlusConfig(RegMeanConfig):
    """Options of `regmean_pp`."""

    name: ClassVar[str] = "regmean_pp"
    summary: ClassVar[str] = "RegMean block by block, on inputs that the blocks merged before give (RegMean++)"
    paper: ClassVar[str] = "RegMean++, arXiv 2508.03121"


@dataclass(frozen=True, kw_only=True)
class SettledRegMean(RegMeanConfig):
    """RegMean of one linear weight whose Gram matrices are known.

    `grams` is called for the matrices, one for each source in order.
    """

    grams: Any = None

    def merge(self, base: Tensor, tasks: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """As `MethodConfig.merge`."""
        return regmean(tasks, self.grams(), self)


@dataclass(frozen=True, kw_only=True)
class FoundRegMean(RegMeanPlusConfig):
    """RegMean++ of one weight that is merged already.

    `read` gives some of the merged task tensor's flattened entries; `entries` says which are wanted, None all.
    """

    scope: ClassVar[Scope] = "entry"

    read: Any = None
    entries: slice | None = None

    def at(self, entries: slice) -> FoundRegMean:
        """As `MethodConfig.at`."""
        return dataclasses.replace(self, entries=entries)

    def merge(self, base: Tensor, tasks: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """As `MethodConfig.merge`, of flat tensors."""
        entries = self.entries if self.entries is not None else slice(0, base.numel())
        return self.read(entries).to(base.device, base.dtype)


def refuse_negative(config: WeightedConfig) -> None:
    """Refuse weights by which a weighted least-squares problem has no minimum.

    Raises:
        InputError: when one is below zero, or all are zero.
    """
    if any(weight < 0 for weight in numbers(config.weights)):
        raise InputError(f"{config.name}: a weight is below zero; weights count rows here: pass 0 or more")
    config.refuse_zero_sum("pass one above zero")


def regmean(tasks: Sequence[Tensor], grams: Iterable[Tensor], config: RegMeanConfig) -> Tensor:
    """``(sum_i w_i tau_i G_i) (sum_i w_i G_i)^-1`` (paper, Equation 2, on task vectors).

    The minimum of ``sum_i w_i |(W - W_i) X_i^T|^2`` with ``G_i = X_i^T X_i``, whose entries beside the diagonal are
    first multiplied by `off_diagonal`. Solved for the deviation from the weighted mean, which is the same where the sum
    of the G_i has an inverse, leaves the mean in directions that no input has, and gives equal sources back.

    Args:
        tasks: K task tensors (d_out, d_in).
        grams: K symmetric positive semi-definite matrices (d_in, d_in), taken one at a time.
        config: the options; `weights` in the order of `tasks`.
    """
    weights, shares = config.weight_of_each(len(tasks)), config.shares(len(tasks))
    mean = total(weighted(tasks, shares)) if len(tasks) > 1 else tasks[0]
    exact = torch.float32 if mean.device.type == "mps" else torch.float64
    gram = torch.zeros(mean.shape[1], mean.shape[1], dtype=exact, device=mean.device)
    target, precision = torch.zeros(mean.shape, dtype=exact, device=mean.device), 0.0
    for task, weight, own in zip(tasks, weights, grams, strict=True):
        precision = max(precision, torch.finfo(own.dtype).eps)
        held = own.to(mean.device, exact, copy=True)
        diagonal = held.diagonal().clone()
        held.mul_(weight * config.off_diagonal).diagonal().copy_(weight * diagonal)
        gram += held
        target += (task - mean).to(exact) @ held
    return mean + solve_right(target, gram, len(gram) * precision).to(mean.dtype)


def solve_right(target: Tensor, gram: Tensor, tolerance: float) -> Tensor:
    """``target @ gram^+`` by Cholesky decomposition, or by eigenvalues where `gram` is singular.

    Args:
        target: (d_out, d), zero in the null space of `gram`.
        gram: (d, d), symmetric positive semi-definite.
        tolerance: below this fraction of the largest, directions count as null.
    """
    scale = gram.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0)
    scaled = gram * inverse * inverse[:, None]
    scaled.diagonal().fill_(1)  # an input that is always zero: its row, column and target are zero
    factor, failed = torch.linalg.cholesky_ex(scaled)
    del scaled
    if failed or factor.diagonal().square().min() <= tolerance:
        return pseudo_inverse_right(target, gram, tolerance)
    return torch.cholesky_solve((target * inverse).mT, factor).mT * inverse


register_config(RegMeanConfig)
register_config(RegMeanPlusConfig)
