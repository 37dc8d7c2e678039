"""Cosines from output gradients against autograd's, the cheap second derivatives, and the optimiser of construction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import fine_tune, make_model
from torch import Tensor, nn
from torch.nn import functional

from hf_fda.anchors import construct_unit
from hf_fda.anchors.cosines import GramCosine, ProductCosine, TensorCosine, gram_pays
from hf_fda.anchors.gradients import find_matched, gradient_cosines, task_vectors
from hf_fda.anchors.orthogonal import Muon, orthogonalize
from hf_fda.anchors.outputs import Matcher
from hf_fda.anchors.smooth import SecondDerivatives
from hf_fda.blocks import UnitCall, capture_calls, find_units, make_unit
from hf_fda.checkpoint import ModelCheckpoint

FAMILIES = ["bert", "vit", "llama", "gpt2", "mixtral", "gemma2", "t5"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block_pair(family: str) -> tuple[nn.Module, nn.Module, UnitCall]:
    """The first block of a tiny model, of a fine-tune of it, and how the model calls it, in float64."""
    model = make_model(family)
    base, source = ModelCheckpoint(model, "base"), ModelCheckpoint(fine_tune(model, seed=1), "source")
    unit = find_units(base.layout, ("block",))[0]
    device = torch.device("cpu")
    call = capture_calls(base, [unit], 3, device).calls[unit.name].to(torch.float64)
    first, second = (
        make_unit(base.layout, unit, {name: one.read(name).double() for name in unit.tensors}, device)
        for one in (base, source)
    )
    return first, second, call


def matcher_of(base: nn.Module, source: nn.Module, call: UnitCall, x: Tensor, kind: Any) -> Matcher:
    """The cosines of all of a unit's parameters that can be matched."""
    return find_matched(base, source, task_vectors(base, source), call, x, kind).matcher(base, source, call, kind)


def both(family: str, kind: Any, anchors: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cosines and the gradient of their weighted sum at X, of autograd and of the matcher."""
    base, source, call = block_pair(family)
    assert call.tokens is not None
    x = draw(anchors, call.tokens, 32).requires_grad_(True)
    matched = find_matched(base, source, task_vectors(base, source), call, x, kind)
    plain = gradient_cosines(base, source, call, x, matched.tasks, kind)
    quick = matched.matcher(base, source, call, kind)(x.unsqueeze(0))[0]
    weights = draw(len(matched.tasks), seed=5)
    slopes = [torch.autograd.grad(cosines @ weights, x)[0] for cosines in (plain, quick)]
    return plain, quick, slopes[0], slopes[1]


@pytest.mark.parametrize("kind", ["cosine", "mse", "mae"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cosines_and_their_slopes_are_those_of_autograd(family: str, kind: Any) -> None:
    plain, quick, slope, own = both(family, kind, 6)
    torch.testing.assert_close(quick, plain, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(own, slope, rtol=1e-6, atol=1e-8 * float(slope.abs().max()))


def test_so_they_are_of_one_anchor_where_no_gradient_of_a_weight_is_built() -> None:
    assert gram_pays(3, 32, 32) and not gram_pays(30, 32, 32)
    plain, quick, slope, own = both("llama", "cosine", 1)
    torch.testing.assert_close(quick, plain, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(own, slope, rtol=1e-6, atol=1e-8 * float(slope.abs().max()))


@pytest.mark.parametrize(("family", "left"), [("bert", set()), ("gpt2", set()), ("mixtral", {"experts", "gate"})])
def test_linear_layers_are_matched_at_their_outputs(family: str, left: set[str]) -> None:
    base, source, call = block_pair(family)
    x = draw(6, 3, 32)
    matcher = matcher_of(base, source, call, x, "cosine")
    matrices = {name for name in matcher.others if matcher.tasks[name].ndim > 2}
    assert all(any(part in name for part in left) for name in matrices)
    assert matcher.layers


class Odd(nn.Module):
    """A weight used twice: by its layer, and apart from it."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.plain = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.plain(torch.tanh(self.used(x)))) @ self.used.weight + functional.gelu(input=x)


def test_a_weight_that_is_used_outside_its_layer_is_left_to_autograd() -> None:
    torch.manual_seed(0)
    base = Odd()
    source = fine_tune(base, seed=1, size=0.2).double().requires_grad_(False)
    base.double().requires_grad_(False)
    x = draw(4, 3, 6)
    matcher = matcher_of(base, source, UnitCall(), x, "cosine")
    assert set(matcher.layers) == {"plain"}
    plain = gradient_cosines(base, source, UnitCall(), x, task_vectors(base, source), "cosine")
    torch.testing.assert_close(matcher(x.unsqueeze(0))[0], plain)


def test_a_matcher_leaves_modules_frozen_and_makes_a_graph_only_when_asked() -> None:
    base, source, call = block_pair("bert")
    x = draw(4, 3, 32)
    matcher = matcher_of(base, source, call, x, "mse")
    assert not matcher(x.unsqueeze(0)).requires_grad
    assert matcher(x.unsqueeze(0).requires_grad_(True)).requires_grad
    assert not any(parameter.requires_grad for module in (base, source) for parameter in module.parameters())
    assert not any(module._forward_hooks for module in base.modules())


@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("form", [ProductCosine, GramCosine])
def test_both_forms_are_the_cosine_of_the_product(form: Any, units: int) -> None:
    output, x = draw(units, 5, 7).requires_grad_(True), draw(units, 5, 4, seed=1).requires_grad_(True)
    task = draw(units, 7, 4, seed=2)
    sizes = task.flatten(1).norm(dim=1)
    assert torch.autograd.gradcheck(lambda a, b: form.apply(a, b, task, sizes), (output, x))
    expected = functional.cosine_similarity((output.mT @ x).flatten(1), task.flatten(1))
    torch.testing.assert_close(form.apply(output, x, task, sizes), expected)


def test_a_gradient_of_zero_has_cosine_zero_and_no_slope() -> None:
    zero, task = torch.zeros(1, 3, 2, requires_grad=True), torch.ones(1, 3, 2)
    cosine = TensorCosine.apply(zero, task, task.norm().view(1))
    (slope,) = torch.autograd.grad(cosine.sum(), zero)
    assert float(cosine.detach()) == 0
    assert torch.equal(slope, torch.zeros(1, 3, 2))


# -- second derivatives ------------------------------------------------------------------------------------------------


def test_inside_second_derivatives_gelu_and_layer_norm_are_themselves() -> None:
    x, weight, bias = draw(3, 2, 5), draw(5, seed=1), draw(5, seed=2)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.gelu(functional.layer_norm(x, (5,), weight, bias, 1e-5))

    with SecondDerivatives():
        torch.testing.assert_close(run(x, weight, bias), run(x, weight, bias))
        inputs = tuple(one.requires_grad_(True) for one in (x, weight, bias))
        assert torch.autograd.gradcheck(run, inputs)

        def slopes(x: Tensor) -> tuple[Tensor, ...]:
            out = run(x, weight, bias)
            return torch.autograd.grad(out, (x, weight, bias), torch.cos(out.detach() * 0 + 1.3), create_graph=True)

        assert torch.autograd.gradcheck(slopes, (x,))


def test_other_forms_of_them_are_left_alone() -> None:
    x = draw(3, 5)
    expected = functional.gelu(x, approximate="tanh"), functional.layer_norm(x, (5,)), functional.layer_norm(x, (3, 5))
    with SecondDerivatives():
        own = functional.gelu(x, approximate="tanh"), functional.layer_norm(x, (5,)), functional.layer_norm(x, (3, 5))
    assert all(torch.equal(one, other) for one, other in zip(own, expected, strict=True))


# -- the optimiser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_orthogonalised_matrices_keep_their_directions_and_level_their_singular_values(shape: tuple[int, int]) -> None:
    matrix = draw(*shape)
    result = orthogonalize(matrix)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    cross = u.T @ result @ v.T
    values = cross.diagonal()
    assert float(values.min()) > 0.5 * float(values.max())
    assert float((cross - values.diag()).abs().max()) < 1e-9 * float(values.max())
    assert float(result.square().mean()) == pytest.approx(1)
    assert torch.equal(orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_the_step_size_rises_stays_and_falls_to_nothing() -> None:
    x = draw(2, 3, 4)
    stepper = Muon(x, 0.01, steps=20)
    sizes = []
    for _ in range(20):
        sizes.append(stepper.size())
        x.grad = draw(2, 3, 4, seed=1)
        stepper.step()
    assert sizes[0] < sizes[1] < sizes[2] == sizes[10] == pytest.approx(0.04)
    assert sizes[10] > sizes[11] > sizes[19] > 0
    assert stepper.size() == pytest.approx(0, abs=1e-12)


def test_muon_reaches_a_lower_loss_than_adam_in_as_many_steps_and_is_repeatable() -> None:
    base, source, call = block_pair("bert")
    start = 0.01 * draw(16, 3, 32)
    options: dict[str, Any] = {"steps": 40, "learning_rate": 1e-2, "kind": "cosine", "patience": 10}
    adam = construct_unit(base, source, call, start, None, **options)
    muon, again = (construct_unit(base, source, call, start, None, **options, optimizer="muon") for _ in range(2))
    assert muon.loss < adam.loss
    assert muon.steps == 40  # patience does not apply
    assert torch.equal(muon.anchors, again.anchors)


def test_the_precision_of_products_is_that_of_before_afterwards() -> None:
    base, source, call = block_pair("bert")
    before = torch.get_float32_matmul_precision()
    options: dict[str, Any] = {"steps": 2, "learning_rate": 1e-2, "kind": "cosine", "patience": None}
    construct_unit(base, source, call, draw(2, 3, 32), None, **options, precision="medium")
    assert torch.get_float32_matmul_precision() == before
