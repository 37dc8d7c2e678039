"""Construction and adaptation against plain loops in float64 that build every gradient with autograd."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from conftest import fine_tune, make_model
from torch import Tensor, nn

from hf_fda.anchors import CoefficientAdam, Moves, Objective, adapt_unit, construct_unit, stepping
from hf_fda.anchors.descent import stalled
from hf_fda.anchors.distance import distance
from hf_fda.anchors.gradients import find_matched, gradient_cosines, induced_gradients, task_vectors
from hf_fda.anchors.initialization import initial_anchors, sample_rows
from hf_fda.anchors.metric import shift_metric
from hf_fda.blocks import UnitCall, capture_calls, find_units, make_unit
from hf_fda.checkpoint import ModelCheckpoint
from hf_fda.errors import RunError

CALL = UnitCall()
KINDS: list[Any] = ["cosine", "mse", "mae"]
Pair = tuple[nn.Module, nn.Module, UnitCall]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def network_pair(dtype: torch.dtype = torch.float64, size: float = 0.2) -> Pair:
    """A small network of width 6, a fine-tune of it, and how to call them."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6)).to(dtype)
    source = fine_tune(base.float(), seed=1, size=size)
    return base.to(dtype).requires_grad_(False), source.to(dtype).requires_grad_(False), CALL


def bert_pair(dtype: torch.dtype = torch.float64) -> Pair:
    """The first block of a tiny BERT, of a fine-tune of it, and how the model calls it."""
    model = make_model("bert")
    base, source = ModelCheckpoint(model, "base"), ModelCheckpoint(fine_tune(model, seed=1), "source")
    unit = find_units(base.layout, ("block",))[0]
    device = torch.device("cpu")
    call = capture_calls(base, [unit], 3, device).calls[unit.name].to(dtype)
    modules = [
        make_unit(base.layout, unit, {name: one.read(name).to(dtype) for name in unit.tensors}, device)
        for one in (base, source)
    ]
    return modules[0], modules[1], call


PAIRS: dict[str, tuple[Callable[[], Pair], int]] = {"network": (network_pair, 6), "bert": (bert_pair, 32)}


def summed_distance(kind: str, output: Tensor, target: Tensor) -> Tensor:
    """What adaptation minimises: the sum over anchors of one minus the cosine, or over entries of the difference."""
    count = len(output) if kind == "cosine" else output.numel()
    return count * plain_distance(kind, output, target)


def plain_distance(kind: str, output: Tensor, target: Tensor) -> Tensor:
    """The mean of each anchor's own distance, one by one."""
    each = []
    for a, b in zip(output, target, strict=True):
        if kind == "cosine":
            each.append(1 - (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt()))
        elif kind == "mse":
            each.append(((a - b) ** 2).sum() / a.numel())
        else:
            each.append((a - b).abs().sum() / a.numel())
    return sum(each, torch.zeros((), dtype=output.dtype)) / len(each)


def plain_losses(base: nn.Module, source: nn.Module, call: UnitCall, x: Tensor, kind: str) -> dict[str, Tensor]:
    """``1 - cos(grad_p S, tau_p)`` of every parameter p, each gradient asked for on its own; everything trains."""
    own = dict(source.named_parameters())
    similarity = -plain_distance(kind, call(base, x), call(source, x))
    losses = {}
    for name, parameter in base.named_parameters():
        (gradient,) = torch.autograd.grad(similarity, parameter, create_graph=True, retain_graph=True)
        task = own[name] - parameter
        losses[name] = 1 - (gradient * task).sum() / ((gradient**2).sum().sqrt() * (task**2).sum().sqrt())
    return losses


def without_key_bias(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("key.bias")}


def training(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(True)


# -- the construction loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", PAIRS)
def test_gradient_cosines_are_those_of_a_plain_loop(which: str, kind: Any) -> None:
    make, width = PAIRS[which]
    base, source, call = make()
    x = draw(4, 3, width)
    tasks = without_key_bias(task_vectors(base, source))
    cosines = gradient_cosines(base, source, call, x, tasks, kind)
    expected = without_key_bias(plain_losses(training(base), training(source), call, x, kind))
    assert list(expected) == list(tasks)
    torch.testing.assert_close(1 - cosines, torch.stack(list(expected.values())).detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", PAIRS)
def test_the_gradient_of_the_construction_loss_equals_finite_differences(which: str, kind: Any) -> None:
    make, width = PAIRS[which]
    base, source, call = make()
    tasks = without_key_bias(task_vectors(base, source))

    def loss(x: Tensor) -> Tensor:
        return (1 - gradient_cosines(base, source, call, x, tasks, kind)).sum()

    x = draw(3, 3, width).requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(x), x)
    step = 1e-6
    for seed in (1, 2, 3):
        direction = draw(3, 3, width, seed=seed)
        slope = (loss(x.detach() + step * direction) - loss(x.detach() - step * direction)) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-5, abs=1e-6)


def test_cosines_of_anchors_that_need_no_gradient_make_no_graph() -> None:
    base, source, call = network_pair()
    assert not gradient_cosines(base, source, call, draw(2, 3, 6), task_vectors(base, source), "mse").requires_grad


def test_modules_stay_frozen_after_their_gradients_were_asked_for() -> None:
    base, source, call = network_pair()
    induced_gradients(base, source, call, draw(2, 3, 6), ["0.weight"], "mse")
    assert not any(parameter.requires_grad for module in (base, source) for parameter in module.parameters())
    with pytest.raises(RuntimeError):
        induced_gradients(base, source, call, draw(2, 3, 7), ["0.weight"], "mse")
    assert not any(parameter.requires_grad for module in (base, source) for parameter in module.parameters())


def test_task_vectors_are_source_minus_base() -> None:
    base, source, _ = network_pair()
    own = dict(source.named_parameters())
    tasks = task_vectors(base, source)
    assert list(tasks) == [name for name, _ in base.named_parameters()]
    for name, parameter in base.named_parameters():
        assert torch.equal(tasks[name], own[name] - parameter)


# -- construction ------------------------------------------------------------------------------------------------------


def plain_construction(
    base: nn.Module,
    source: nn.Module,
    start: Tensor,
    steps: int,
    learning_rate: float,
    kind: str,
    shift: Tensor | float = 0.0,
) -> tuple[Tensor, list[float]]:
    """The X of the lowest loss that AdamW saw, and the mean loss before each of its steps; everything trains."""
    base, source = training(base), training(source)
    x = start.clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([x], lr=learning_rate)
    best, history = x.detach().clone(), []
    for _ in range(steps):
        optimizer.zero_grad()
        losses = list(plain_losses(base, source, CALL, x + shift, kind).values())
        loss = torch.stack(losses).sum()
        history.append(float(loss.detach()) / len(losses))
        if history[-1] == min(history):
            best = x.detach().clone()
        loss.backward()
        optimizer.step()
    return best, history


def construct(pair: Pair, start: Tensor, offset: Tensor | None = None, **options: Any) -> Any:
    base, source, call = pair
    settings: dict[str, Any] = {"steps": 12, "learning_rate": 1e-2, "kind": "cosine", "patience": None}
    return construct_unit(base, source, call, start, offset, **settings | options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learning_rate", [1e-2, 0.5])
def test_construction_is_adamw_on_the_plain_loss_and_keeps_the_best(kind: Any, learning_rate: float) -> None:
    pair, start = network_pair(), draw(4, 3, 6)
    result = construct(pair, start, steps=25, learning_rate=learning_rate, kind=kind)
    best, history = plain_construction(pair[0], pair[1], start, 25, learning_rate, kind)
    torch.testing.assert_close(result.anchors, best, rtol=1e-6, atol=1e-7)
    assert result.loss == pytest.approx(min(history), rel=1e-7)
    assert result.loss < history[0]
    assert result.steps == 25


def test_a_step_size_that_overshoots_still_gives_the_best_anchors_seen() -> None:
    pair, start = network_pair(), draw(4, 3, 6)
    _, history = plain_construction(pair[0], pair[1], start, 25, 10.0, "cosine")
    assert history[-1] > min(history)  # else this would not show that the best are kept
    assert construct(pair, start, steps=25, learning_rate=10.0).loss == pytest.approx(min(history), rel=1e-6)


def test_the_loss_of_a_bert_block_falls() -> None:
    pair, start = bert_pair(), draw(4, 3, 32)
    losses = [construct(pair, start, steps=steps).loss for steps in (0, 10, 30)]
    assert losses[0] > losses[1] > losses[2] >= 0


def test_without_steps_the_anchors_are_the_start() -> None:
    start = draw(4, 3, 6)
    result = construct(network_pair(), start, steps=0)
    assert torch.equal(result.anchors, start)
    assert result.steps == 0
    assert 0 < result.loss < 2


def test_what_construction_returns_belongs_together() -> None:
    base, source, call = network_pair()
    result = construct((base, source, call), draw(4, 3, 6))
    torch.testing.assert_close(result.targets, source(result.anchors))
    losses = plain_losses(training(base), training(source), call, result.anchors, "cosine")
    assert list(result.cosines) == list(losses)
    for name, loss in losses.items():
        assert 1 - result.cosines[name] == pytest.approx(loss.item(), abs=1e-9)
    assert result.loss == pytest.approx(1 - sum(result.cosines.values()) / len(losses))
    assert result.left_out == ()
    assert not result.anchors.requires_grad and not result.targets.requires_grad


def test_an_offset_is_added_in_front_of_the_unit_and_part_of_the_anchors() -> None:
    pair, start, offset = network_pair(), draw(4, 3, 6), 0.7 * draw(3, 6, seed=1)
    result = construct(pair, start, offset)
    best, history = plain_construction(pair[0], pair[1], start, 12, 1e-2, "cosine", shift=offset)
    torch.testing.assert_close(result.anchors, best + offset, rtol=1e-6, atol=1e-7)
    assert result.loss == pytest.approx(min(history), rel=1e-7)
    assert torch.equal(construct(pair, start, offset, steps=0).anchors, start + offset)


def test_construction_changes_neither_the_modules_nor_the_start() -> None:
    base, source, call = network_pair()
    start = draw(4, 3, 6)
    before = [tensor.clone() for tensor in (*base.parameters(), *source.parameters(), start)]
    construct((base, source, call), start)
    after = [*base.parameters(), *source.parameters(), start]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert not any(tensor.requires_grad for tensor in after)


def test_the_same_seed_gives_the_same_anchors_and_another_seed_others() -> None:
    def anchors(seed: int) -> Tensor:
        base, source, call = network_pair(torch.float32)
        weights = [parameter for parameter in source.parameters() if parameter.ndim == 2]
        start = initial_anchors("weights", weights, 2, 2, 6, generator(seed))
        return construct((base, source, call), start).anchors

    assert torch.equal(anchors(3), anchors(3))
    assert not torch.equal(anchors(3), anchors(4))


def test_progress_is_reported_with_the_best_loss_so_far() -> None:
    pair, start = network_pair(), draw(4, 3, 6)
    told: list[tuple[int, float]] = []
    construct(pair, start, steps=25, learning_rate=0.5, report=lambda step, loss: told.append((step, loss)))
    _, history = plain_construction(pair[0], pair[1], start, 25, 0.5, "cosine")
    assert [step for step, _ in told] == [10, 20, 25]
    assert [loss for _, loss in told] == pytest.approx([min(history[:step]) for step, _ in told])


def test_patience_stops_a_construction_that_gets_nowhere() -> None:
    result = construct(network_pair(), draw(2, 2, 6), steps=100, learning_rate=0.0, patience=20)
    assert 20 <= result.steps <= 40


def test_without_patience_all_steps_are_run() -> None:
    assert construct(network_pair(), draw(2, 2, 6), steps=60, learning_rate=0.0, patience=None).steps == 60


def test_patience_does_not_stop_a_construction_that_goes_on_falling() -> None:
    pair, start = network_pair(), draw(4, 3, 6)
    told: list[float] = []
    result = construct(pair, start, steps=40, patience=10, report=lambda _, loss: told.append(loss))
    assert all(later < 0.99 * earlier for earlier, later in itertools.pairwise(told))
    assert result.steps == 40


def test_a_loss_has_stalled_when_it_fell_by_less_than_one_percent_over_the_window() -> None:
    assert stalled([1.0, 0.995], 1)
    assert not stalled([1.0, 0.98], 1)
    assert not stalled([1.0, 1.0], 2)
    assert stalled([1.0, 1.0, 1.0], 2)
    assert not stalled([1.0, 0.995, 0.985], 2)
    assert not stalled([1.0], 0)
    assert stalled([1.0, 1.0], 0)


# -- parameters that cannot be matched ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_key_bias_of_an_attention_layer_is_left_out_and_nothing_else(kind: Any, dtype: torch.dtype) -> None:
    base, source, call = bert_pair(dtype)
    tasks = task_vectors(base, source)
    used = find_matched(base, source, tasks, call, draw(12, 3, 32, dtype=dtype), kind).tasks
    assert set(tasks) - set(used) == {"attention.self.key.bias"}
    assert all(used[name] is tasks[name] for name in used)
    assert list(used) == [name for name in tasks if name in used]


def test_parameters_that_did_not_move_are_left_out() -> None:
    base, source, call = bert_pair()
    source.intermediate.dense.weight.copy_(base.intermediate.dense.weight)  # type: ignore[union-attr, operator]
    source.output.LayerNorm.bias.copy_(base.output.LayerNorm.bias)  # type: ignore[union-attr, operator]
    result = construct((base, source, call), draw(4, 3, 32), steps=10)
    gone = {"attention.self.key.bias", "intermediate.dense.weight", "output.LayerNorm.bias"}
    assert set(result.left_out) == gone
    assert set(result.cosines) == {name for name, _ in base.named_parameters()} - gone


def test_a_parameter_that_the_unit_never_uses_is_left_out() -> None:
    base, source, call = network_pair()
    for module, value in ((base, 0.0), (source, 1.0)):
        module.register_parameter("idle", nn.Parameter(torch.full((3,), value).double(), requires_grad=False))
    result = construct((base, source, call), draw(4, 3, 6))
    assert result.left_out == ("idle",)
    assert math.isfinite(result.loss)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_equal_to_the_base_needs_no_steps(kind: Any) -> None:
    base, _, call = bert_pair()
    start = draw(4, 3, 32)
    result = construct((base, copy.deepcopy(base), call), start, kind=kind)
    assert (result.loss, result.steps, result.cosines) == (0.0, 0, {})
    assert result.left_out == tuple(name for name, _ in base.named_parameters())
    assert torch.equal(result.anchors, start)
    torch.testing.assert_close(result.targets, call(base, start))
    assert bool(result.targets.isfinite().all())


# -- numbers that are not finite ---------------------------------------------------------------------------------------


def test_a_huge_learning_rate_stops_construction_with_a_way_out() -> None:
    with pytest.raises(RunError, match="smaller learning_rate"):
        construct(network_pair(torch.float32), draw(4, 3, 6, dtype=torch.float32), learning_rate=1e30)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", ["0.weight", "2.bias", "3.weight"])
def test_weights_that_are_not_finite_stop_construction(bad: float, place: int, name: str) -> None:
    pair = network_pair()
    pair[place].get_parameter(name).view(-1)[0] = bad
    with pytest.raises(RunError):
        construct(pair, draw(4, 3, 6))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_start_that_is_not_finite_stops_construction(bad: float) -> None:
    with pytest.raises(RunError):
        construct(network_pair(), draw(4, 3, 6) * bad)


@pytest.mark.parametrize("tasks", [False, True])
def test_a_huge_learning_rate_stops_adaptation_with_a_way_out(tasks: bool) -> None:
    base, source, call = network_pair(torch.float32)
    x = draw(4, 3, 6, dtype=torch.float32)
    with pytest.raises(RunError, match="smaller step size"):
        adapt(base, call, [x], [call(source, x)], [task_vectors(base, source)] if tasks else None, learning_rate=1e30)


@pytest.mark.parametrize("kind", ["mse", "shift"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_targets_that_are_not_finite_stop_adaptation(bad: float, kind: str) -> None:
    base, source, call = network_pair()
    x = draw(4, 3, 6)
    targets = call(source, x)
    targets[0, 0, 0] = bad
    with pytest.raises(RunError, match="not finite"):
        adapt(base, call, [x], [targets], None, kind=kind, epochs=3)


# -- Adam on coefficients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("learning_rate", [1e-2, 0.3])
def test_coefficient_adam_is_adam_on_explicit_coefficients(count: int, holes: bool, learning_rate: float) -> None:
    base = [draw(5, 4), draw(7, seed=1)]
    tasks = [[0.1 * draw(*theta.shape, seed=10 * k + p) for k in range(count)] for p, theta in enumerate(base, start=1)]
    if holes:
        for own in tasks:
            own[0].view(-1)[::3] = 0
            own[-1].view(-1)[:2] = 0
        tasks[0][0][1] *= 1e-6
    inputs = draw(9, 4, seed=5)

    def loss(matrix: Tensor, vector: Tensor) -> Tensor:
        return (torch.tanh(inputs @ matrix.T).sum(1) - (vector[:, None] * inputs[:7]).sin().sum()).square().mean()

    alphas = [[torch.full_like(task, 0.3).requires_grad_(True) for task in own] for own in tasks]

    def theta(p: int) -> Tensor:
        result = base[p]
        for alpha, task in zip(alphas[p], tasks[p], strict=True):
            result = result + alpha * task
        return result

    plain = torch.optim.Adam([alpha for own in alphas for alpha in own], lr=learning_rate, eps=1e-30)
    parameters = [theta(p).detach().clone().requires_grad_(True) for p in range(2)]
    stepper = CoefficientAdam(parameters, [magnitudes(own) for own in tasks], learning_rate, eps=1e-30)
    start = loss(theta(0), theta(1)).item()
    for _ in range(30):
        plain.zero_grad()
        loss(theta(0), theta(1)).backward()
        plain.step()
        stepper.step(torch.autograd.grad(loss(parameters[0], parameters[1]), parameters))
        for p in range(2):
            expected = theta(p).detach()
            assert float((parameters[p].detach() - expected).norm()) <= 1e-9 * float(expected.norm())
    assert loss(parameters[0], parameters[1]).item() < start


def test_coefficient_adam_does_not_move_where_all_task_vectors_are_zero() -> None:
    parameter = torch.ones(4)
    task = torch.tensor([1.0, 0.0, -1.0, 0.0])
    stepper = CoefficientAdam([parameter], [task.abs()], 0.1)
    for _ in range(3):
        stepper.step([torch.tensor([1.0, 1.0, 0.0, 0.0])])
    assert parameter[0] < 1
    assert torch.equal(parameter[1:], torch.ones(3))


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
def test_a_cpu_steps_on_entries_in_chunks_alike(chunk: int, scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(4, 6), (3,), (1,), (5, 3), (0,), (7,)]

    def run() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        parameters, scales = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
        parameters[3] = torch.randn(3, 5, generator=generator).T
        stepper = CoefficientAdam(parameters, [own.abs() for own in scales] if scaled else None, 0.1)
        for _ in range(3):
            stepper.step([torch.randn(shape, generator=generator) for shape in shapes])
        return parameters

    whole = run()
    monkeypatch.setattr(stepping, "CHUNK", chunk)
    assert all(torch.equal(*pair) for pair in zip(run(), whole, strict=True))


@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_without_scales_it_is_adam_on_the_parameters(rate: float) -> None:
    gradient, plain = draw(6, seed=2), torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([plain], lr=0.1 * rate, betas=(0.5, 0.7), eps=1e-2)
    parameter = torch.zeros(6, dtype=torch.float64)
    stepper = CoefficientAdam([parameter], None, 0.1, betas=(0.5, 0.7), eps=1e-2)
    for number in range(1, 6):
        plain.grad = gradient / number
        optimizer.step()
        stepper.step([gradient / number], rate)
    torch.testing.assert_close(parameter, plain.detach(), rtol=1e-12, atol=1e-12)


def magnitudes(tasks: Sequence[Tensor]) -> Tensor:
    """The sum of the magnitudes of task vectors."""
    return torch.stack([task.abs() for task in tasks]).sum(0)


# -- adaptation --------------------------------------------------------------------------------------------------------


def adapt(
    module: nn.Module,
    call: UnitCall,
    anchors: Sequence[Tensor],
    targets: Sequence[Tensor],
    tasks: Sequence[Mapping[str, Tensor]] | None,
    **options: Any,
) -> Any:
    """Adapt a copy of a module."""
    settings: dict[str, Any] = {"epochs": 12, "learning_rate": 1e-2, "batch_size": 4, "schedule": "constant"}
    settings = {**settings, "generator": generator(7), **options}
    kind, power = settings.pop("kind", "mse"), settings.pop("power", 0.5)
    shifts = [target - call(module, x) for x, target in zip(anchors, targets, strict=True)]
    objective = Objective(kind, anchors, targets, shifts, power)
    scales = None if tasks is None else {name: magnitudes([task[name] for task in tasks]) for name in tasks[0]}
    return adapt_unit(copy.deepcopy(module), call, objective, Moves(scales), **settings)


def two_sources() -> tuple[nn.Module, list[Tensor], list[Tensor], list[dict[str, Tensor]]]:
    """A base, and the anchors, targets and task vectors of two fine-tunes of it; 11 anchors do not fill batches."""
    base, first, _ = network_pair()
    second = fine_tune(base.float(), seed=2, size=0.2).double().requires_grad_(False)
    base.double()
    anchors = [draw(6, 3, 6, seed=1), draw(5, 3, 6, seed=2)]
    return (
        base,
        anchors,
        [first(anchors[0]), second(anchors[1])],
        [task_vectors(base, source) for source in (first, second)],
    )


@pytest.mark.parametrize("interpolation", [0.0, 0.25, 1.0])
def test_the_merge_lies_on_the_line_from_its_start_to_the_adapted_parameters(interpolation: float) -> None:
    base, anchors, targets, tasks = two_sources()
    whole = adapt(base, CALL, anchors, targets, tasks)
    part = adapt(base, CALL, anchors, targets, tasks, interpolation=interpolation)
    for name, start in base.named_parameters():
        expected = start + interpolation * (whole.parameters[name] - start)
        torch.testing.assert_close(part.parameters[name], expected, rtol=1e-12, atol=1e-14)
    assert part.loss_before == whole.loss_before
    assert (part.loss_after == part.loss_before) == (interpolation == 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [4, 128])
def test_adaptation_of_parameters_is_adam_over_the_same_batches(kind: Any, batch_size: int) -> None:
    base, anchors, targets, _ = two_sources()
    result = adapt(base, CALL, anchors, targets, None, kind=kind, batch_size=batch_size)
    plain = training(base)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2)
    x, y, order = torch.cat(anchors), torch.cat(targets), generator(7)
    before = plain_distance(kind, plain(x), y).item()
    for _ in range(12):
        for batch in torch.randperm(len(x), generator=order).split(batch_size):
            optimizer.zero_grad()
            summed_distance(kind, plain(x[batch]), y[batch]).backward()
            optimizer.step()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(result.parameters[name], parameter.detach(), rtol=1e-7, atol=1e-8)
    assert result.loss_before == pytest.approx(before)
    assert result.loss_after == pytest.approx(plain_distance(kind, plain(x), y).item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_adaptation_of_coefficients_is_adam_on_explicit_coefficients(kind: Any) -> None:
    base, anchors, targets, tasks = two_sources()
    start = copy.deepcopy(base)
    for name, parameter in start.named_parameters():
        parameter += 0.3 * (tasks[0][name] + tasks[1][name])
    result = adapt(start, CALL, anchors, targets, tasks, kind=kind)
    theta_0 = {name: parameter.detach() for name, parameter in base.named_parameters()}
    alphas = [{name: torch.full_like(task, 0.3).requires_grad_(True) for name, task in own.items()} for own in tasks]

    def theta() -> dict[str, Tensor]:
        return {
            name: theta_0[name] + alphas[0][name] * tasks[0][name] + alphas[1][name] * tasks[1][name]
            for name in theta_0
        }

    optimizer = torch.optim.Adam([alpha for own in alphas for alpha in own.values()], lr=1e-2, eps=1e-30)
    x, y, order = torch.cat(anchors), torch.cat(targets), generator(7)
    for _ in range(12):
        for batch in torch.randperm(len(x), generator=order).split(4):
            optimizer.zero_grad()
            summed_distance(kind, torch.func.functional_call(base, theta(), (x[batch],)), y[batch]).backward()
            optimizer.step()
    for name, value in theta().items():
        torch.testing.assert_close(result.parameters[name], value.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coefficients", [False, True])
def test_adaptation_lowers_the_distance(kind: Any, coefficients: bool) -> None:
    base, anchors, targets, tasks = two_sources()
    result = adapt(base, CALL, anchors, targets, tasks if coefficients else None, kind=kind, epochs=40)
    assert result.loss_after < 0.9 * result.loss_before


def test_adaptation_lowers_the_distance_of_a_bert_block() -> None:
    base, source, call = bert_pair(torch.float32)
    x = draw(6, 3, 32, dtype=torch.float32)
    result = adapt(base, call, [x], [call(source, x)], [task_vectors(base, source)])
    assert 0 < result.loss_after < 0.9 * result.loss_before


def test_the_distances_are_those_of_the_module_before_and_after() -> None:
    base, anchors, targets, _ = two_sources()
    result = adapt(base, CALL, anchors, targets, None)
    x, y = torch.cat(anchors), torch.cat(targets)
    adapted = torch.func.functional_call(base, result.parameters, (x,))
    assert result.loss_before == pytest.approx(float(plain_distance("mse", base(x), y)))
    assert result.loss_after == pytest.approx(float(plain_distance("mse", adapted, y)))
    assert list(result.parameters) == [name for name, _ in base.named_parameters()]
    assert not any(parameter.requires_grad for parameter in result.parameters.values())


def test_without_epochs_nothing_moves() -> None:
    base, anchors, targets, tasks = two_sources()
    result = adapt(base, CALL, anchors, targets, tasks, epochs=0)
    assert all(torch.equal(result.parameters[name], value) for name, value in base.named_parameters())
    assert result.loss_after == result.loss_before


def test_the_same_order_of_batches_gives_the_same_parameters_and_another_order_others() -> None:
    base, anchors, targets, tasks = two_sources()
    one, same, other = (adapt(base, CALL, anchors, targets, tasks, generator=generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(value, same.parameters[name]) for name, value in one.parameters.items())
    assert not all(torch.equal(value, other.parameters[name]) for name, value in one.parameters.items())


def test_adaptation_reports_its_epochs_and_a_falling_loss() -> None:
    base, anchors, targets, tasks = two_sources()
    told: list[tuple[int, float]] = []
    result = adapt(
        base, CALL, anchors, targets, tasks, epochs=25, report=lambda epoch, loss: told.append((epoch, loss))
    )
    assert [epoch for epoch, _ in told] == [10, 20, 25]
    assert result.loss_before > told[0][1] > told[1][1] > told[2][1]


# -- the metric of a source's shift ------------------------------------------------------------------------------------


def test_in_the_metric_leaving_a_block_as_the_base_has_it_costs_one_for_every_source() -> None:
    for size in (1e-3, 1.0, 50.0):
        shift = size * draw(7, 3, 5)
        for power in (0.0, 0.5, 2.0):
            cost = (shift @ shift_metric(shift, power)).square().sum() / (7 * 3)
            assert float(cost) == pytest.approx(1)


def test_without_power_all_directions_count_alike_and_with_it_the_main_ones_more() -> None:
    shift = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    alike, weighed = (shift_metric(shift, power, floor=0.0).norm(dim=1).square() for power in (0.0, 0.5))
    assert alike.tolist() == pytest.approx([alike[0].item()] * 3)
    assert (weighed / weighed[2]).tolist() == pytest.approx([4, 2, 1])


def test_a_source_that_does_not_shift_its_outputs_has_no_metric() -> None:
    assert not shift_metric(torch.zeros(4, 3, 5), 0.5).any()


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_the_shift_distance_is_that_of_a_plain_loop_in_any_order_of_batches(power: float) -> None:
    base, anchors, targets, _ = two_sources()
    shifts = [target - base(x) for x, target in zip(anchors, targets, strict=True)]
    objective = Objective("shift", anchors, targets, shifts, power)
    outputs = [draw(*target.shape, seed=9) for target in targets]
    expected = sum(
        ((output - target) @ shift_metric(shift, power)).square().sum() / target.shape[1]
        for output, target, shift in zip(outputs, targets, shifts, strict=True)
    )
    everything = torch.cat(outputs)
    batches = objective.batches(torch.randperm(11, generator=generator()), 4)
    assert sorted(torch.cat([batch.rows for batch in batches]).tolist()) == list(range(11))
    total = sum(objective.loss(everything[batch.rows], batch) for batch in batches)
    assert float(total) == pytest.approx(float(expected))


def test_adaptation_in_the_metric_serves_a_source_that_moves_little() -> None:
    base, anchors, targets, tasks = two_sources()
    small = [base(anchors[0]) + 1e-2 * (targets[0] - base(anchors[0])), targets[1]]

    def left(kind: str) -> float:
        result = adapt(base, CALL, [anchors[0]] * 2, [small[0], targets[0]], tasks, kind=kind, epochs=60)
        output = torch.func.functional_call(base, result.parameters, (anchors[0],))
        return float((output - small[0]).square().mean())

    assert left("shift") < 0.5 * left("mse")


def test_frozen_parameters_stay_and_a_linear_schedule_ends_at_rest() -> None:
    base, anchors, targets, tasks = two_sources()
    names = [name for name, _ in base.named_parameters()]
    result = adapt(base, CALL, anchors, targets, tasks, frozen=frozenset(names[:1]), schedule="linear")
    assert torch.equal(result.parameters[names[0]], dict(base.named_parameters())[names[0]])
    assert not torch.equal(result.parameters[names[1]], dict(base.named_parameters())[names[1]])


# -- where anchors start -----------------------------------------------------------------------------------------------


def test_rows_are_drawn_without_replacement_while_there_are_enough() -> None:
    pool = torch.arange(12.0).view(12, 1).repeat(1, 3)
    assert sample_rows(pool, 12, generator())[:, 0].sort().values.tolist() == list(range(12))
    few = sample_rows(pool, 5, generator())
    assert few.shape == (5, 3)
    assert len(set(few[:, 0].tolist())) == 5
    assert torch.equal(few, few[:, :1].expand(5, 3))


def test_when_rows_run_out_means_of_pairs_are_added() -> None:
    pool = draw(4, 3)
    rows = sample_rows(pool, 9, generator())
    assert rows.shape == (9, 3)
    means = (pool[:, None] + pool[None, :]).flatten(0, 1) / 2
    assert all(any(torch.equal(row, own) for row in rows[:4]) for own in pool)
    assert all(any(torch.allclose(row, mean) for mean in means) for row in rows[4:])


def test_rows_depend_on_the_seed_alone() -> None:
    pool = draw(6, 3)
    assert torch.equal(sample_rows(pool, 9, generator(1)), sample_rows(pool, 9, generator(1)))
    assert not torch.equal(sample_rows(pool, 9, generator(1)), sample_rows(pool, 9, generator(2)))


@pytest.mark.parametrize("kind", ["weights", "gaussian"])
@pytest.mark.parametrize(("n", "tokens"), [(1, 1), (3, 2), (10, 5)])
def test_initial_anchors_have_the_asked_shape(kind: str, n: int, tokens: int) -> None:
    anchors = initial_anchors(kind, [draw(4, 6), draw(6, 5), draw(2, 6, seed=1)], n, tokens, 6, generator())
    assert (anchors.shape, anchors.dtype) == ((n, tokens, 6), torch.float32)


def test_gaussian_anchors_have_a_hundredth_of_unit_scale() -> None:
    anchors = initial_anchors("gaussian", [], 40, 10, 50, generator())
    assert float(anchors.std()) == pytest.approx(0.01, rel=0.03)
    assert float(anchors.mean()) == pytest.approx(0, abs=3e-4)


def test_weight_anchors_are_rows_of_the_weights_that_take_the_same_width() -> None:
    fitting, other, second = draw(4, 6), draw(6, 5), draw(3, 6, seed=1)
    anchors = initial_anchors("weights", [fitting, other, second], 7, 1, 6, generator())[:, 0]
    pool = torch.cat([fitting, second]).float()
    assert all(sum(torch.equal(row, own) for row in anchors) == 1 for own in pool)


def test_without_a_fitting_weight_anchors_are_gaussian() -> None:
    anchors = initial_anchors("weights", [draw(6, 5)], 40, 10, 50, generator())
    assert torch.equal(anchors, initial_anchors("gaussian", [], 40, 10, 50, generator()))


# -- distances ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_outputs_have_no_distance(kind: Any, dtype: torch.dtype) -> None:
    output = draw(5, 3, 4, dtype=dtype)
    assert float(distance(kind, output, output.clone())) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_distance_is_the_mean_over_anchors_of_a_plain_loop(kind: Any) -> None:
    output, target = draw(5, 3, 4), draw(5, 3, 4, seed=1)
    assert float(distance(kind, output, target)) == pytest.approx(float(plain_distance(kind, output, target)))


@pytest.mark.parametrize(("kind", "expected"), [("cosine", 0.5), ("mse", 0.5), ("mae", 0.5)])
def test_distances_of_known_outputs(kind: Any, expected: float) -> None:
    """One anchor agrees; the other's outputs are at right angles, each entry one apart."""
    output = torch.tensor([[[1.0, 2.0]], [[1.0, 0.0]]])
    target = torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]]])
    assert float(distance(kind, output, target)) == pytest.approx(expected)


def test_cosine_distance_is_two_for_opposite_outputs_and_blind_to_their_size() -> None:
    output = draw(4, 3, 5)
    assert float(distance("cosine", output, -2 * output)) == pytest.approx(2)
    assert float(distance("cosine", output, 3 * output)) == pytest.approx(0, abs=1e-12)


def test_squared_and_absolute_distance_of_a_constant_shift() -> None:
    output = draw(4, 3, 5)
    assert float(distance("mse", output, output + 3)) == pytest.approx(9)
    assert float(distance("mae", output, output - 3)) == pytest.approx(3)
