"""Parameter-space methods against plain implementations, what holds for all of them, and their options."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_fda.errors import InputError
from hf_fda.merge_methods import (
    FDAConfig,
    MethodConfig,
    method_class,
    methods,
    resolve_method,
    with_source_names,
)
from hf_fda.merge_methods.distill import DistillConfig
from hf_fda.streaming.tensorwise import apply_method

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "linear-unnormalized": ("linear", {"normalize": False}),
    "task_arithmetic": ("task_arithmetic", {}),
    "task_arithmetic-normalized": ("task_arithmetic", {"normalize": True}),
    "isotropic": ("isotropic", {}),
    "tsv": ("tsv", {}),
    "tsv-half": ("tsv", {"rank_fraction": 0.5}),
    "wudi-closed": ("wudi", {"solver": "closed_form"}),
    "wudi-iterative": ("wudi", {"steps": 20, "learning_rate": 1e-3}),
    "ties": ("ties", {"density": 0.5}),
    "ties-frequency": ("ties", {"density": 0.7, "majority_sign_method": "frequency"}),
    "ties-rescaled": ("ties", {"density": 0.5, "rescale": True}),
    "magnitude_prune": ("magnitude_prune", {"density": 0.5}),
    "breadcrumbs": ("breadcrumbs", {"density": 0.6, "gamma": 0.1}),
    "breadcrumbs_ties": ("breadcrumbs_ties", {"density": 0.6, "gamma": 0.1, "rescale": True}),
    "knots": ("knots", {"density": 0.5}),
    "dare_linear": ("dare_linear", {}),
    "dare_ties": ("dare_ties", {}),
    "della": ("della", {}),
    "della_linear": ("della_linear", {}),
    "iso_cts": ("iso_cts", {}),
    "iso_cts-none-shared": ("iso_cts", {"common_space_fraction": 0.0}),
    "ace": ("ace", {}),
    "ace-apart": ("ace", {"heterogeneity": 0.0}),
    "cat": ("cat", {}),
    "svd": ("svd", {}),
}
SCALED = [name for name in VARIANTS if not name.startswith("linear")]
MATRIX = [name for name in SCALED if method_class(VARIANTS[name][0]).scope == "matrix"]
SHAPES = [(6, 9), (9, 6), (5, 5), (1, 4), (4, 1), (7,), (2, 3, 2, 2)]


def make(variant: str, **options: Any) -> MethodConfig:
    name, own = VARIANTS[variant]
    return resolve_method(name, own | options)


def draw(shape: Sequence[int], count: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def decaying(rows: int, columns: int, decades: float, count: int) -> list[Tensor]:
    """Random matrices whose singular values fall evenly, on a logarithmic scale, over so many decades."""
    rank = min(rows, columns)
    values = torch.logspace(0, -decades, rank, dtype=torch.float64)
    matrices = []
    for task in draw((rows, columns), count):
        u, _, vh = torch.linalg.svd(task, full_matrices=False)
        matrices.append((u * values) @ vh)
    return matrices


def assert_near(actual: Tensor, expected: Any, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    assert actual.shape == expected.shape
    assert float((actual - expected).norm()) <= tolerance * max(float(expected.norm()), 1e-12)


# -- parity with plain implementations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [None, (0.5, 2.0, -0.25)])
def test_linear_is_the_weighted_mean_of_the_models(shape: tuple[int, ...], weights: tuple[float, ...] | None) -> None:
    base, *tasks = draw(shape, 4)
    merged = base + make("linear", weights=weights).merge(base, tasks)
    top, bottom = torch.zeros_like(base), 0.0
    for weight, task in zip(weights or (1.0, 1.0, 1.0), tasks, strict=True):
        top += weight * (base + task)
        bottom += weight
    assert_near(merged, top / bottom)


def test_linear_without_normalize_is_the_weighted_sum_of_task_vectors() -> None:
    base, *tasks = draw((3, 4), 4)
    merged = make("linear", weights=(0.5, 2.0, -0.25), normalize=False).merge(base, tasks)
    assert_near(merged, 0.5 * tasks[0] + 2.0 * tasks[1] - 0.25 * tasks[2])


def test_linear_refuses_weights_that_sum_to_zero_unless_they_are_not_normalized() -> None:
    base, *tasks = draw((3,), 3)
    with pytest.raises(InputError, match="normalize=False"):
        make("linear", weights=(1, -1)).merge(base, tasks)
    assert_near(make("linear", weights=(1, -1), normalize=False).merge(base, tasks), tasks[0] - tasks[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [None, (0.5, 2.0, -0.25)])
def test_task_arithmetic_is_a_scaled_sum(shape: tuple[int, ...], weights: tuple[float, ...] | None) -> None:
    base, *tasks = draw(shape, 4)
    expected = torch.zeros_like(base)
    for weight, task in zip(weights or (1.0, 1.0, 1.0), tasks, strict=True):
        expected += 0.3 * weight * task
    assert_near(make("task_arithmetic", scaling=0.3, weights=weights).merge(base, tasks), expected)


def test_task_arithmetic_scales_by_the_published_factor_by_default() -> None:
    base, *tasks = draw((3, 4), 3)
    assert_near(make("task_arithmetic").merge(base, tasks), 0.4 * (tasks[0] + tasks[1]))


def plain_tsv(tasks: Sequence[Tensor], kept: int) -> np.ndarray:
    """TSV-M, Algorithm 1, one triplet at a time."""
    left, values, right = [], [], []
    for task in tasks:
        u, s, vh = np.linalg.svd(task.numpy(), full_matrices=False)
        for place in range(kept):
            left.append(u[:, place])
            values.append(s[place])
            right.append(vh[place])
    p, _, qh = np.linalg.svd(np.stack(left, axis=1), full_matrices=False)
    r, _, wh = np.linalg.svd(np.stack(right, axis=0), full_matrices=False)
    return (p @ qh) @ np.diag(values) @ (r @ wh)


@pytest.mark.parametrize(
    ("shape", "count"), [((6, 9), 2), ((6, 9), 3), ((9, 6), 3), ((8, 8), 3), ((2, 5), 3), ((10, 10), 10)]
)
def test_tsv_keeps_and_orthogonalises_the_leading_triplets_of_every_task(shape: tuple[int, int], count: int) -> None:
    tasks = draw(shape, count)
    kept = max(1, min(shape) // count)
    merged = make("tsv", scaling=1.3).merge(torch.zeros(shape), tasks)
    assert_near(merged, 1.3 * plain_tsv(tasks, kept))


@pytest.mark.parametrize(("fraction", "kept"), [(1.0, 6), (0.5, 3), (0.34, 2), (0.01, 1), (0.0, 1)])
def test_tsv_keeps_the_asked_fraction_of_triplets_and_at_least_one(fraction: float, kept: int) -> None:
    tasks = draw((6, 9), 2)
    merged = make("tsv", rank_fraction=fraction).merge(torch.zeros(6, 9), tasks)
    assert_near(merged, plain_tsv(tasks, kept))


def test_tsv_weighs_task_matrices_before_it_decomposes_them() -> None:
    tasks = draw((6, 8), 2)
    merged = make("tsv", weights=(0.5, 2.0)).merge(torch.zeros(6, 8), tasks)
    assert_near(merged, plain_tsv([0.5 * tasks[0], 2.0 * tasks[1]], 3))


def plain_wudi_solution(tasks: Sequence[Tensor]) -> np.ndarray:
    """The least-norm tau of ``sum_i |(tau - tau_i) tau_i^T|^2 / |tau_i|^2``: all equations stacked, solved at once."""
    left = np.concatenate([task.numpy() / np.linalg.norm(task.numpy()) for task in tasks])
    right = np.concatenate([task.numpy() @ task.numpy().T / np.linalg.norm(task.numpy()) for task in tasks])
    return np.linalg.lstsq(left, right, rcond=None)[0].T


@pytest.mark.parametrize("shape", [(4, 20), (8, 5), (6, 12), (6, 18), (1, 7), (7, 1)])
@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 1.5)])
def test_wudi_closed_form_solves_the_stacked_least_squares(
    shape: tuple[int, int], weights: tuple[float, ...] | None
) -> None:
    tasks = draw(shape)
    own = [weight * task for weight, task in zip(weights or (1.0, 1.0, 1.0), tasks, strict=True)]
    merged = make("wudi-closed", scaling=0.7, weights=weights).merge(torch.zeros(shape), tasks)
    assert_near(merged, 0.7 * plain_wudi_solution(own), 1e-8)


def test_wudi_closed_form_is_exact_where_singular_values_span_four_decades() -> None:
    tasks = decaying(12, 16, decades=4, count=2)
    merged = make("wudi-closed").merge(torch.zeros(12, 16), tasks)
    assert_near(merged, plain_wudi_solution(tasks), 1e-6)


def test_wudi_closed_form_in_float32_agrees_with_float64() -> None:
    tasks = [task.float() for task in decaying(24, 32, decades=3.5, count=2)]
    single = make("wudi-closed").merge(torch.zeros(24, 32), tasks)
    double = make("wudi-closed").merge(torch.zeros(24, 32), [task.double() for task in tasks])
    assert single.dtype == torch.float32
    assert_near(single.double(), double, 1e-3)


def wudi_loss(tau: Tensor, tasks: Sequence[Tensor]) -> Tensor:
    loss = torch.zeros((), dtype=tau.dtype)
    for task in tasks:
        loss = loss + ((tau - task) @ task.T).square().sum() / task.square().sum()
    return loss


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 1.5)])
def test_wudi_iterative_is_adam_on_the_published_loss(
    shape: tuple[int, int], weights: tuple[float, ...] | None
) -> None:
    tasks = draw(shape)
    own = [weight * task for weight, task in zip(weights or (1.0, 1.0, 1.0), tasks, strict=True)]
    tau = (own[0] + own[1] + own[2]).requires_grad_(True)
    optimizer = torch.optim.Adam([tau], lr=1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        wudi_loss(tau, own).backward()
        optimizer.step()
    config = resolve_method("wudi", {"scaling": 0.7, "weights": weights, "steps": 40, "learning_rate": 1e-3})
    assert_near(config.merge(torch.zeros(shape), tasks), 0.7 * tau.detach(), 1e-8)


def test_wudi_defaults_to_the_published_solver() -> None:
    options = resolve_method("wudi", {}).options()
    assert (options["solver"], options["steps"], options["learning_rate"]) == ("iterative", 300, 1e-5)


def test_wudi_without_steps_is_the_sum() -> None:
    tasks = draw((4, 5))
    assert_near(make("wudi-iterative", steps=0).merge(torch.zeros(4, 5), tasks), tasks[0] + tasks[1] + tasks[2])


def test_wudi_closed_form_has_no_more_loss_than_the_iterative_solver_and_that_no_more_than_the_sum() -> None:
    tasks = draw((6, 8))
    closed = make("wudi-closed").merge(tasks[0], tasks)
    iterative = make("wudi-iterative").merge(tasks[0], tasks)
    start = tasks[0] + tasks[1] + tasks[2]
    losses = [float(wudi_loss(tau, tasks)) for tau in (closed, iterative, start)]
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (1, 4)])
def test_isotropic_flattens_the_spectrum_of_the_sum(shape: tuple[int, int]) -> None:
    tasks = draw(shape)
    merged = make("isotropic", scaling=0.7, weights=(0.5, 2.0, -1.0)).merge(torch.zeros(shape), tasks)
    summed = 0.5 * tasks[0] + 2.0 * tasks[1] - tasks[2]
    u, s, vh = np.linalg.svd(summed.numpy(), full_matrices=False)
    assert_near(merged, 0.7 * (u @ np.diag([sum(s) / len(s)] * len(s)) @ vh))


# -- what holds for every method ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7,)])
def test_the_order_of_sources_does_not_matter(variant: str, shape: tuple[int, ...]) -> None:
    base, *tasks = draw(shape, 4)
    weights = (0.5, 2.0, 1.5)
    expected = make(variant, weights=weights).merge(base, tasks)
    for order in itertools.permutations(range(3)):
        config = make(variant, weights=[weights[place] for place in order])
        assert_near(config.merge(base, [tasks[place] for place in order]), expected, 1e-8)


@pytest.mark.parametrize("variant", SCALED)
@pytest.mark.parametrize("shape", SHAPES)
def test_scaling_zero_gives_zeros(variant: str, shape: tuple[int, ...]) -> None:
    base, *tasks = draw(shape, 4)
    assert torch.equal(make(variant, scaling=0).merge(base, tasks), torch.zeros_like(base))


@pytest.mark.parametrize("variant", SCALED)
def test_the_result_is_proportional_to_the_scaling(variant: str) -> None:
    base, *tasks = draw((6, 9), 4)
    assert_near(
        make(variant, scaling=-2.5).merge(base, tasks), -2.5 * make(variant, scaling=1).merge(base, tasks), 1e-12
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 3])
def test_inputs_are_not_changed_nor_shared_with_the_result(variant: str, shape: tuple[int, ...], count: int) -> None:
    base, *tasks = draw(shape, count + 1)
    before = [tensor.clone() for tensor in (base, *tasks)]
    merged = make(variant).merge(base, tasks)
    merged += 1
    assert all(torch.equal(one, other) for one, other in zip((base, *tasks), before, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_result_has_the_shape_and_type_of_the_tasks(
    variant: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    base, *tasks = draw(shape, 4, dtype=dtype)
    merged = make(variant).merge(base, tasks)
    assert (merged.shape, merged.dtype, merged.requires_grad) == (base.shape, dtype, False)


@pytest.mark.parametrize(
    ("method", "options"), [("linear", {}), ("linear", {"weights": (1.0,)}), ("task_arithmetic", {"scaling": 1})]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_source_of_weight_one_comes_back_bit_for_bit(
    method: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = 10 ** (6 * torch.rand(4000, generator=generator) - 4)
    base = (sizes * torch.randn(4000, generator=generator)).to(dtype)
    source = (base + 0.01 * base.abs() * torch.randn(4000, generator=generator)).to(dtype)
    source[::10] = torch.randn(400, generator=generator).to(dtype)
    source[1::50], base[2::50] = 0, 0
    task = source.double() - base.double()
    merged = base.double() + resolve_method(method, options).merge(base.double(), [task])
    assert torch.equal(merged.to(dtype), source)


@pytest.mark.parametrize("variant", ["linear", "tsv", "wudi-closed", "wudi-iterative"])
def test_one_matrix_alone_comes_back(variant: str) -> None:
    for task in (*draw((6, 9), 1), *draw((9, 6), 1)):
        assert_near(make(variant).merge(torch.zeros_like(task), [task]), task)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_task_vectors_give_zeros(variant: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base = torch.ones(shape, dtype=dtype)
    tasks = [torch.zeros(shape, dtype=dtype)] * 3
    assert torch.equal(make(variant).merge(base, tasks), torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_task_vector_among_others_gives_finite_values(
    variant: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    base, *tasks = draw(shape, 4, dtype=dtype)
    tasks[1] = torch.zeros_like(base)
    merged = make(variant).merge(base, tasks)
    assert bool(merged.isfinite().all())
    assert bool(merged.any())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-25, 1e-12])
def test_very_small_task_vectors_give_finite_values(variant: str, dtype: torch.dtype, size: float) -> None:
    base, *tasks = draw((5, 6), 4, dtype=dtype)
    assert bool(make(variant).merge(base, [size * task for task in tasks]).isfinite().all())


@pytest.mark.parametrize("variant", ["wudi-closed", "isotropic", "linear", "task_arithmetic"])
def test_a_zero_task_vector_among_others_adds_nothing_to_a_sum(variant: str) -> None:
    base, *tasks = draw((6, 9), 3)
    options = {"weights": (1, 1, 0)} if variant == "linear" else {}
    alone = make(variant).merge(base, tasks)
    beside = make(variant, **options).merge(base, [*tasks, torch.zeros_like(base)])
    assert_near(beside, alone, 1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(6, 9), (7,)])
def test_a_source_of_weight_zero_counts_like_a_zero_task_vector(variant: str, shape: tuple[int, ...]) -> None:
    base, *tasks = draw(shape, 4)
    by_weight = make(variant, weights=(1, 0, 1)).merge(base, tasks)
    by_hand = make(variant, weights=(1, 0, 1)).merge(base, [tasks[0], torch.zeros_like(base), tasks[2]])
    assert_near(by_weight, by_hand, 1e-8)


@pytest.mark.parametrize("variant", MATRIX)
@pytest.mark.parametrize("shape", [(7,), (), (2, 3, 2, 2)])
def test_matrix_methods_average_what_is_no_matrix(variant: str, shape: tuple[int, ...]) -> None:
    base, *tasks = draw(shape, 4)
    merged = make(variant, scaling=0.7, weights=(0.5, 2.0, -1.0)).merge(base, tasks)
    assert_near(merged, 0.7 * (0.5 * tasks[0] + 2.0 * tasks[1] - tasks[2]) / 3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_wrong_number_of_weights_is_refused(variant: str) -> None:
    base, *tasks = draw((3, 4), 4)
    with pytest.raises(ValueError, match=r"."):
        make(variant, weights=(1.0, 2.0)).merge(base, tasks)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_by_name_are_never_ignored(variant: str) -> None:
    """They need the sources' names first, which a method does not know."""
    base, *tasks = draw((3, 4), 3)
    with pytest.raises(InputError, match="names of the sources"):
        make(variant, weights={"a": 1, "b": 0}).merge(base, tasks)


# -- what a tensor's role means to a method ----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", MATRIX)
def test_a_transposed_weight_is_turned_before_it_is_merged(variant: str) -> None:
    base, *tasks = draw((6, 9), 4)
    merged = apply_method(make(variant), base, tasks, "conv1d")
    assert_near(merged, make(variant).merge(base.T, [task.T for task in tasks]).T)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stack_of_weights_is_merged_one_by_one(variant: str) -> None:
    base, *tasks = draw((3, 4, 5), 4)
    merged = apply_method(make(variant), base, tasks, "stack")
    for place in range(3):
        assert_near(merged[place], make(variant).merge(base[place], [task[place] for task in tasks]))


@pytest.mark.parametrize("variant", MATRIX)
@pytest.mark.parametrize("role", ["embedding", "other"])
def test_matrix_methods_average_lookup_tables(variant: str, role: Any) -> None:
    base, *tasks = draw((6, 9), 4)
    assert_near(apply_method(make(variant), base, tasks, role), (tasks[0] + tasks[1] + tasks[2]) / 3)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "option", "given", "value"),
    [
        ("tsv", "scaling", "0.3", 0.3),
        ("tsv", "scaling", 1, 1.0),
        ("tsv", "rank_fraction", "0.25", 0.25),
        ("tsv", "rank_fraction", "none", None),
        ("tsv", "rank_fraction", "null", None),
        ("tsv", "weights", "1,2.5", (1.0, 2.5)),
        ("tsv", "weights", [1, 2], (1.0, 2.0)),
        ("tsv", "weights", "0.5", (0.5,)),
        ("tsv", "weights", "a=1,b=2", {"a": 1.0, "b": 2.0}),
        ("tsv", "weights", "a=1, b=2", {"a": 1.0, "b": 2.0}),
        ("tsv", "weights", {"a": "1", "b": 2}, {"a": 1.0, "b": 2.0}),
        ("tsv", "weights", "none", None),
        ("linear", "normalize", "true", True),
        ("linear", "normalize", "False", False),
        ("linear", "normalize", "no", False),
        ("wudi", "steps", "40", 40),
        ("wudi", "steps", 40.0, 40),
        ("wudi", "learning_rate", "1e-4", 1e-4),
        ("wudi", "solver", "closed_form", "closed_form"),
        ("fda", "unit", "self_attn,mlp", ("self_attn", "mlp")),
        ("fda", "unit", ["mlp"], ("mlp",)),
        ("fda", "unit", "none", None),
        ("fda", "patience", "none", None),
        ("fda", "patience", "10", 10),
        ("fda", "position_embeddings", "yes", True),
        ("fda", "position_embeddings", "none", None),
        ("fda", "adaptation_distance", "mae", "mae"),
        ("fda", "adaptation_distance", "none", None),
    ],
)
def test_options_may_be_given_as_text_and_plain_values(method: str, option: str, given: Any, value: Any) -> None:
    result = getattr(resolve_method(method, {option: given}), option)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("method", "option", "given"),
    [
        ("tsv", "scaling", "much"),
        ("tsv", "scaling", None),
        ("tsv", "scaling", True),
        ("tsv", "scaling", [1]),
        ("tsv", "weights", 0.5),
        ("tsv", "weights", "a=x"),
        ("tsv", "weights", {"a": None}),
        ("tsv", "rank_fraction", 1.5),
        ("tsv", "rank_fraction", -0.1),
        ("linear", "normalize", "maybe"),
        ("linear", "normalize", 2),
        ("wudi", "steps", -1),
        ("wudi", "steps", 2.5),
        ("wudi", "steps", "many"),
        ("wudi", "steps", None),
        ("wudi", "steps", True),
        ("wudi", "learning_rate", -1e-3),
        ("wudi", "solver", "closedform"),
        ("fda", "num_anchors", 0),
        ("fda", "batch_size", 0),
        ("fda", "patience", 0),
        ("fda", "epochs", -1),
        ("fda", "distance", "cos"),
        ("fda", "initial", 3),
        ("fda", "unit", 3),
    ],
)
def test_options_of_the_wrong_type_or_out_of_bounds_are_refused_by_name(method: str, option: str, given: Any) -> None:
    with pytest.raises(InputError, match=f"method '{method}': option '{option}' must be"):
        resolve_method(method, {option: given})


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("tsv", "scaling"),
        ("tsv", "rank_fraction"),
        ("wudi", "steps"),
        ("wudi", "learning_rate"),
        ("fda", "learning_rate"),
        ("fda", "epochs"),
        ("fda", "adaptation_learning_rate"),
    ],
)
def test_nan_and_infinity_are_refused(method: str, option: str, value: float, text: bool) -> None:
    with pytest.raises(InputError, match=option):
        resolve_method(method, {option: str(value) if text else value})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "tsv"])
def test_nan_and_infinity_are_refused_as_weights(method: str, bad: float) -> None:
    for weights in ((1.0, bad), {"a": 1.0, "b": bad}, f"1,{bad}", f"a=1,b={bad}"):
        with pytest.raises(InputError, match="weights"):
            resolve_method(method, {"weights": weights})


def test_the_bounds_stand_in_the_message() -> None:
    with pytest.raises(InputError, match=r"at least 0 and at most 1, not 2\.0"):
        resolve_method("tsv", {"rank_fraction": 2})


def test_an_unknown_option_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"method 'tsv' has no option 'scalling': did you mean 'scaling'\?"):
        resolve_method("tsv", {"scalling": 1})
    with pytest.raises(InputError, match=r"did you mean 'num_anchors'\?"):
        resolve_method("fda", {"num_anchor": 1})


def test_an_unknown_method_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"there is no method 'task_aritmetic': did you mean 'task_arithmetic'\?"):
        resolve_method("task_aritmetic", {})
    with pytest.raises(InputError, match=r"there is no method 'tvs'.*Known: .*tsv"):
        method_class("tvs")


def test_a_ready_config_is_taken_as_it_is_and_without_options() -> None:
    config = resolve_method("tsv", {"scaling": 1.2})
    assert resolve_method(config, {}) is config
    with pytest.raises(InputError, match="scaling"):
        resolve_method(config, {"scaling": 1.3})


def test_a_method_that_is_neither_name_nor_config_is_refused() -> None:
    with pytest.raises(InputError, match="not int"):
        resolve_method(3, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "isotropic", "tsv", "wudi", "fda"])
def test_configs_are_frozen(name: str) -> None:
    config = resolve_method(name, {})
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, None)


def test_a_config_does_not_share_the_weights_it_was_given() -> None:
    by_name, in_order = {"a": 1.0}, [1.0]
    configs = [resolve_method("tsv", {"weights": by_name}), resolve_method("tsv", {"weights": in_order})]
    by_name["b"] = 2.0
    in_order.append(2.0)
    assert [config.weights for config in configs] == [{"a": 1.0}, (1.0,)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {"weights": (1.0, 2.0), "normalize": False}),
        ("tsv", {"weights": {"a": 1.0}, "scaling": 0.5}),
        ("wudi", {"solver": "closed_form"}),
        ("fda", {"initial": "tsv", "scaling": 1.2, "unit": "mlp", "rest": "linear"}),
    ],
)
def test_the_options_of_a_config_make_the_same_config_again(method: str, options: dict[str, Any]) -> None:
    config = resolve_method(method, options)
    assert resolve_method(method, config.options()) == config


def test_methods_lists_every_method_and_prints_every_option() -> None:
    listed = methods()
    assert {"fda", "isotropic", "linear", "task_arithmetic", "tsv", "wudi"} <= set(listed)
    for name, info in listed.items():
        text = str(info)
        assert text.startswith(name)
        assert info.summary and info.summary in text
        assert info.paper and info.paper in text
        assert [option.name for option in info.options] == list(method_class(name).option_fields())
        for option in info.options:
            assert option.help
            assert any(line.split()[:1] == [option.name] and option.help in line for line in text.splitlines())


# -- weights by name ---------------------------------------------------------------------------------------------------


def test_weights_by_name_are_put_in_the_order_of_the_sources() -> None:
    config = resolve_method("tsv", {"weights": "b=2,a=1,c=3"})
    ordered = with_source_names(config, ["a", "b", "c"])
    assert ordered.weights == (1.0, 2.0, 3.0)  # type: ignore[attr-defined]
    assert config.weights == {"b": 2.0, "a": 1.0, "c": 3.0}  # type: ignore[attr-defined]


def test_weights_in_order_or_absent_stay_as_they_are() -> None:
    for options in ({}, {"weights": (1.0, 2.0)}):
        config = resolve_method("linear", options)
        assert with_source_names(config, ["a", "b"]) == config


def test_weights_for_unknown_or_missing_sources_are_refused() -> None:
    with pytest.raises(InputError, match=r"there is no source 'sst3': did you mean 'sst2'\?"):
        with_source_names(resolve_method("tsv", {"weights": {"sst3": 1, "trec": 2}}), ["sst2", "trec"])
    with pytest.raises(InputError, match="no weight for trec"):
        with_source_names(resolve_method("tsv", {"weights": {"sst2": 1}}), ["sst2", "trec"])


def test_a_wrong_number_of_weights_is_refused_with_the_names_of_the_sources() -> None:
    with pytest.raises(InputError, match=r"1 given for 2 sources \(a, b\)"):
        with_source_names(resolve_method("linear", {"weights": [1]}), ["a", "b"])
    with pytest.raises(InputError, match="weights"):
        with_source_names(resolve_method("linear", {"weights": []}), ["a", "b"])


# -- options of the merge by anchors -----------------------------------------------------------------------------------


def test_options_that_fda_lacks_go_to_its_initial_method() -> None:
    config = FDAConfig.from_options({"initial": "tsv", "scaling": 1.2, "num_anchors": 8})
    assert config.initial == resolve_method("tsv", {"scaling": 1.2})
    assert config.num_anchors == 8
    assert resolve_method("fda", {"initial": "tsv", "scaling": 1.2, "num_anchors": 8}) == config


def test_initial_and_rest_may_be_names_mappings_or_configs() -> None:
    tsv = resolve_method("tsv", {"scaling": 1.2})
    nested = {"method": "tsv", "scaling": "1.2"}
    config = FDAConfig.from_options({"initial": nested, "rest": "linear"})
    assert (config.initial, config.rest) == (tsv, resolve_method("linear", {}))
    assert nested == {"method": "tsv", "scaling": "1.2"}
    assert FDAConfig(initial=tsv).initial is tsv
    assert FDAConfig(initial="tsv").initial == resolve_method("tsv", {})
    assert (FDAConfig().initial, FDAConfig().rest) == (None, None)


def test_where_to_start_follows_from_what_is_given() -> None:
    chosen = FDAConfig().with_sources(["a"], all_have_weights=True)
    start = resolve_method("isotropic", {"scaling": 3.0})
    assert (chosen.initial, chosen.rest) == (start, resolve_method("task_arithmetic", {}))
    assert chosen.parametrization == "coefficients"
    assert FDAConfig().with_sources(["a"], True, as_adapter=True).parametrization == "factors"
    assert FDAConfig().with_sources(["a"], False, as_adapter=True).parametrization == "parameters"
    thin = FDAConfig().with_sources(["a"], all_have_weights=True, all_thin=True)
    assert thin.initial == resolve_method("task_arithmetic", {"scaling": 0.3})
    chosen = FDAConfig().with_sources(["a"], all_have_weights=False)
    assert (chosen.initial, chosen.rest, chosen.parametrization) == ("base", "base", "parameters")


def test_options_of_another_method_need_an_initial_method() -> None:
    with pytest.raises(InputError, match=r"no option 'scaling'.*initial=METHOD"):
        FDAConfig.from_options({"scaling": 1.2})
    with pytest.raises(InputError, match="no option 'scaling'"):
        FDAConfig.from_options({"initial": {"method": "tsv"}, "scaling": 1.2})


def test_a_mistyped_option_beside_an_initial_method_suggests_those_of_both() -> None:
    with pytest.raises(InputError, match="num_anchors"):
        FDAConfig.from_options({"initial": "tsv", "num_anchor": 4})
    with pytest.raises(InputError, match="scaling"):
        FDAConfig.from_options({"initial": "tsv", "scalling": 4})


@pytest.mark.parametrize("role", ["initial", "rest"])
def test_initial_and_rest_must_be_parameter_space_methods(role: str) -> None:
    with pytest.raises(InputError, match=f"{role} must be 'base' or a parameter-space method"):
        FDAConfig.from_options({role: "fda"})
    with pytest.raises(InputError, match=r"did you mean 'tsv'\?"):
        FDAConfig.from_options({role: "tsvv"})


def test_weights_by_name_reach_initial_and_rest() -> None:
    config = FDAConfig.from_options(
        {"initial": "tsv", "weights": "b=2,a=1", "rest": {"method": "linear", "weights": {"a": 3, "b": 4}}}
    ).with_sources(["a", "b"], all_have_weights=True)
    assert config.initial.weights == (1.0, 2.0)  # type: ignore[union-attr]
    assert config.rest.weights == (3.0, 4.0)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="no weight for c"):
        FDAConfig.from_options({"initial": "tsv", "weights": "a=1,b=2"}).with_sources(["a", "b", "c"], True)


BLOCKS = {"steps": 25, "num_anchors": 64, "unit": ("block",), "adaptation_distance": "shift"}
DECODER = {**BLOCKS, "num_tokens": 5, "position_embeddings": False, "adaptation_distance": "mse"}
NEAR = {"epochs": 20, "adaptation_learning_rate": 3e-2}
FAR = {"epochs": 60, "adaptation_learning_rate": 3e-2}


@pytest.mark.parametrize(
    ("family", "size", "options", "expected"),
    [
        ("vision", 768, {"initial": "base"}, {**BLOCKS, **FAR, "num_tokens": None, "position_embeddings": False}),
        ("vision", 768, {"initial": "tsv"}, {**BLOCKS, **NEAR}),
        ("vision", 768, {"parametrization": "parameters"}, {"epochs": 100, "adaptation_learning_rate": 1e-5}),
        ("encoder", 768, {"initial": "base"}, {**BLOCKS, **FAR, "num_tokens": 5, "position_embeddings": True}),
        ("encoder", 1024, {"initial": "wudi"}, {**BLOCKS, **NEAR}),
        ("encoder", 768, {"optimizer": "adamw"}, {"steps": 1200, "patience": 40}),
        ("encoder", 768, {"parametrization": "parameters"}, {"epochs": 125, "adaptation_learning_rate": 5e-5}),
        ("encoder", 1024, {"parametrization": "parameters"}, {"epochs": 25, "adaptation_learning_rate": 5e-5}),
        ("encoder", 768, {"parametrization": "factors", "initial": "tsv"}, {"epochs": 40, "interpolation": 1.0}),
        ("encoder", 768, {"parametrization": "coefficients", "initial": "tsv"}, {"epochs": 20, "interpolation": 0.5}),
        ("decoder", 128, {"parametrization": "factors", "initial": "base"}, {"epochs": 60, "interpolation": 1.0}),
        ("decoder", 128, {"initial": "base"}, {**DECODER, **FAR}),
        ("decoder", 128, {"initial": "tsv"}, {**DECODER, **FAR}),
        ("decoder", 768, {"initial": "tsv"}, {**DECODER, **FAR, "num_anchors": 384, "epochs": 10}),
        ("decoder", 5120, {"initial": "tsv"}, {**DECODER, **FAR, "num_anchors": 1024, "epochs": 4}),
        ("decoder", 5120, {"initial": "tsv", "num_anchors": 128}, {**DECODER, **FAR, "num_anchors": 128, "epochs": 30}),
        ("decoder", 5120, {"parametrization": "parameters"}, {"epochs": 25, "adaptation_learning_rate": 5e-5}),
    ],
)
def test_open_options_are_chosen_for_the_kind_of_model(
    family: Any, size: int, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = FDAConfig(**options).for_family(family, size)
    assert {name: getattr(config, name) for name in expected} == expected
    open_still = {name for name, value in config.options().items() if value is None}
    assert open_still <= {"num_tokens", "rest", "initial", "parametrization"}
    assert (config.learning_rate, config.distance, config.initialization) == (1e-2, "cosine", "weights")
    assert config.batch_size == 128


@pytest.mark.parametrize(
    ("initial", "expected"),
    [("tsv", 0.5), ("isotropic", 0.5), ("wudi", 1.0), ("task_arithmetic", 1.0), ("base", 1.0)],
)
def test_merged_text_models_stay_half_way_to_a_start_in_singular_directions(initial: str, expected: float) -> None:
    assert FDAConfig(initial=initial).for_family("vision", 64).interpolation == 1.0
    assert FDAConfig(initial=initial).for_family("decoder", 64).interpolation == expected
    assert FDAConfig(initial=initial).for_family("encoder", 64).interpolation == expected
    assert FDAConfig(initial=initial, interpolation=0.7).for_family("encoder", 64).interpolation == 0.7


def test_many_rows_are_passed_over_less_often_but_where_the_passes_are_given() -> None:
    assert [FDAConfig().for_family("encoder", 64, rows).epochs for rows in (0, 64, 65, 128, 1000)] == [
        20,
        20,
        20,
        10,
        2,
    ]
    assert FDAConfig(epochs=7).for_family("encoder", 64, rows=1000).epochs == 7
    distill = DistillConfig().completed(["a"], "encoder", all_thin=False, rows=640)
    assert distill.epochs == 1
    assert DistillConfig(epochs=7).completed(["a"], "encoder", all_thin=False, rows=640).epochs == 7


def test_options_that_were_given_are_not_replaced_by_published_ones() -> None:
    given = {
        "unit": ("block",),
        "num_anchors": 3,
        "num_tokens": 2,
        "steps": 0,
        "position_embeddings": False,
        "epochs": 0,
        "adaptation_learning_rate": 0.5,
        "adaptation_distance": "mae",
        "patience": None,
    }
    config = FDAConfig(**given).for_family("encoder", 1024)
    assert {name: getattr(config, name) for name in given} == given


def test_the_options_that_determine_the_anchors_leave_the_merge_out() -> None:
    kept = FDAConfig(initial="tsv", rest="linear").construction()
    assert not {"initial", "rest", "epochs", "adaptation_learning_rate", "adaptation_distance", "batch_size"} & set(
        kept
    )
    assert {"num_anchors", "num_tokens", "steps", "learning_rate", "distance", "unit", "initialization"} <= set(kept)


@pytest.mark.parametrize("density", [0.3, 0.61, 1.0])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_trimmed_methods_do_what_peft_does(density: float, sign: Any) -> None:
    from peft.utils import merge_utils

    tasks, ones = draw((7, 5), 3), torch.ones(3, dtype=torch.float64)
    base = torch.zeros(7, 5, dtype=torch.float64)
    found = resolve_method("ties", {"density": density, "majority_sign_method": sign}).merge(base, tasks)
    torch.testing.assert_close(found, merge_utils.ties(list(tasks), ones, density, sign))
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    pruned = resolve_method("magnitude_prune", {"density": density, "weights": weights.tolist()}).merge(base, tasks)
    torch.testing.assert_close(pruned, merge_utils.magnitude_prune(list(tasks), weights, density))


def test_dropped_entries_are_made_up_for() -> None:
    task = torch.ones(200, 300, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    found = resolve_method("dare_linear", {"density": 0.25}).merge(torch.zeros_like(task), [task], generator)
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert float(found.mean()) == pytest.approx(1.0, abs=0.02)
    signed = resolve_method("dare_ties", {"density": 0.5, "normalize": True})
    tasks = [task, -2 * task]
    merged = signed.merge(torch.zeros_like(task), tasks, torch.Generator().manual_seed(0))
    assert set(merged.unique().tolist()) == {0.0, 2.0, -4.0}  # of one that stays alone itself; of both the larger


def test_knots_of_one_source_is_that_source_and_its_columns_share_a_basis() -> None:
    one, other = draw((6, 9), 2)
    config = resolve_method("knots", {})
    torch.testing.assert_close(config.merge(torch.zeros(6, 9), [one]), one)
    stacked = torch.cat([one, other], dim=1)
    merged = config.merge(torch.zeros(6, 9), [one, other])
    basis = torch.linalg.svd(stacked, full_matrices=False)[0]
    torch.testing.assert_close(basis @ (basis.mT @ merged), merged)


@pytest.mark.parametrize("method", ["tsv", "isotropic", "iso_cts"])
def test_rotating_methods_commute_with_changes_of_basis(method: str) -> None:
    config = resolve_method(method, {})
    assert config.rotates
    tasks = draw((6, 9), 3)
    left, right = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0] for size in (6, 9))
    turned = config.merge(torch.zeros(6, 9), [left @ task @ right for task in tasks])
    torch.testing.assert_close(turned, left @ config.merge(torch.zeros(6, 9), tasks) @ right)
