"""The diagonal Fisher information of a source's parameters on its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.data.rows import TaskRows
from hf_fda.devices import release_memory
from hf_fda.divergence.task_models import logits_of, source_model
from hf_fda.statistics.likelihood import directions

SQUARES = "/squares"
"""The name, which no tensor has, of the sum of the squares of all that a file holds."""

OFTEN = 8
"""Rows between two returns of freed memory."""


def diagonal_fisher(
    source: AlignedSource,
    names: Iterable[str],
    rows: TaskRows,
    device: torch.device,
    samples: int | None,
    generator: torch.Generator,
    report: Callable[[int], None] = lambda row: None,
) -> dict[str, Tensor]:
    """``F = 1/N sum_x E_(y ~ p(y|x)) [ (d log p(y|x) / d theta)^2 ]`` (arXiv 2111.09832, Equation 3) of some tensors.

    The gradients are of single rows, as the square of a batch's gradient is another thing. Each is squared and added
    the moment it is there, and let go: beside the model and F only one tensor's gradient is held.

    Args:
        source: the source; its whole model is held.
        names: the base's names of the tensors; those that the source lacks are left out.
        rows: of its task.
        device: where to run.
        samples: answers that are drawn for each row, as of `directions`.
        generator: of the draws, on the CPU.
        report: called with the number of every row that is done.

    Returns:
        F in float32 on the CPU by the base's names, and under `SQUARES` the sum of its squares.
    """
    model: Any = source_model(source, device)
    parameters = dict(model.named_parameters())
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = True  # of a row's tokens alone: a vocabulary's other gradients are zero
    sums: dict[str, Tensor] = {}
    hooks: list[RemovableHandle] = []
    for name in names:
        if name in source.tensor_of and parameters[source.tensor_of[name]].is_floating_point():
            parameter = parameters[source.tensor_of[name]]
            sums[name] = torch.zeros_like(parameter)
            hooks.append(parameter.requires_grad_(True).register_post_accumulate_grad_hook(_adder(sums[name])))
    for row in range(len(rows)):
        batch = rows.batch([row]).to(device)
        logits = logits_of(model, batch)
        along = directions(logits, rows.kind, samples, generator)
        for number, direction in enumerate(along):
            logits.backward(direction, retain_graph=number + 1 < len(along))
        if row % OFTEN == 0:
            release_memory()  # rows are of many lengths
        report(row)
    for hook in hooks:
        hook.remove()
    model.to("meta")  # modules refer to each other and live on for a while, but not with their weights
    found = {name: own.div_(len(rows)).cpu() for name, own in sums.items()}
    squares = sum((own.double().square().sum() for own in found.values()), torch.zeros((), dtype=torch.float64))
    return {**found, SQUARES: squares}


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    """Adds the square of a parameter's gradient to a sum, and lets go of the gradient."""

    def add(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            there = gradient.coalesce()
            total.index_add_(0, there.indices()[0], there.values().square())
        else:
            total.addcmul_(gradient, gradient)
        parameter.grad = None

    return add
