"""Units that are constructed together against the same units one by one."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fine_tune, make_model
from torch import Tensor, nn
from torch.nn import functional

import hf_fda
from hf_fda.anchors import construction, grouping
from hf_fda.anchors.construction import construct_units
from hf_fda.anchors.descent import UnitError
from hf_fda.anchors.gradients import Matched, find_matched, task_vectors
from hf_fda.anchors.grouping import construction_bytes, group_units
from hf_fda.anchors.orthogonal import orthogonalize
from hf_fda.anchors.precision import fine_enough
from hf_fda.anchors.products import product
from hf_fda.anchors.smooth import Norm
from hf_fda.anchors.stacked import StackedCall, UnitPair, match_together, stack
from hf_fda.blocks import UnitCall, capture_calls, find_units, make_unit
from hf_fda.checkpoint import ModelCheckpoint
from hf_fda.errors import RunError
from hf_fda.merge_methods import FDAConfig

CPU = torch.device("cpu")
DESCENT: dict[str, Any] = {"steps": 12, "learning_rate": 1e-2, "kind": "cosine", "patience": None, "optimizer": "muon"}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pairs_of(family: str, count: int = 3, anchors: int = 6) -> list[UnitPair]:
    """The blocks of a tiny model and of a fine-tune of it, in float64."""
    sizes = {"n_layer": count} if family == "gpt2" else {"num_layers" if family == "t5" else "num_hidden_layers": count}
    model = make_model(family, **sizes)
    base, source = ModelCheckpoint(model, "base"), ModelCheckpoint(fine_tune(model, seed=1), "source")
    units = find_units(base.layout, ("block",))
    calls = capture_calls(base, units, 3, CPU).calls
    pairs = []
    for number, unit in enumerate(units):
        first, second = (
            make_unit(base.layout, unit, {name: one.read(name).double() for name in unit.tensors}, CPU)
            for one in (base, source)
        )
        call = calls[unit.name].to(torch.float64)
        assert call.tokens is not None
        pairs.append(UnitPair(first, second, call, 0.1 * draw(anchors, call.tokens, 32, seed=number)))
    return pairs


def matched_of(pairs: Sequence[UnitPair]) -> list[Matched]:
    return [
        find_matched(own.base, own.source, task_vectors(own.base, own.source), own.call, own.start, "cosine")
        for own in pairs
    ]


@pytest.mark.parametrize("family", ["bert", "vit", "llama", "gemma", "gpt2"])
def test_a_stack_has_the_cosines_and_slopes_of_its_units(family: str) -> None:
    pairs = pairs_of(family)
    matched = matched_of(pairs)
    together = match_together(pairs, matched, "cosine")
    assert together is not None
    x = torch.stack([pair.start for pair in pairs]).requires_grad_(True)
    weights = draw(len(pairs), len(matched[0].tasks), seed=5)
    found = together(x)
    (slopes,) = torch.autograd.grad((found * weights).sum(), x)
    for number, (pair, own) in enumerate(zip(pairs, matched, strict=True)):
        start = pair.start.unsqueeze(0).requires_grad_(True)
        alone = own.matcher(pair.base, pair.source, pair.call, "cosine")(start)
        (slope,) = torch.autograd.grad((alone[0] * weights[number]).sum(), start)
        torch.testing.assert_close(found[number], alone[0], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(slopes[number], slope[0], rtol=1e-4, atol=1e-6 * float(slope.abs().max()))


@pytest.mark.parametrize("family", ["mixtral", "qwen3"])
def test_units_that_a_stack_would_not_run_as_they_are_stay_apart(family: str) -> None:
    pairs = pairs_of(family, count=2)  # experts; norms of single heads
    assert match_together(pairs, matched_of(pairs), "cosine") is None


def test_units_that_are_called_otherwise_or_match_something_else_stay_apart() -> None:
    pairs = pairs_of("llama", count=2)
    matched = matched_of(pairs)
    other = replace(pairs[1], call=replace(pairs[1].call, tokens=2))
    assert match_together([pairs[0], other], matched, "cosine") is None
    fewer = Matched(dict(list(matched[1].tasks.items())[1:]))
    assert match_together(pairs, [matched[0], fewer], "cosine") is None


class Scaled(nn.Module):
    """A layer with something of its own that is no parameter."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(6, 6), scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * self.layer(x))


@pytest.mark.parametrize(("scales", "alike"), [((1.0, 1.0), True), ((1.0, 2.0), False)])
def test_what_a_stack_cannot_see_keeps_units_apart(scales: tuple[float, float], alike: bool) -> None:
    torch.manual_seed(0)
    pairs = []
    for scale in scales:
        base = Scaled(scale).requires_grad_(False)
        pairs.append(UnitPair(base, fine_tune(base, seed=1, size=0.2), UnitCall(), draw(4, 3, 6, dtype=torch.float32)))
    assert (match_together(pairs, matched_of(pairs), "cosine") is not None) is alike


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw", "snapshots": (0, 3)}])
def test_anchors_constructed_together_are_those_constructed_alone(options: dict[str, Any]) -> None:
    pairs = [replace(pair, offset=0.1 * draw(3, 32, seed=7)) for pair in pairs_of("bert")]
    together = construct_units(pairs, **DESCENT | options)
    for pair, own in zip(pairs, together, strict=True):
        (alone,) = construct_units([pair], **DESCENT | options)
        torch.testing.assert_close(own.anchors, alone.anchors, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(own.targets, alone.targets, rtol=1e-6, atol=1e-8)
        assert own.loss == pytest.approx(alone.loss, rel=1e-8)
        assert own.left_out == alone.left_out == ("attention.self.key.bias",)
        assert set(own.snapshots) == set(alone.snapshots)
        assert all(torch.allclose(own.snapshots[step], x) for step, x in alone.snapshots.items())


def test_units_among_them_that_did_not_move_or_moved_elsewhere_are_constructed_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs, changes = pairs_of("bert"), []

    def noted(precision: Any, change: float, device: torch.device) -> Any:
        changes.append(change)
        return fine_enough(precision, change, device)

    monkeypatch.setattr(construction, "fine_enough", noted)
    pairs[0] = replace(pairs[0], source=copy.deepcopy(pairs[0].base))
    same = dict(pairs[1].source.named_parameters())["output.LayerNorm.bias"]
    same.data.copy_(dict(pairs[1].base.named_parameters())["output.LayerNorm.bias"])
    still, other, usual = construct_units(pairs, **DESCENT)
    assert still.steps == 0 and not still.moves and torch.equal(still.anchors, pairs[0].start)
    assert "output.LayerNorm.bias" in other.left_out and "output.LayerNorm.bias" not in usual.left_out
    assert other.steps == usual.steps == 12
    assert min(changes) > 0, "what did not move says nothing of the precision that others need"


def test_each_unit_stops_where_its_own_loss_stalls() -> None:
    pairs = pairs_of("bert", count=2)
    options = DESCENT | {"optimizer": "adamw", "steps": 200, "patience": 10, "learning_rate": 0.05}
    alone = [construct_units([pair], **options)[0] for pair in pairs]
    together = construct_units(pairs, **options)
    assert [own.steps for own in together] == [own.steps for own in alone]
    assert len({own.steps for own in alone}) == 2, "the test needs units that stall at different times"
    assert all(torch.allclose(own.anchors, one.anchors, atol=1e-6) for own, one in zip(together, alone, strict=True))


def test_the_unit_that_breaks_is_named() -> None:
    pairs = pairs_of("bert", count=2)
    broken = replace(pairs[1], source=copy.deepcopy(pairs[1].source))
    next(broken.source.parameters()).data.fill_(torch.inf)
    with pytest.raises(UnitError, match="not finite") as found:
        construct_units([pairs[0], broken], **DESCENT)
    assert found.value.number == 1
    long = [replace(pair, start=torch.cat([pair.start, pair.start])) for pair in pairs]
    long[1].start[-1] = torch.nan  # beyond the anchors that are tried first
    with pytest.raises(UnitError, match="construction loss is nan") as found:
        construct_units(long, **DESCENT)
    assert found.value.number == 1


# -- parts -------------------------------------------------------------------------------------------------------------


def test_a_stack_of_norms_is_each_norm_and_differentiable_twice() -> None:
    x, weight, bias = (draw(*shape, seed=seed) for seed, shape in enumerate([(6, 2, 5), (3, 5), (3, 5)]))
    expected = [functional.layer_norm(rows, (5,), w, b) for rows, w, b in zip(x.chunk(3), weight, bias, strict=True)]
    torch.testing.assert_close(Norm.apply(x, weight, bias, 1e-5), torch.cat(expected))
    inputs = tuple(one.requires_grad_(True) for one in (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *own: Norm.apply(*own, 1e-5), inputs)
    assert torch.autograd.gradgradcheck(lambda own: Norm.apply(own, weight.detach(), bias.detach(), 1e-5), inputs[:1])


def test_several_matrices_are_multiplied_and_orthogonalised_as_each_is() -> None:
    a, b = draw(3, 5, 7), draw(3, 7, 4, seed=1)
    torch.testing.assert_close(product(a, b), torch.stack([product(*own) for own in zip(a, b, strict=True)]))
    for shape in ((3, 6, 20), (3, 20, 6)):
        matrices = draw(*shape)
        torch.testing.assert_close(orthogonalize(matrices), torch.stack([orthogonalize(one) for one in matrices]))


def test_layers_of_a_stack_meet_their_own_rows() -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(4, 6, bias=False), nn.LayerNorm(6, bias=False)) for _ in range(2)]
    blocks = [fine_tune(block, seed=number, size=0.3) for number, block in enumerate(blocks)]
    x = draw(6, 3, 4, dtype=torch.float32)
    found = StackedCall(UnitCall(), 2)(stack(blocks), x)
    torch.testing.assert_close(found, torch.cat([block(own) for block, own in zip(blocks, x.chunk(2), strict=True)]))


# -- in a merge --------------------------------------------------------------------------------------------------------


def test_units_are_grouped_by_form_and_by_how_many_fill_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    base = ModelCheckpoint(make_model("bert", num_hidden_layers=5), "base")
    config = FDAConfig().for_family("encoder", 32)
    units = find_units(base.layout, ("attention", "output"))
    groups = group_units(base, config, units, CPU)
    assert [[unit.name.split(".")[-1] for unit in group] for group in groups] == [["attention"] * 5, ["output"] * 5]
    monkeypatch.setattr(grouping, "FULL_CORE", 3 * 64 * 5 * 32 * 32)
    assert [len(group) for group in group_units(base, config, units, CPU)] == [3, 2, 2, 2, 1]
    monkeypatch.setattr(grouping, "FULL_CORE", 1)
    assert [len(group) for group in group_units(base, config, units, CPU)] == [1] * 10
    assert [len(group) for group in group_units(base, config, units, torch.device("meta"))] == [5, 5]
    monkeypatch.setattr(grouping, "MOST_BYTES", construction_bytes(base, config, units[1], 2))
    assert [len(group) for group in group_units(base, config, units[1::2], torch.device("meta"))] == [2, 2, 1]


def test_experts_are_never_grouped() -> None:
    base = ModelCheckpoint(make_model("mixtral"), "base")
    units = find_units(base.layout, ("block",))
    assert [len(group) for group in group_units(base, FDAConfig().for_family("decoder", 32), units, CPU)] == [1, 1]


def test_a_merge_that_lost_one_file_of_a_group_goes_on_to_the_same_bytes(
    saved: Callable[..., tuple[Path, list[Path]]], tmp_path: Path
) -> None:
    base, sources = saved("bert", 2)
    options: dict[str, Any] = {"steps": 3, "epochs": 2, "data": "anchors", "quiet": True}
    hf_fda.merge(base, sources, "fda", output=tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    files = sorted((tmp_path / "cut").rglob("anchors/*/blocks/*.safetensors"))
    before = [file.read_bytes() for file in files]
    assert len(files) == 4
    files[1].unlink()
    hf_fda.merge(base, sources, "fda", output=tmp_path / "cut", **options)
    assert [file.read_bytes() for file in files] == before


def test_an_error_names_the_block_of_the_group(saved: Callable[..., tuple[Path, list[Path]]], tmp_path: Path) -> None:
    base, sources = saved("bert", 1)
    with pytest.raises(RunError, match=r"block 'bert\.encoder\.layer\.[01]', source 'source'"):
        hf_fda.FunctionalDualAnchors.construct(base, sources[0], learning_rate=1e30, optimizer="adamw", steps=20)
