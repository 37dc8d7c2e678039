"""Merges on a sphere: slerp, nuslerp, multislerp and karcher, against plain formulas and each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_fda.errors import InputError
from hf_fda.merge_methods import resolve_method

SHAPES = [(6, 9), (7,), (2, 3, 4), ()]


def draw(count: int, shape: tuple[int, ...] = (6, 9), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def merged(method: str, base: Tensor, tasks: list[Tensor], **options: Any) -> Tensor:
    """The merged model itself."""
    return base + resolve_method(method, options).merge(base, tasks)


def arc(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Shoemake's formula."""
    angle = math.acos(float((first * second).sum() / first.norm() / second.norm()))
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


# -- two models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.2])
def test_slerp_goes_along_the_arc_from_the_base_to_a_source_or_between_two(t: float) -> None:
    base, one, two = draw(3)
    torch.testing.assert_close(merged("slerp", base, [one], t=t), arc(base, base + one, t))
    torch.testing.assert_close(merged("slerp", base, [one, two], t=t), arc(base + one, base + two, t))
    torch.testing.assert_close(merged("slerp", torch.zeros_like(base), [one, two], t=t), arc(one, two, t))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_nuslerp_goes_along_the_arc_between_task_vectors_or_from_the_base(t: float) -> None:
    base, one, two = draw(3)
    pair = merged("nuslerp", base, [one, two], weights=(3 * (1 - t), 3 * t))
    torch.testing.assert_close(pair, base + arc(one, two, t))
    torch.testing.assert_close(merged("nuslerp", base, [one], weights=(t,)), arc(base, base + one, t))


@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_models_may_change_places(method: str, shape: tuple[int, ...]) -> None:
    base, one, two = draw(3, shape)
    there: dict[str, Any] = {"t": 0.2} if method == "slerp" else {"weights": (0.8, 0.2)}
    back: dict[str, Any] = {"t": 0.8} if method == "slerp" else {"weights": (0.2, 0.8)}
    torch.testing.assert_close(merged(method, base, [one, two], **there), merged(method, base, [two, one], **back))


def test_nuslerp_takes_an_angle_for_each_line_unless_it_is_flat() -> None:
    base, one, two = draw(3)
    by_row = merged("nuslerp", base, [one, two], nuslerp_flatten=False) - base
    for row, first, second in zip(by_row, one, two, strict=True):
        torch.testing.assert_close(row, arc(first, second, 0.5))
    by_column = merged("nuslerp", base, [one, two], nuslerp_flatten=False, nuslerp_row_wise=True) - base
    for column, first, second in zip(by_column.T, one.T, two.T, strict=True):
        torch.testing.assert_close(column, arc(first, second, 0.5))


def test_nuslerp_of_weights_that_cancel_out_meets_in_the_middle() -> None:
    base, one, two = draw(3)
    torch.testing.assert_close(
        merged("nuslerp", base, [one, two], weights=(1, -1)), merged("nuslerp", base, [one, two])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [2.0, -2.0])
def test_models_on_one_line_are_interpolated_on_it(factor: float, dtype: torch.dtype) -> None:
    (one,) = (tensor.to(dtype) for tensor in draw(1))
    for method, options in (("slerp", {"t": 0.25}), ("nuslerp", {"weights": (0.75, 0.25)})):
        found = merged(method, torch.zeros_like(one), [one, factor * one], **options)
        torch.testing.assert_close(found, (0.75 + 0.25 * factor) * one)


def test_slerp_keeps_the_length_of_models_of_one_length() -> None:
    base, one = (tensor / tensor.norm() for tensor in draw(2))
    assert float(merged("slerp", base, [one - base], t=0.4).norm()) == pytest.approx(1.0)


# -- many models -------------------------------------------------------------------------------------------------------


def published_multislerp(tasks: list[Tensor], weights: list[float]) -> Tensor:
    """In the tangent space at the normalised mean, and back by the exponential map."""
    units = [task / task.norm() for task in tasks]
    mean = sum(w * unit for w, unit in zip(weights, units, strict=True))
    mean = mean / mean.norm()
    tangents = [unit - (unit * mean).sum() * mean for unit in units]
    tangent = sum(w * own for w, own in zip(weights, tangents, strict=True))
    length = tangent.norm() + 1e-12
    point = mean * torch.cos(length) + tangent * (torch.sin(length) / length)
    return point * sum(w * task.norm() for w, task in zip(weights, tasks, strict=True))


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp_is_the_published_procedure(shape: tuple[int, ...], normalize: bool) -> None:
    base, *tasks = draw(4, shape)
    weights = [0.5, 2.0, 1.5]
    own = [weight / sum(weights) for weight in weights] if normalize else weights
    found = merged("multislerp", base, tasks, weights=weights, normalize_weights=normalize)
    torch.testing.assert_close(found, base + published_multislerp(tasks, own), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_one_model_alone_comes_back_bit_for_bit(method: str) -> None:
    base, one = draw(2)
    assert torch.equal(resolve_method(method, {"weights": (0.5,)}).merge(base, [one]), one)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_of_models_does_not_matter(method: str, shape: tuple[int, ...]) -> None:
    base, *tasks = draw(4, shape)
    found = merged(method, base, tasks, weights=(0.5, 2.0, 1.5))
    turned = merged(method, base, tasks[::-1], weights=(1.5, 2.0, 0.5))
    torch.testing.assert_close(found, turned, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("count", [2, 3])
def test_multislerp_adds_directions_that_cancel_out_as_they_are(count: int) -> None:
    base, one = draw(2)
    tasks = [one, -3 * one, torch.zeros_like(one)][:count]
    torch.testing.assert_close(resolve_method("multislerp", {}).merge(base, tasks), -2 * one / count)
    zeros = [torch.zeros_like(one)] * count
    assert torch.equal(resolve_method("multislerp", {}).merge(base, zeros), torch.zeros_like(base))


def test_the_karcher_mean_of_two_models_lies_half_way_on_their_arc() -> None:
    base, *tasks = draw(3)
    first, second = (base + task for task in tasks)
    units = [first / first.norm(), second / second.norm()]
    expected = arc(*units, 0.5) * (first.norm() + second.norm()) / 2
    torch.testing.assert_close(merged("karcher", base, tasks), expected)
    apart = merged("karcher", base, tasks, weights=(3, 1), max_iter=200, tol=1e-12)
    lengths = 0.75 * first.norm() + 0.25 * second.norm()
    torch.testing.assert_close(apart, arc(*units, 0.25) * lengths)


def test_at_the_karcher_mean_the_logarithms_of_all_models_add_up_to_nothing() -> None:
    base, *tasks = draw(6)
    mean = merged("karcher", base, tasks, max_iter=200, tol=1e-12)
    mean = mean / mean.norm()
    step = torch.zeros_like(mean)
    for task in tasks:
        unit = (base + task) / (base + task).norm()
        cosine = float((unit * mean).sum())
        step += math.acos(cosine) / math.sin(math.acos(cosine)) * (unit - cosine * mean)
    assert float(step.norm()) < 1e-10


def test_the_karcher_mean_has_the_models_mean_length() -> None:
    base, *tasks = draw(4)
    lengths = [float((base + task).norm()) for task in tasks]
    assert float(merged("karcher", base, tasks).norm()) == pytest.approx(sum(lengths) / 3)


def test_models_of_zeros_have_no_direction_in_a_karcher_mean() -> None:
    base, one = draw(2)
    torch.testing.assert_close(merged("karcher", base, [one, -base]), (base + one) / 2)
    torch.testing.assert_close(merged("karcher", base, [one, -base], weights=(0, 1)), torch.zeros_like(base))
    assert not bool(merged("karcher", torch.zeros_like(base), [torch.zeros_like(base)] * 2).any())


@pytest.mark.parametrize("method", ["slerp", "karcher", "nuslerp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sources_that_equal_the_base_leave_it_as_it_is(method: str, dtype: torch.dtype) -> None:
    base = draw(1)[0].to(dtype)
    for count in (1, 2):
        torch.testing.assert_close(merged(method, base, [torch.zeros_like(base)] * count), base)


@pytest.mark.parametrize(
    ("method", "way_out"), [("multislerp", "normalize_weights=False"), ("karcher", "other weights")]
)
def test_weights_that_sum_to_zero_are_refused(method: str, way_out: str) -> None:
    for weights in ((1, -1), {"a": 1, "b": -1}):
        with pytest.raises(InputError, match=f"{method}: the weights sum to zero; pass .*{way_out}"):
            resolve_method(method, {"weights": weights})
