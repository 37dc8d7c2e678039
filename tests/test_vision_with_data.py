"""Image classifiers merged with unlabelled images, by every method that looks at data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fine_tune, make_model

import hf_fda

SETTINGS: dict[str, Any] = {"device": "cpu", "quiet": True}
BRIEF = {
    "divmerge": {"steps": 6, "batch_size": 4, "every": 2},
    "adamerging": {"steps": 4, "batch_size": 4, "every": 2},
    "distill": {"epochs": 2},
    "fda": {"epochs": 2},
    "regmean": {},
    "regmean_pp": {},
    "fisher": {},
}


def images(seed: int, count: int = 10) -> list[dict[str, Any]]:
    """Encoded images of noise."""
    values = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return [{"pixel_values": own} for own in values]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A vision transformer, and two fine-tunes of it with two and three classes."""
    folder = tmp_path_factory.mktemp("vision")
    make_model("vit").save_pretrained(folder / "base")
    sources = {}
    for seed, (name, labels) in enumerate({"two": 2, "three": 3}.items(), 1):
        model = fine_tune(make_model("vit", num_labels=labels), seed, size=0.2)
        model.save_pretrained(folder / name)
        sources[name] = folder / name
    return folder / "base", sources


@pytest.mark.parametrize("method", BRIEF)
def test_every_method_that_looks_at_data_merges_image_classifiers(
    method: str, family: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, sources = family
    data = {task: images(seed) for seed, task in enumerate(sources)}
    merged = hf_fda.merge(base, sources, method, tmp_path / "out", data=data, **SETTINGS, **BRIEF[method])
    pixels = torch.stack([row["pixel_values"] for row in images(9)])
    for task, labels in {"two": 2, "three": 3}.items():
        with torch.no_grad():
            logits = merged.load(task=task)(pixel_values=pixels).logits
        assert logits.shape == (10, labels)
        assert bool(logits.isfinite().all())
    if merged.coefficients is not None:
        assert merged.coefficients.sources == tuple(sources)


def test_divergence_falls_on_images(family: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, sources = family
    data = {task: images(seed, 24) for seed, task in enumerate(sources)}
    options = {"steps": 40, "batch_size": 12, "every": 5, "granularity": "block"}
    merged = hf_fda.merge(base, sources, "divmerge", tmp_path / "out", data=data, **SETTINGS, **options)
    assert merged.coefficients is not None
    assert sum(merged.coefficients.after) < sum(merged.coefficients.before)
