"""Methods that go from the base towards sources by a rule of their own, and two that work on singular directions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import hf_fda
from hf_fda.errors import InputError
from hf_fda.merge_methods import resolve_method
from hf_fda.merge_methods.arcee_fusion import divergence
from hf_fda.merge_methods.iso_cts import shared_out

Library = Callable[[str], tuple[Path, list[Path]]]


def draw(count: int, shape: tuple[int, ...] = (6, 9), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def merge(method: str, base: Tensor, tasks: list[Tensor], **options: Any) -> Tensor:
    return resolve_method(method, options).merge(base, tasks)


# -- model_stock -------------------------------------------------------------------------------------------------------


def cosine(first: Tensor, second: Tensor) -> float:
    return float((first * second).sum() / first.norm() / second.norm())


def test_model_stock_of_two_follows_from_the_angle_between_them() -> None:
    base, one, two = draw(3)
    c = cosine(one, two)
    torch.testing.assert_close(merge("model_stock", base, [one, two]), 2 * c / (1 + c) * (one + two) / 2)


def test_model_stock_of_more_takes_the_mean_angle_of_all_pairs() -> None:
    base, *tasks = draw(4)
    c = (cosine(tasks[0], tasks[1]) + cosine(tasks[0], tasks[2]) + cosine(tasks[1], tasks[2])) / 3
    expected = 3 * c / (1 + 2 * c) * (tasks[0] + tasks[1] + tasks[2]) / 3
    torch.testing.assert_close(merge("model_stock", base, tasks), expected)


def test_model_stock_by_filter_is_model_stock_of_each_row() -> None:
    base, *tasks = draw(3)
    found = merge("model_stock", base, tasks, filter_wise=True)
    for row in range(6):
        torch.testing.assert_close(found[row], merge("model_stock", base[row], [task[row] for task in tasks]))


def test_model_stock_takes_equal_sources_whole_and_of_orthogonal_or_opposite_ones_nothing() -> None:
    base, one = draw(2)
    torch.testing.assert_close(merge("model_stock", base, [one, one.clone(), one.clone()]), one)
    left, right = torch.eye(2, dtype=torch.float64)
    for tasks in ([left, right], [one, -one], [torch.zeros_like(one)] * 2):
        assert not bool(merge("model_stock", torch.ones_like(tasks[0]), tasks).any())


def test_model_stock_does_not_depend_on_how_far_models_were_tuned() -> None:
    base, *tasks = draw(4)
    small = merge("model_stock", base, [1e-7 * task for task in tasks])
    torch.testing.assert_close(1e7 * small, merge("model_stock", base, tasks))


# -- nearswap ----------------------------------------------------------------------------------------------------------


def test_nearswap_weighs_base_and_source_by_their_distance() -> None:
    base, task = draw(2)
    source = base + task
    weight = (0.3 / (base - source).abs()).clamp(0, 1)
    expected = weight * source + (1 - weight) * base
    torch.testing.assert_close(base + merge("nearswap", base, [task], t=0.3), expected)
    assert not bool(merge("nearswap", base, [task], t=0).any())
    assert torch.equal(merge("nearswap", base, [task], t=100), task)


# -- passthrough -------------------------------------------------------------------------------------------------------


def test_passthrough_is_the_source_or_its_multiple() -> None:
    base, task = draw(2)
    assert torch.equal(merge("passthrough", base, [task]), task)
    torch.testing.assert_close(base + merge("passthrough", base, [task], scale=-0.4), -0.4 * (base + task))
    assert resolve_method("passthrough", {}).coefficients(1) == (1.0,)
    assert resolve_method("passthrough", {"scale": 2}).coefficients(1) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_source_that_passes_through_comes_back_bit_for_bit(dtype: str, library: Library, tmp_path: Path) -> None:
    base, (source, _) = library("llama")
    merged = hf_fda.merge(base, [source], "passthrough", tmp_path / "out", dtype=dtype, device="cpu", quiet=True)
    found, expected = (load_file(folder / "model.safetensors") for folder in (merged.folder, source))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].to(getattr(torch, dtype))) for name in found)


def test_no_adapter_holds_a_scaled_model(library: Library, tmp_path: Path) -> None:
    base, (source, _) = library("llama")
    with pytest.raises(InputError, match="changes what no source does"):
        hf_fda.plan(base, [source], "passthrough", tmp_path / "out", as_adapter=True, scale=0.5, device="cpu")
    hf_fda.plan(base, [source], "passthrough", tmp_path / "out", as_adapter=True, device="cpu")


# -- arcee_fusion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 30), (200,), (4, 5, 30)])
def test_arcee_fusion_takes_the_entries_of_outstanding_importance(shape: tuple[int, ...]) -> None:
    base, task = draw(2, shape)
    task = 0.01 * task
    source = base + task
    p, q = (tensor.softmax(-1) + 1e-8 for tensor in (source, base))
    importance = task.abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    low, middle, high = (ordered[int(part * (len(ordered) - 1))] for part in (0.25, 0.5, 0.75))
    chosen = importance >= middle + 1.5 * (high - low)
    assert 0 < int(chosen.sum()) < len(ordered) / 2
    assert torch.equal(merge("arcee_fusion", base, [task]), task * chosen)


def test_divergences_of_near_models_survive_float32() -> None:
    base, task = draw(2, (20, 50))
    found = divergence(base.float(), (base + 1e-3 * task).float())
    exact = divergence(base.float().double(), (base + 1e-3 * task).float().double())
    torch.testing.assert_close(found.double(), exact)
    assert bool((found >= 0).all())


def test_arcee_fusion_of_an_equal_source_changes_nothing() -> None:
    (base,) = draw(1)
    assert not bool(merge("arcee_fusion", base, [torch.zeros_like(base)]).any())
    assert merge("arcee_fusion", base[0, 0], [base[0, 1]]).shape == ()


# -- iso_cts -----------------------------------------------------------------------------------------------------------


def plain_iso_cts(tasks: list[Tensor], fraction: float) -> np.ndarray:
    """Iso-CTS, Algorithm 2."""
    arrays = [task.numpy() for task in tasks]
    directions = min(arrays[0].shape)
    each = round((directions - int(directions * fraction)) / len(arrays))
    common = directions - each * len(arrays)
    u, s, vh = np.linalg.svd(sum(arrays), full_matrices=False)
    left, values, right = [u[:, :common]], [s[:common]], [vh[:common]]
    for array in arrays:
        own_u, own_s, own_vh = np.linalg.svd(array - u[:, :common] @ u[:, :common].T @ array, full_matrices=False)
        left.append(own_u[:, :each])
        values.append(own_s[:each])
        right.append(own_vh[:each])
    p, _, qh = np.linalg.svd(np.concatenate(left, axis=1), full_matrices=False)
    r, _, wh = np.linalg.svd(np.concatenate(right, axis=0), full_matrices=False)
    return np.concatenate(values).mean() * (p @ qh) @ (r @ wh)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (15, 15)])
@pytest.mark.parametrize(("count", "fraction"), [(2, 0.8), (3, 0.8), (3, 0.5), (2, 1.0), (4, 0.2)])
def test_iso_cts_flattens_shared_and_own_directions(shape: tuple[int, int], count: int, fraction: float) -> None:
    tasks = draw(count, shape)
    found = merge("iso_cts", torch.zeros(shape), tasks, common_space_fraction=fraction, scaling=1.3)
    torch.testing.assert_close(found, 1.3 * torch.from_numpy(plain_iso_cts(tasks, fraction)))


def test_iso_cts_has_a_flat_spectrum() -> None:
    values = torch.linalg.svdvals(merge("iso_cts", torch.zeros(12, 20), draw(3, (12, 20))))
    torch.testing.assert_close(values, values.mean().expand(12))


def test_iso_cts_of_shared_directions_alone_is_iso_c() -> None:
    base, *tasks = draw(4)
    torch.testing.assert_close(
        merge("iso_cts", base, tasks, common_space_fraction=1.0), merge("isotropic", base, tasks)
    )


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("directions", [1, 2, 16, 64])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8, 1.0])
def test_all_directions_are_shared_out(directions: int, count: int, fraction: float) -> None:
    common, each = shared_out(directions, count, fraction)
    assert common >= 0 and each >= 0 and common + count * each == directions


# -- ace ---------------------------------------------------------------------------------------------------------------


def plain_ace(tasks: list[Tensor], epsilon: float, threshold: float, fraction: float) -> np.ndarray:
    """ACE-Merging as its authors run it, step by step."""
    arrays = [task.numpy() for task in tasks]
    width = arrays[0].shape[1]
    sizes = [np.trace(array.T @ array) for array in arrays]
    logs = np.log(np.array(sizes) + 1e-12)
    apart = logs.var(ddof=1) / (logs.mean() ** 2 + 1e-12) > threshold
    top, bottom, grams = 0.0, 0.0, []
    for array in arrays:
        centred = array - array.mean(axis=0)
        gram, own = centred.T @ centred, epsilon
        if apart:
            gram, own = gram / np.trace(gram), epsilon / np.trace(gram)
        grams.append(gram)
        top = top + centred @ (gram + own * np.eye(width))
        bottom = bottom + gram + own * np.eye(width)
    prior = sum(grams).mean(axis=0) / (np.mean(sizes) if apart else 1)
    merged = top @ np.linalg.inv(bottom + np.ones((width, 1)) * prior)
    if apart:
        rest = sum(array @ (gram - bottom / len(arrays)) for array, gram in zip(arrays, grams, strict=True))
        u, s, vh = np.linalg.svd(merged + rest, full_matrices=False)
        kept = int(len(s) * fraction)
        merged = merged + s[:kept].mean() * u[:, :kept] @ vh[:kept]
    return merged


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("sizes", [(1.0, 1.0, 1.0), (0.1, 1.0, 5.0)])
def test_ace_solves_least_squares_with_covariances_of_the_task_matrices(
    shape: tuple[int, int], sizes: tuple[float, ...]
) -> None:
    tasks = [size * task for size, task in zip(sizes, draw(3, shape), strict=True)]
    found = merge("ace", torch.zeros(shape), tasks, scaling=0.7)
    torch.testing.assert_close(found, 0.7 * torch.from_numpy(plain_ace(tasks, 1e-2, 0.3, 0.3)), rtol=1e-6, atol=1e-8)


def test_a_task_matrix_of_zeros_takes_no_part_in_ace() -> None:
    base, *tasks = draw(4)
    alone = merge("ace", base, tasks)
    torch.testing.assert_close(merge("ace", base, [*tasks, torch.zeros_like(base)]), alone)
    torch.testing.assert_close(merge("ace", base, [*tasks, tasks[0]], weights=(1, 1, 1, 0)), alone)
