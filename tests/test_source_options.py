"""Options with a value for each source, how many sources a method merges, and methods that are not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_fda
from hf_fda.errors import InputError
from hf_fda.merge_methods import FDAConfig, method_class, methods, resolve_method, with_source_names

Library = Callable[[str], tuple[Path, list[Path]]]

PER_SOURCE = [
    ("ties", "density"),
    ("magnitude_prune", "density"),
    ("knots", "density"),
    ("dare_linear", "density"),
    ("dare_ties", "density"),
    ("breadcrumbs", "density"),
    ("breadcrumbs", "gamma"),
    ("breadcrumbs_ties", "gamma"),
    ("della", "density"),
    ("della_linear", "epsilon"),
]


def draw(count: int, shape: tuple[int, ...] = (6, 9)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize(("method", "option"), PER_SOURCE)
@pytest.mark.parametrize(
    ("given", "value"),
    [
        (0.25, 0.25),
        ("0.25", 0.25),
        (0, 0.0),
        ("0.1,0.2", (0.1, 0.2)),
        ([0.1, 0.2], (0.1, 0.2)),
        ("a=0.1,b=0.2", {"a": 0.1, "b": 0.2}),
        ({"a": "0.1", "b": 0.2}, {"a": 0.1, "b": 0.2}),
    ],
)
def test_a_value_for_each_source_is_a_number_a_list_or_by_name(
    method: str, option: str, given: Any, value: Any
) -> None:
    others = {"density": 0.5} if option == "epsilon" else {"epsilon": 0.01} if method == "della" else {}
    config = resolve_method(method, {**others, option: given})
    assert getattr(config, option) == value
    assert resolve_method(method, config.options()) == config
    settled = getattr(with_source_names(config, ["b", "a"]), option)
    assert settled == ((0.2, 0.1) if isinstance(value, dict) else value)


@pytest.mark.parametrize(("method", "option"), PER_SOURCE)
@pytest.mark.parametrize("given", [-0.1, [0.5, -0.1], {"a": 0.5, "b": -0.1}, "0.5,-0.1", "a=0.5,b=-0.1"])
def test_every_value_lies_within_the_bounds(method: str, option: str, given: Any) -> None:
    with pytest.raises(InputError, match=rf"option '{option}' must be at least 0.*not -0\.1"):
        resolve_method(method, {option: given})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([0.5], r"density: 1 given for 2 sources \(sst2, trec\)"),
        ({"sst2": 0.5}, "density: no density for trec"),
        ({"sst3": 0.5, "trec": 1}, r"density: there is no source 'sst3': did you mean 'sst2'\?"),
    ],
)
def test_values_that_do_not_fit_the_sources_are_refused(given: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        with_source_names(resolve_method("ties", {"density": given}), ["sst2", "trec"])


def test_values_by_name_are_never_ignored() -> None:
    with pytest.raises(InputError, match="density: values by name need the names of the sources"):
        resolve_method("ties", {"density": {"a": 0.5, "b": 1}}).merge(torch.zeros(6, 9), draw(2))
    with pytest.raises(InputError, match="density: 2 given for 3 sources"):
        resolve_method("ties", {"density": [0.5, 1]}).merge(torch.zeros(6, 9), draw(3))


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "knots", "breadcrumbs", "breadcrumbs_ties"])
def test_one_number_counts_for_all_sources(method: str) -> None:
    base, *tasks = draw(4)
    alike = resolve_method(method, {"density": 0.4}).merge(base, tasks)
    assert torch.equal(resolve_method(method, {"density": [0.4] * 3}).merge(base, tasks), alike)
    assert not torch.equal(resolve_method(method, {"density": [0.4, 0.4, 0.9]}).merge(base, tasks), alike)


def test_each_source_is_thinned_out_by_its_own_density() -> None:
    base, *tasks = draw(3, (40, 50))
    alone = [
        resolve_method("magnitude_prune", {"density": d}).merge(base, [t])
        for d, t in zip((0.2, 0.7), tasks, strict=True)
    ]
    together = resolve_method("magnitude_prune", {"density": (0.2, 0.7)}).merge(base, tasks)
    torch.testing.assert_close(together, alone[0] + alone[1])
    drawn = resolve_method("dare_linear", {"density": (0.0, 1.0)}).merge(base, tasks, torch.Generator())
    torch.testing.assert_close(drawn, tasks[1])


def test_densities_by_name_reach_a_merge_and_are_kept_in_its_plan(library: Library, tmp_path: Path) -> None:
    base, sources = library("llama")
    named = {"one": sources[0], "two": sources[1]}
    plan = hf_fda.plan(base, named, "ties", tmp_path / "out", density={"two": 0.2, "one": 0.7}, device="cpu")
    assert plan.config.density == (0.7, 0.2)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="density: no density for two"):
        hf_fda.plan(base, named, "ties", tmp_path / "out", density={"one": 0.7}, device="cpu")


# -- numbers of sources ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "count", "words"),
    [
        ("slerp", 3, "method 'slerp' merges 1 to 2 sources, not 3"),
        ("nuslerp", 3, "method 'nuslerp' merges 1 to 2 sources, not 3"),
        ("nearswap", 2, "method 'nearswap' merges 1 source, not 2"),
        ("arcee_fusion", 2, "method 'arcee_fusion' merges 1 source, not 2"),
        ("passthrough", 2, "method 'passthrough' merges 1 source, not 2"),
        ("model_stock", 1, "method 'model_stock' merges at least 2 sources, not 1"),
    ],
)
def test_a_number_of_sources_that_a_method_does_not_merge_is_refused(method: str, count: int, words: str) -> None:
    config = resolve_method(method, {})
    with pytest.raises(InputError, match=words):
        with_source_names(config, [f"s{i}" for i in range(count)])
    with pytest.raises(InputError, match=words):
        config.merge(torch.zeros(6, 9), draw(count))
    with pytest.raises(InputError, match=words):
        FDAConfig(initial=config).with_sources([f"s{i}" for i in range(count)], all_have_weights=True)


def test_a_wrong_number_of_sources_is_refused_before_anything_is_written(library: Library, tmp_path: Path) -> None:
    base, sources = library("llama")
    with pytest.raises(InputError, match="merges 1 source, not 2"):
        hf_fda.merge(base, sources[:2], "nearswap", tmp_path / "out", device="cpu", quiet=True)
    assert not (tmp_path / "out").exists()


def test_every_other_method_takes_any_number() -> None:
    limited = {"slerp", "nuslerp", "nearswap", "arcee_fusion", "passthrough", "model_stock"}
    for name in set(methods()) - limited:
        assert (method_class(name).min_sources, method_class(name).max_sources) == (1, None)
