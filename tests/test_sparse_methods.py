"""Methods that thin task vectors out: breadcrumbs, della, dare, ties and sce, against plain formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_fda.errors import InputError
from hf_fda.merge_methods import resolve_method
from hf_fda.merge_methods.della import keep_probabilities


def draw(count: int, shape: tuple[int, ...] = (6, 9), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def merge(method: str, tasks: list[Tensor], seed: int = 0, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return resolve_method(method, options).merge(torch.zeros_like(tasks[0]), tasks, generator)


# -- breadcrumbs -------------------------------------------------------------------------------------------------------


def plain_breadcrumbs(task: Tensor, density: float, gamma: float) -> Tensor:
    """The entries between the smallest and the largest, one by one."""
    order = sorted(range(task.numel()), key=lambda place: float(task.flatten()[place].abs()))
    kept = int(density * task.numel())
    first = max(0, task.numel() - kept - int(gamma * task.numel()))
    result = torch.zeros(task.numel(), dtype=task.dtype)
    for place in order[first : first + kept]:
        result[place] = task.flatten()[place]
    return result.view_as(task)


@pytest.mark.parametrize(("density", "gamma"), [(0.6, 0.1), (0.3, 0.0), (0.9, 0.5), (0.5, 1.0), (1.0, 0.2)])
def test_breadcrumbs_drop_the_smallest_and_the_very_largest(density: float, gamma: float) -> None:
    tasks = draw(2)
    expected = sum(plain_breadcrumbs(task, density, gamma) for task in tasks)
    torch.testing.assert_close(merge("breadcrumbs", tasks, density=density, gamma=gamma), expected)


def test_breadcrumbs_ties_is_ties_of_what_breadcrumbs_keeps() -> None:
    tasks, options = draw(3), {"density": 0.6, "gamma": 0.1}
    kept = [merge("breadcrumbs", [task], **options) for task in tasks]
    for normalize in (False, True):
        found = merge("breadcrumbs_ties", tasks, normalize=normalize, weights=(1, 2, 0.5), **options)
        torch.testing.assert_close(found, merge("ties", kept, normalize=normalize, weights=(1, 2, 0.5)))


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "della_linear"])
def test_rescaling_keeps_the_sum_of_magnitudes(method: str) -> None:
    (task,) = draw(1)
    options = {"gamma": 0.05} if method == "breadcrumbs" else {}
    found = merge(method, [task], density=0.4, rescale=True, **options)
    plain = merge(method, [task], density=0.4, rescale=False, **options)
    assert float(found.abs().sum()) == pytest.approx(float(task.abs().sum()))
    torch.testing.assert_close(found / found.abs().sum(), plain / plain.abs().sum())
    assert not bool(merge(method, [torch.zeros_like(task)], density=0.4, rescale=True).any())


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "breadcrumbs"])
def test_a_positive_density_keeps_one_entry_at_least(method: str) -> None:
    tasks = [torch.tensor([1.0, -3.0, 2.0])]
    assert merge(method, tasks, density=0.1).tolist() == [0, -3, 0]
    assert not bool(merge(method, tasks, density=0.0).any())


@pytest.mark.parametrize("method", ["task_arithmetic", "breadcrumbs", "dare_linear", "della_linear"])
def test_sums_may_be_divided_by_the_weights(method: str) -> None:
    tasks = draw(2)
    summed = merge(method, tasks, weights=(0.5, 2.0))
    torch.testing.assert_close(merge(method, tasks, weights=(0.5, 2.0), normalize=True), summed / 2.5)
    even = merge(method, tasks, weights=(1, -1), normalize=True)
    torch.testing.assert_close(even, merge(method, tasks, weights=(1, -1)))


def test_a_divided_sum_is_the_linear_combination_that_it_says() -> None:
    tasks = draw(3)
    config = resolve_method("task_arithmetic", {"weights": (0.5, 2.0, -1.0), "normalize": True, "scaling": 0.7})
    factors = config.coefficients(3)
    assert factors is not None and sum(factors) == pytest.approx(0.7)
    expected = sum(factor * task for factor, task in zip(factors, tasks, strict=True))
    torch.testing.assert_close(config.merge(tasks[0], tasks), expected)


# -- della and dare ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 8), (8,), (3, 2, 4)])
def test_the_probability_to_stay_rises_evenly_with_the_rank_within_a_row(shape: tuple[int, ...]) -> None:
    (task,) = draw(1, shape)
    rows = keep_probabilities(task, 0.5, 0.2).reshape(shape[0] if len(shape) > 1 else 1, -1)
    sizes = task.abs().reshape(rows.shape)
    for row, size in zip(rows, sizes, strict=True):
        torch.testing.assert_close(row[size.argsort()], torch.linspace(0.3, 0.7, len(row), dtype=torch.float64))


def test_a_row_of_one_entry_stays_with_the_mean_probability() -> None:
    assert keep_probabilities(torch.ones(4, 1), 0.4, 0.2).tolist() == [[pytest.approx(0.4)]] * 4
    assert float(keep_probabilities(torch.tensor(2.0), 0.4, 0.2)) == pytest.approx(0.4)


def test_without_epsilon_and_divided_by_its_probabilities_della_is_dare() -> None:
    """Both drop as often, and enlarge what stays by as much; the random numbers are others."""
    (task,), options = draw(1, (30, 40)), {"density": 0.5, "weights": (0.7,)}
    for della, dare, own in (("della_linear", "dare_linear", {}), ("della", "dare_ties", {"normalize": True})):
        one = merge(della, [task], epsilon=0.0, rescale_by="probability", **options, **own)
        other = merge(dare, [task], **options, **own)
        both = (one != 0) & (other != 0)
        assert abs(float((one != 0).double().mean() - (other != 0).double().mean())) < 0.06
        torch.testing.assert_close(one[both].float(), other[both].float())


@pytest.mark.parametrize("method", ["della_linear", "dare_linear"])
def test_dividing_by_the_probability_keeps_the_expectation(method: str) -> None:
    (task,) = draw(1, (20, 30))
    own = {"rescale_by": "probability", "epsilon": 0.3} if method == "della_linear" else {}
    runs = torch.stack([merge(method, [task], seed, density=0.5, **own) for seed in range(400)])
    error = (runs.var(0) / 400).sqrt()
    assert float(((runs.mean(0) - task).abs() / error.clamp_min(1e-9)).max()) < 5


def test_entries_stay_as_often_as_their_probability_says() -> None:
    (task,) = draw(1, (20, 30))
    stayed = torch.stack(
        [merge("della_linear", [task], seed, density=0.5, epsilon=0.3, rescale=False) != 0 for seed in range(400)]
    ).double()
    chances = keep_probabilities(task, 0.5, 0.3)
    error = (chances * (1 - chances) / 400).sqrt()
    assert float(((stayed.mean(0) - chances).abs() / error).max()) < 5
    assert float(stayed.mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"density": 0.5, "epsilon": 0.5}, False),
        ({"density": 0.9}, False),
        ({"density": 0.1}, False),
        ({"density": (0.5, 0.9)}, False),
        ({"density": {"a": 0.5, "b": 0.9}, "epsilon": {"a": 0.3, "b": 0.2}}, False),
        ({"density": {"a": 0.5, "b": 0.9}, "epsilon": {"a": 0.3, "b": 0.05}}, True),
        ({"density": (0.5, 0.9), "epsilon": (0.3, 0.05)}, True),
        ({"density": 0.5, "epsilon": 0.49}, True),
        ({"density": 1.0, "epsilon": 0.3}, True),
        ({"density": 0.0}, True),
    ],
)
def test_probabilities_outside_0_to_1_are_refused(method: str, options: dict[str, Any], allowed: bool) -> None:
    if allowed:
        resolve_method(method, options)
        return
    with pytest.raises(InputError, match="epsilon must be less than"):
        resolve_method(method, options)


@pytest.mark.parametrize("method", ["della", "della_linear", "dare_linear", "dare_ties"])
def test_the_same_seed_drops_the_same_entries(method: str) -> None:
    tasks = draw(3)
    first, again, other = (merge(method, tasks, seed, density=0.5) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# -- sce ---------------------------------------------------------------------------------------------------------------


def plain_sce(tasks: list[Tensor], fraction: float) -> Tensor:
    """Entry by entry."""
    stack = torch.stack(tasks).reshape(len(tasks), -1)
    variance = stack.var(dim=0, unbiased=False)
    kept = variance.argsort(descending=True)[: int(fraction * int((variance > 0).sum()))]
    chosen = torch.zeros_like(stack)
    chosen[:, kept] = stack[:, kept]
    weights = [float(row.square().mean()) for row in chosen]
    weights = [weight / sum(weights) for weight in weights]
    result = torch.zeros_like(variance)
    for place in range(stack.shape[1]):
        column = chosen[:, place].tolist()
        sign = 1 if sum(column) >= 0 else -1
        top = sum(w * value for w, value in zip(weights, column, strict=True) if value * sign > 0)
        bottom = sum(w for w, value in zip(weights, column, strict=True) if value * sign > 0)
        result[place] = top / bottom if bottom else 0
    return result.view_as(tasks[0])


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
def test_sce_selects_calculates_and_erases(fraction: float) -> None:
    tasks = draw(3)
    torch.testing.assert_close(merge("sce", tasks, select_topk=fraction), plain_sce(tasks, fraction))
    torch.testing.assert_close(merge("sce", tasks, select_topk=fraction, scaling=0.3), 0.3 * plain_sce(tasks, fraction))


def test_sce_of_everything_weighs_sources_by_their_squared_size() -> None:
    one, two = (task.abs() for task in draw(2))
    sizes = [float(task.square().sum()) for task in (one, two)]
    torch.testing.assert_close(merge("sce", [one, two]), (sizes[0] * one + sizes[1] * two) / sum(sizes))
    torch.testing.assert_close(merge("sce", [one]), one)


def test_sce_does_not_depend_on_how_far_models_were_tuned() -> None:
    tasks = draw(3)
    small = merge("sce", [1e-6 * task for task in tasks], select_topk=0.5)
    torch.testing.assert_close(1e6 * small, merge("sce", tasks, select_topk=0.5))


def test_sce_selects_nothing_of_sources_that_are_equal() -> None:
    (one,) = draw(1)
    assert not bool(merge("sce", [one, one.clone()], select_topk=0.5).any())
    torch.testing.assert_close(merge("sce", [one, one.clone()]), one)
    assert not bool(merge("sce", [torch.zeros_like(one)] * 2).any())
