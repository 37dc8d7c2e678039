"""Matrix products in bfloat16: near float32's, differentiable, and only where they are asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import fine_tune, make_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fda.anchors import Moves, Objective, adapt_unit, construct_unit, products
from hf_fda.anchors.orthogonal import orthogonalize
from hf_fda.anchors.precision import fine_enough, matmul_precision, narrow_on_cpu
from hf_fda.anchors.products import MatrixProduct, NarrowProducts, Operand, narrows, product
from hf_fda.blocks import UnitCall, capture_calls, find_units, make_unit
from hf_fda.checkpoint import ModelCheckpoint

CPU = torch.device("cpu")
NEAR = 1e-2
"""Norm of the error of a product in bfloat16, relative; one rounding is 3e-3."""


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a CPU with bfloat16, where products of every size pay."""
    monkeypatch.setattr(products, "has_bfloat16", lambda: True)
    monkeypatch.setattr(products, "LEAST", 0)
    with matmul_precision("medium", CPU):
        yield


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def apart(own: Tensor, other: Tensor) -> float:
    return float((own - other).detach().norm() / other.detach().norm())


def test_a_product_is_near_and_in_float32() -> None:
    a, b = draw(6, 40), draw(40, 5, seed=1)
    own = product(a, b)
    assert own.dtype == torch.float32
    assert 0 < apart(own, a @ b) < NEAR


@pytest.mark.parametrize("sizes", [(32, 64, 96), (33, 40, 5), (1, 31, 32), (64, 1, 7)])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_of_all_sizes_are_filled_up_to_few(sizes: tuple[int, int, int], transposed: bool) -> None:
    rows, inner, columns = sizes
    a = draw(inner, rows).T if transposed else draw(rows, inner)
    b = draw(columns, inner, seed=1).T if transposed else draw(inner, columns, seed=1)
    filled = products._narrow(a)
    assert all(size % products.ROUND == 0 for size in filled.shape)
    assert torch.equal(filled[:rows, :inner], a.bfloat16()) and float(filled.float().norm()) > 0
    assert not filled[rows:].any() and not filled[:, inner:].any()
    assert product(a, b).shape == (rows, columns) and apart(product(a, b), a @ b) < NEAR


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_other_precisions_are_left_alone(precision: str) -> None:
    a, b = draw(6, 40), draw(40, 5, seed=1)
    with matmul_precision(precision, CPU):  # type: ignore[arg-type]
        assert not narrows(a, b) and torch.equal(product(a, b), a @ b)


def test_torchs_own_setting_is_not_used_on_a_cpu_and_nothing_lasts() -> None:
    before = torch.get_float32_matmul_precision()
    with matmul_precision("highest", CPU):
        with matmul_precision("medium", CPU):
            assert torch.get_float32_matmul_precision() == "highest" and narrow_on_cpu()
            with matmul_precision(None, CPU):
                assert narrow_on_cpu()
        assert not narrow_on_cpu()
    with matmul_precision("medium", torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "medium" and not narrow_on_cpu()
    assert torch.get_float32_matmul_precision() == before


def test_so_are_small_products_other_types_and_machines_without(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = draw(6, 40), draw(40, 5, seed=1)
    assert narrows(a, b)
    assert not narrows(a.double(), b.double()) and not narrows(a.half(), b.half())
    monkeypatch.setattr(products, "LEAST", 6 * 40 * 5 + 1)
    assert not narrows(a, b)
    monkeypatch.setattr(products, "LEAST", 6 * 40 * 5)
    assert narrows(a, b)
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)
    assert not narrows(a, b)


def test_first_and_second_derivatives_of_a_product_are_right() -> None:
    a, b = (draw(*shape, dtype=torch.float64).requires_grad_(True) for shape in ((3, 4), (4, 2)))
    assert torch.autograd.gradcheck(MatrixProduct.apply, (a, b))
    assert torch.autograd.gradgradcheck(MatrixProduct.apply, (a, b))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (6, 40), (2, 3, 40)])
def test_a_linear_layer_and_its_gradients_are_near(shape: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(40, 8, bias=bias)
    x = draw(*shape).requires_grad_(True)

    def run() -> list[Tensor]:
        output = layer(x)
        return [output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])]

    with matmul_precision("highest", CPU):
        plain = run()
    with NarrowProducts():
        own = run()
    assert [value.shape for value in own] == [value.shape for value in plain]
    assert all(0 < apart(*pair) < 3 * NEAR for pair in zip(own, plain, strict=True))


def test_gradients_of_weights_lie_as_the_weights_do() -> None:
    layer = nn.Linear(40, 8)
    with NarrowProducts():
        (gradient,) = torch.autograd.grad(layer(draw(6, 40)).square().sum(), [layer.weight])
    assert gradient.is_contiguous()


@pytest.mark.parametrize("layer", [nn.Linear(40, 8), Conv1D(8, 40)])
def test_a_weight_is_converted_once_until_it_changes(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[tuple[int, ...]] = []
    convert = products._narrow

    def note(matrix: Tensor) -> Tensor:
        if not products._turned(matrix):  # or it calls itself
            converted.append(tuple(matrix.shape))
        return convert(matrix)

    monkeypatch.setattr(products, "_narrow", note)
    x, shape = draw(6, 40).requires_grad_(True), (40, 8)

    def run() -> list[Tensor]:
        converted.clear()
        output = layer(x)
        return [output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])]

    def of_the_weight() -> int:
        return sum(own in (shape, shape[::-1]) for own in converted)

    narrow = NarrowProducts()
    with narrow:
        once = run()
        assert (of_the_weight(), len(converted)) == (1, 3)  # the weight, the input and the gradient
        again = run()
        assert (of_the_weight(), len(converted)) == (0, 2)
        assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))
        with torch.no_grad():
            layer.weight.mul_(2.0)
        changed = run()
        assert of_the_weight() == 1
    with NarrowProducts():
        assert all(torch.equal(*pair) for pair in zip(changed, run(), strict=True))


def test_weights_that_are_made_in_every_pass_are_not_held() -> None:
    layer, narrow = nn.utils.parametrizations.weight_norm(nn.Linear(40, 8)), NarrowProducts()
    with narrow:
        first, second = layer(draw(6, 40)), layer(draw(6, 40))
    assert torch.equal(first, second)
    assert not narrow._weights


def test_an_operand_and_its_transpose_share_what_they_are_converted_to() -> None:
    matrix, other = draw(6, 40), draw(6, 40, seed=1)
    own = Operand(matrix)
    assert own.converted is None
    turned = own.mT
    assert torch.equal(product(turned, other), product(matrix.mT, other))
    assert own.converted is not None and torch.equal(own.narrow(), products._narrow(matrix))
    assert torch.equal(product(own, other.mT), product(matrix, other.mT))
    assert own.mT.converted is not None and own.mT.narrow().data_ptr() == own.narrow().data_ptr()


def test_so_is_a_conv1d() -> None:
    layer, x = Conv1D(8, 40), draw(2, 3, 40)
    nn.init.normal_(layer.bias)
    with matmul_precision("highest", CPU):
        plain = layer(x)
    with NarrowProducts():
        own = layer(x)
    assert own.shape == plain.shape and 0 < apart(own, plain) < NEAR


def test_only_what_is_inside_is_narrow() -> None:
    layer, x = nn.Linear(40, 8), draw(3, 40)
    with matmul_precision("highest", CPU), NarrowProducts():
        inside = layer(x)
    assert torch.equal(inside, layer(x))


@pytest.mark.parametrize("shape", [(24, 32), (32, 24), (32, 32)])
def test_momentum_is_made_orthogonal_in_bfloat16_too(shape: tuple[int, int]) -> None:
    matrix = draw(*shape)
    with matmul_precision("highest", CPU):
        plain = orthogonalize(matrix)
    own = orthogonalize(matrix)
    assert own.dtype == torch.float32
    assert not torch.equal(own, plain)
    assert float(torch.nn.functional.cosine_similarity(own.flatten(), plain.flatten(), dim=0)) > 0.99
    values = torch.linalg.svdvals(own) / torch.linalg.svdvals(own).mean()
    assert float(values.min()) > 0.5 and float(values.max()) < 1.5


def test_a_long_matrix_is_iterated_on_by_its_gram_matrix() -> None:
    matrix = draw(200, 16)
    own = orthogonalize(matrix)
    with matmul_precision("highest", CPU):
        assert torch.equal(own, orthogonalize(matrix))


@pytest.mark.parametrize(
    ("precision", "change", "device", "used"),
    [
        ("medium", 1e-2, "cpu", "medium"),
        ("medium", 1e-3, "cpu", "highest"),
        ("medium", 1e-3, "cuda", "medium"),  # which is TF32
        ("high", 1e-3, "cpu", "high"),
        ("highest", 1e-2, "cpu", "highest"),
        (None, 1e-3, "cpu", None),
    ],
)
def test_a_small_change_is_matched_in_full_precision(precision: Any, change: float, device: str, used: str) -> None:
    assert fine_enough(precision, change, torch.device(device)) == used


def block_pair(family: str) -> tuple[nn.Module, nn.Module, UnitCall]:
    """The first block of a tiny model, of a fine-tune of it, and how the model calls it."""
    model = make_model(family)
    base, source = ModelCheckpoint(model, "base"), ModelCheckpoint(fine_tune(model, seed=1), "source")
    unit = find_units(base.layout, ("block",))[0]
    device = torch.device("cpu")
    call = capture_calls(base, [unit], 3, device).calls[unit.name]
    first, second = (
        make_unit(base.layout, unit, {name: one.read(name) for name in unit.tensors}, device) for one in (base, source)
    )
    return first, second, call


def losses(work: Callable[[str], float]) -> tuple[float, float]:
    """Of the same work in bfloat16 and in full precision."""
    return work("medium"), work("highest")


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "mixtral"])
def test_anchors_that_moved_by_narrow_products_match_as_well(family: str) -> None:
    base, source, call = block_pair(family)

    def work(precision: str) -> float:
        found = construct_unit(
            base,
            source,
            call,
            draw(24, 3, 32),
            None,
            steps=15,
            learning_rate=1e-2,
            kind="cosine",
            patience=None,
            optimizer="muon",
            precision=precision,  # type: ignore[arg-type]
        )
        return found.loss

    own, plain = losses(work)
    assert own != plain
    assert own == pytest.approx(plain, abs=0.02)


def test_so_does_a_block_that_moved_by_them() -> None:
    base, source, call = block_pair("bert")
    anchors = draw(48, 3, 32)
    with torch.no_grad():
        targets = call(source, anchors)

    def work(precision: str, change: float = 1.0) -> float:
        module = copy.deepcopy(base)
        objective = Objective("mse", [anchors], [targets])
        adapted = adapt_unit(
            module,
            call,
            objective,
            Moves(change=change),
            epochs=20,
            learning_rate=1e-3,
            schedule="linear",
            batch_size=16,
            generator=torch.Generator().manual_seed(0),
            precision=precision,  # type: ignore[arg-type]
        )
        assert adapted.loss_after < adapted.loss_before
        return adapted.loss_after / adapted.loss_before

    with matmul_precision("highest", CPU):
        own, plain = losses(work)
    assert own != plain
    assert own == pytest.approx(plain, abs=0.02)
    assert work("medium", 1e-3) == work("medium", 0.0) == plain  # nobody knows how small a change is, or it is small


def test_so_are_the_anchors_of_a_source_that_changes_little() -> None:
    base, source, call = block_pair("bert")
    options: Any = {"steps": 5, "learning_rate": 1e-2, "kind": "cosine", "patience": None, "optimizer": "muon"}

    def same(near: float) -> bool:
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            for own, there in zip(tuned.parameters(), source.parameters(), strict=True):
                own.lerp_(there, near)
        medium, plain = (
            construct_unit(base, tuned, call, draw(24, 3, 32), None, **options, precision=precision)
            for precision in ("medium", "highest")
        )
        return torch.equal(medium.anchors, plain.anchors)

    assert same(1e-3)
    assert not same(1.0)
