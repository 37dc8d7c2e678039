"""The gradient of coefficients from one backward pass, and the forms in which task vectors are held."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import LINEAR, make_base, save
from conftest import make_model
from learning import CPU, Family, folders
from torch import Tensor

from hf_fda.divergence.coefficients import MergedParameters
from hf_fda.divergence.learning import LearningTask
from hf_fda.divergence.objectives import Divergence, Objective
from hf_fda.divergence.task_models import logits_of

DOUBLE = torch.float64


def objective_at(
    parameters: MergedParameters, tasks: Sequence[LearningTask], objective: Objective, coefficients: Tensor
) -> float:
    """The objective on all rows, summed over tasks."""
    parameters.put(coefficients)
    with torch.no_grad():
        return float(sum(_loss(task, number, objective) for number, task in enumerate(tasks)))


def _loss(task: LearningTask, number: int, objective: Objective) -> Tensor:
    rows = range(len(task.rows))
    return objective(number, logits_of(task.model, task.rows.batch(rows)), rows).mean()


def gradients(family: Family, granularity: str, width: float = 1e-4, **options: Any) -> tuple[Tensor, Tensor]:
    """The gradient of all coefficients as it is learnt by, and as central finite differences, both in float64."""
    recorded = family.outputs(DOUBLE, precision="float32")
    generator = torch.Generator().manual_seed(0)
    parameters = family.parameters(granularity, 0.3, dtype=DOUBLE, **options)
    start = 0.3 + 0.2 * torch.randn(parameters.coefficients.shape, generator=generator, dtype=DOUBLE)
    tasks, objective = family.tasks(parameters), Divergence("jensen-shannon", recorded)
    parameters.put(start)
    for number, task in enumerate(tasks):
        _loss(task, number, objective).backward()
    found = parameters.take_gradient()
    assert all(tensor.grad is None for tensor in parameters.tensors.values())
    expected = torch.zeros_like(found)
    for entry in range(found.numel()):
        step = torch.zeros_like(start)
        step.view(-1)[entry] = width
        ends = [objective_at(parameters, tasks, objective, start + sign * step) for sign in (1, -1)]
        expected.view(-1)[entry] = (ends[0] - ends[1]) / (2 * width)
    return found, expected


@pytest.mark.parametrize("granularity", ["task", "block", "tensor"])
@pytest.mark.parametrize("form", ["float32", "disk"])
def test_gradient_of_every_coefficient_is_that_of_finite_differences(
    classifiers: Any, granularity: str, form: str
) -> None:
    found, expected = gradients(Family(*classifiers), granularity, form=form)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
