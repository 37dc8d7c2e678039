"""Merging in parts and side by side: nothing depends on how a tensor is cut up, or on the number of threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from checks import assert_same, files, merge, weights
from conftest import fine_tune, make_model
from processes import run
from torch import Tensor

from hf_fda.checkpoint.hashed import HashedFile, digest
from hf_fda.errors import InputError, RunError
from hf_fda.planning import plan
from hf_fda.selection import coarse_counts, cut_at, cut_for, digits_inside, fine_counts, keep, place, shares, tied
from hf_fda.store import Filled
from hf_fda.streaming.workers import Workers, most_held
from hf_fda.tensors import agreeing_mean, drop, of_same_sum, trim

Library = Callable[[str], tuple[Path, list[Path]]]


def values(kind: str, count: int = 5000) -> Tensor:
    """Entries of a kind that could trip a search over bits."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.empty(count).normal_(generator=generator)
    return {
        "normal": normal,
        "few": (normal * 3).round(),
        "equal": torch.full((count,), -0.5),
        "sparse": normal * (normal > 1.5),
        "tiny": normal * 1e-40,
        "wide": normal * torch.logspace(-30, 30, count),
        "zero": torch.zeros(count),
    }[kind]


KINDS = ["normal", "few", "equal", "sparse", "tiny", "wide", "zero"]


# -- selection ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.001, 0.3, 0.5, 0.9])
def test_a_trim_keeps_just_the_largest_and_the_first_of_those_that_tie(kind: str, density: float) -> None:
    tensor = values(kind)
    kept = int(density * len(tensor))
    order = tensor.abs().sort(descending=True, stable=True).indices
    expected = torch.zeros_like(tensor)
    expected[order[:kept]] = tensor[order[:kept]]
    assert torch.equal(trim(tensor, density), expected)
    assert torch.equal(trim(tensor.double(), density), expected.double())


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_cut_as_the_whole_is(kind: str) -> None:
    tensor, kept = values(kind), 1234
    parts = tensor.split(700)
    coarse, inside = place(torch.stack([coarse_counts(part) for part in parts]).sum(0), kept)
    fine = torch.stack([fine_counts(digits_inside(part, coarse), coarse) for part in parts]).sum(0)
    cut = cut_at(coarse, fine, inside)
    cuts = [cut] * len(parts) if cut.ties is None else shares(cut, [tied(part, cut) for part in parts])
    together = torch.cat([keep(part, own) for part, own in zip(parts, cuts, strict=True)])
    assert torch.equal(together, keep(tensor, cut_for(tensor, kept)))


@pytest.mark.parametrize("density", [0.003, 0.25, 0.5, 0.7, 0.999])
def test_entries_are_dropped_with_the_stated_probability_and_made_up_for(density: float) -> None:
    count = 2**21
    found = drop(torch.ones(count), density, torch.Generator().manual_seed(1))
    share = float((found != 0).double().mean())
    assert abs(share - density) < 5 * (density * (1 - density) / count) ** 0.5
    assert torch.equal(found.unique(), torch.tensor([0.0, 1 / density]))


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_entries_agree_as_written_in_the_paper(method: str) -> None:
    tensors = [values("few", 300).roll(shift) for shift in (0, 7, 31)]
    weights = [1.0, -0.5, 2.0]
    own = [tensor * weight for tensor, weight in zip(tensors, weights, strict=True)]
    election = sum(own) if method == "total" else sum(tensor.sign() for tensor in own)
    for entry in range(300):
        sign = 1.0 if float(election[entry]) >= 0 else -1.0  # type: ignore[index]
        agree = [number for number in range(3) if float(own[number][entry].sign()) == sign]
        summed = sum(float(own[number][entry]) for number in agree)
        share = sum(weights[number] for number in agree) or 1.0
        assert agreeing_mean(own, weights, method, True)[entry] == pytest.approx(summed / share)
        assert agreeing_mean(own, weights, method, False)[entry] == pytest.approx(summed)


# -- threads -----------------------------------------------------------------------------------------------------------


def test_items_come_in_order_and_within_the_budget() -> None:
    held, most, lock = 0, 0, threading.Lock()

    def bring(size: int) -> int:
        nonlocal held, most
        with lock:
            held += size
            most = max(most, held)
        time.sleep(0.001 * (size % 3))
        return size

    sizes = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 40, 1, 1]
    with Workers(3) as workers:
        for expected, found in zip(sizes, workers.in_order(bring, sizes, int, 12), strict=True):
            assert found == expected
            held -= found  # what is being used counts until the next is asked for
    assert most <= most_held(sizes, 12, 3) == 40


def test_an_error_comes_out_where_its_item_would(tmp_path: Path) -> None:
    def bring(number: int) -> int:
        if number == 2:
            raise RunError("two")
        return number

    found = []
    with pytest.raises(RunError, match="two"), Workers(2) as workers:
        found.extend(workers.in_order(bring, range(100), int, 1000))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("part", "tensor"))]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (0, 2, 1)])
def test_a_file_is_hashed_whatever_the_order_of_its_pieces(order: tuple[int, ...], tmp_path: Path) -> None:
    pieces = [bytes([number]) * 1000 for number in range(3)]
    file = HashedFile(tmp_path / "file", 3000)
    for number in order:
        file.write(1000 * number, pieces[number])
    assert file.digest() == digest(tmp_path / "file") == xxhash.xxh3_128(b"".join(pieces)).hexdigest()
    file.close()
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


# -- whole merges ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and two fine-tunes in bfloat16 with embeddings of more than one part."""
    folder = tmp_path_factory.mktemp("large")
    base = make_model("llama", vocab_size=140_000)
    models = [base, fine_tune(base, seed=1), fine_tune(base, seed=2)]
    paths = [folder / name for name in ("base", "one", "two")]
    for model, path in zip(models, paths, strict=True):
        model.bfloat16().save_pretrained(path)
    return paths[0], paths[1:]


@pytest.fixture
def four_threads() -> Iterator[None]:
    """Four threads for this test."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


PARTWISE: dict[str, dict[str, Any]] = {
    "linear": {"weights": (0.3, 0.9)},
    "task_arithmetic": {},
    "ties": {"density": 0.3},
    "dare_ties": {"density": 0.3},
    "slerp": {},
    "magnitude_prune": {"density": 0.3, "trim": "global"},
}


@pytest.mark.parametrize("method", PARTWISE)
def test_any_number_of_threads_makes_the_same_bytes(
    method: str, large: Any, four_threads: None, tmp_path: Path
) -> None:
    base, sources = large
    options = {"dtype": "auto", "max_shard_bytes": 10_000_000, **PARTWISE[method]}
    merge(base, sources, method, tmp_path / "four", **options)
    torch.set_num_threads(1)
    merge(base, sources, method, tmp_path / "one", **options)
    assert files(tmp_path / "four") == files(tmp_path / "one")


@pytest.mark.parametrize("rescale", [False, True])
def test_a_large_tensor_is_trimmed_as_if_it_were_in_one_piece(rescale: bool, large: Any, tmp_path: Path) -> None:
    base, sources = large
    found = weights(merge(base, sources, "ties", tmp_path / "merged", density=0.3, rescale=rescale).folder)
    name = "model.embed_tokens.weight"
    theta, *others = (weights(path)[name].float() for path in (base, *sources))
    tasks = [trim(other - theta, 0.3) for other in others]
    if rescale:
        tasks = [of_same_sum(task, other - theta) for task, other in zip(tasks, others, strict=True)]
    merged = theta + agreeing_mean(tasks, (1, 1), "total", True)
    torch.testing.assert_close(found[name], merged, rtol=0, atol=1e-7 if rescale else 0)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_in_bfloat16_one_source_comes_out_as_it_is_and_the_base_as_itself(
    method: str, dtype: str, large: Any, tmp_path: Path
) -> None:
    base, (source, _) = large
    scaling = {} if method == "linear" else {"scaling": 1.0}
    one = merge(base, [source], method, tmp_path / "one", dtype=dtype, **scaling)
    assert_same(weights(one.folder), {name: own.to(_type(dtype)) for name, own in weights(source).items()})
    same = merge(base, {"a": base, "b": base}, method, tmp_path / "same", dtype=dtype)
    nothing = merge(base, {"a": source, "b": base}, method, tmp_path / "nothing", dtype=dtype, weights=(0, 1))
    for merged in (same, nothing):
        assert_same(weights(merged.folder), {name: own.to(_type(dtype)) for name, own in weights(base).items()})


def _type(dtype: str) -> torch.dtype:
    return torch.bfloat16 if dtype == "auto" else torch.float32


# -- the global trim ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_a_global_trim_keeps_the_largest_of_the_whole_task_vector(
    family: str, library: Library, tmp_path: Path
) -> None:
    base, sources = library(family)
    merged = merge(base, sources[:1], "ties", tmp_path / "merged", density=0.2, trim="global", max_shard_bytes=9_000)
    theta, other, found = weights(base), weights(sources[0]), weights(merged.folder)
    tasks = {name: other[name].float() - theta[name].float() for name in found if theta[name].is_floating_point()}
    magnitudes = torch.cat([task.abs().flatten() for task in tasks.values()])
    threshold = magnitudes.sort(descending=True).values[int(0.2 * len(magnitudes)) - 1]
    for name, task in tasks.items():
        kept = task * (task.abs() >= threshold)
        torch.testing.assert_close(found[name], theta[name] + kept, rtol=0, atol=1e-7)


def test_processes_and_interruptions_do_not_change_a_global_trim(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sources = library("llama")
    options: dict[str, Any] = {"density": 0.2, "trim": "global", "max_shard_bytes": 9_000}
    merge(base, sources, "ties", tmp_path / "whole", **options)
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    named = [word for path in sources for word in ("--source", path)]
    status, _, said = run(
        "merge", "--base", base, *named, "--method", "ties", "--output", tmp_path / "two", "--device", "cpu", *words
    )
    assert status == 0, said
    assert files(tmp_path / "two") == files(tmp_path / "whole")

    import hf_fda.stages

    original, done = hf_fda.stages.Store.fill, 0

    def fail_late(self: Any, name: str, *arguments: Any) -> Filled:
        nonlocal done
        done += "fine" in name
        if done == 2:
            raise RunError("stopped")
        return original(self, name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(hf_fda.stages.Store, "fill", fail_late)
        with pytest.raises(RunError, match="stopped"):
            merge(base, sources, "ties", tmp_path / "resumed", **options)
    merge(base, sources, "ties", tmp_path / "resumed", **options)
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")
    assert not list((tmp_path / "resumed").rglob("*coarse*"))


def test_a_global_trim_is_refused_where_there_is_no_whole_task_vector(library: Library, tmp_path: Path) -> None:
    base, sources = library("llama")
    with pytest.raises(InputError, match="trim='global'"):
        plan(base, sources, "ties", tmp_path / "x", density=0.2, trim="global", as_adapter=True, device="cpu")
