"""Divergences of answers, recorded answers, and coefficients learnt by them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fine_tune, make_model
from learning import CPU, Family, text_rows
from torch import Tensor

from hf_fda.divergence.learning import Learned, Learning, learn, task_factors
from hf_fda.divergence.measures import Measure, Target, answer, at_scored, compare, divergence, entropy
from hf_fda.divergence.objectives import Divergence, Entropy
from hf_fda.divergence.outputs import open_outputs, record
from hf_fda.divergence.sampling import minibatches, split
from hf_fda.divergence.state import LearningState
from hf_fda.divergence.task_models import logits_of, source_model
from hf_fda.errors import InputError, RunError

MEASURES: tuple[Measure, ...] = ("jensen-shannon", "forward-kl", "reverse-kl")
DOUBLE = torch.float64


def pair(rows: int = 50, size: int = 7, seed: int = 0, spread: float = 3) -> tuple[Tensor, Tensor]:
    """Log-probabilities of two distributions a row."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (spread * torch.randn(2, rows, size, generator=generator, dtype=DOUBLE)).log_softmax(-1)
    return p, q


def kl(p: Tensor, q: Tensor) -> Tensor:
    """As it is written, of log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def test_measures_are_what_they_are_called() -> None:
    p, q = pair()
    middle = ((p.exp() + q.exp()) / 2).log()
    torch.testing.assert_close(compare("forward-kl", p, q), kl(p, q))
    torch.testing.assert_close(compare("reverse-kl", p, q), kl(q, p))
    torch.testing.assert_close(compare("jensen-shannon", p, q), (kl(p, middle) + kl(q, middle)) / 2)


def test_jensen_shannon_is_symmetric_and_at_most_ln_2() -> None:
    for spread in (0.01, 1, 30, 1000):
        p, q = pair(spread=spread)
        found = compare("jensen-shannon", p, q)
        torch.testing.assert_close(found, compare("jensen-shannon", q, p))
        assert bool((found >= 0).all()) and bool((found <= math.log(2) + 1e-12).all())
    apart = torch.eye(2, dtype=DOUBLE).log()
    torch.testing.assert_close(compare("jensen-shannon", apart[:1], apart[1:]), torch.tensor([math.log(2)]).double())


def test_small_jensen_shannon_keeps_its_digits_in_float32() -> None:
    p, _ = pair(size=1000)
    q = (p + 1e-3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)).log_softmax(-1)
    exact = compare("jensen-shannon", p, q)
    assert float(exact.max()) < 1e-6
    rounded = compare("jensen-shannon", p.float(), q.float()).double()
    assert float((rounded - exact).abs().max()) < 2e-8


@pytest.mark.parametrize("measure", MEASURES)
def test_a_divergence_from_itself_is_zero_and_flat(measure: Measure) -> None:
    logits = torch.randn(20, 9, requires_grad=True)
    found = divergence(measure, "labels", logits, Target(logits.detach().log_softmax(-1)))
    assert float(found.detach().abs().max()) < 1e-6
    found.sum().backward()
    assert logits.grad is not None and float(logits.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("measure", MEASURES)
def test_gradients_are_right_and_finite_where_probabilities_are_zero(measure: Measure) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 6, generator=generator, dtype=DOUBLE, requires_grad=True)
    source = torch.randn(5, 6, generator=generator, dtype=DOUBLE)
    if measure != "reverse-kl":  # of the reverse the divergence is infinite there
        source[:, 0] = -math.inf
    target = Target(source.log_softmax(-1))
    assert torch.autograd.gradcheck(lambda x: divergence(measure, "labels", x, target), logits)
    certain = torch.tensor([[2000.0, 0.0, -2000.0]], requires_grad=True)
    for answers in ([0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]):
        found = divergence(measure, "labels", certain, Target(torch.tensor([answers]).log()))
        (gradient,) = torch.autograd.grad(found.sum(), certain)
        assert bool(found.isfinite().all()) and bool(gradient.isfinite().all())


def test_flags_are_pairs_of_distributions_and_values_squared_errors() -> None:
    own, theirs = 3 * torch.randn(2, 8, 4)
    found = divergence("jensen-shannon", "flags", own, Target(theirs))
    yes = [torch.stack([z.sigmoid(), 1 - z.sigmoid()], -1).double().log() for z in (theirs, own)]
    torch.testing.assert_close(found.double(), compare("jensen-shannon", *yes).mean(-1), rtol=1e-4, atol=1e-6)
    far = divergence("jensen-shannon", "flags", torch.full((1, 4), 99.0), Target(torch.full((1, 4), -99.0)))
    torch.testing.assert_close(far, torch.tensor([math.log(2)]))
    for measure in MEASURES:
        torch.testing.assert_close(divergence(measure, "values", own, Target(theirs)), (own - theirs).square().mean(-1))


@pytest.mark.parametrize("measure", MEASURES)
def test_a_bucket_for_the_rest_bounds_the_divergence_from_below(measure: Measure) -> None:
    p, q = pair(size=30)
    whole = divergence(measure, "tokens", q, Target(p))
    last = torch.zeros(len(p), dtype=DOUBLE)
    for k in (1, 5, 20, 29):
        ids = p.topk(k, -1).indices
        target = Target(answer("tokens", p, ids), ids)
        torch.testing.assert_close(target.values.exp().sum(-1), torch.ones(len(p), dtype=DOUBLE))
        found = divergence(measure, "tokens", q, target)
        assert bool((found <= whole + 1e-12).all()) and bool((found >= last - 1e-12).all())  # finer is larger
        last = found
    torch.testing.assert_close(last, whole)  # a bucket of one token is that token


@pytest.mark.parametrize("measure", MEASURES)
def test_a_bucket_that_is_nearly_empty_has_the_right_gradient(measure: Measure) -> None:
    generator = torch.Generator().manual_seed(0)
    source, merged = torch.randn(2, 3, 40, generator=generator, dtype=DOUBLE)
    source[:, :4] += 30
    merged[:, :4] += 30
    ids = torch.arange(4).expand(3, 4)
    found = []
    for dtype in (DOUBLE, torch.float32):
        logits = merged.to(dtype).requires_grad_(True)
        value = divergence(measure, "tokens", logits, Target(answer("tokens", source, ids), ids))
        found.append(torch.autograd.grad(value.sum(), logits)[0].double())
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-7)


def test_comparing_some_positions_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = pair()
    found = []
    for piece in (1 << 22, 20):
        monkeypatch.setattr("hf_fda.divergence.measures.PIECE", piece)
        logits = q.clone().requires_grad_(True)
        value = divergence("jensen-shannon", "labels", logits, Target(p))
        found.append((value.detach(), torch.autograd.grad((value * value.detach()).sum(), logits)[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_entropy_of_certain_and_of_even_answers() -> None:
    torch.testing.assert_close(entropy("labels", torch.zeros(2, 5)), torch.full((2,), math.log(5)))
    assert float(entropy("labels", torch.tensor([[900.0, 0, 0]]))) == 0
    torch.testing.assert_close(entropy("flags", torch.zeros(2, 5)), torch.full((2,), math.log(2)))
    with pytest.raises(InputError, match="regression"):
        entropy("values", torch.zeros(2, 1))


def test_only_what_is_scored_counts() -> None:
    logits = torch.randn(2, 3, 4)
    scored = torch.tensor([[1, 0, 1], [0, 0, 1]])
    torch.testing.assert_close(at_scored(logits, scored), torch.stack([logits[0, 0], logits[0, 2], logits[1, 2]]))
    assert at_scored(torch.randn(5), None).shape == (5, 1)


def language_models() -> Family:
    """A tiny language model and two fine-tunes of it."""
    base = make_model("gpt2")
    return Family(base, {"one": fine_tune(base, 1, 0.1), "two": fine_tune(base, 2, 0.1)}, "tokens")


@pytest.mark.parametrize("in_file", [False, True])
def test_recorded_answers_are_those_that_the_source_gives(tmp_path: Path, in_file: bool) -> None:
    family = language_models()
    source, rows = family.inputs.weighted[0], family.rows[0]
    model = source_model(source, CPU)
    path = tmp_path / "outputs.safetensors" if in_file else None
    for precision, near in (("float32", 1e-6), ("float16", 4e-3)):
        recorded = record(model, rows, CPU, batch_size=5, precision=precision, path=path)  # type: ignore[arg-type]
        assert len(recorded) == len(rows)
        chosen = [7, 0, 11, 3]
        with torch.no_grad():
            logits = logits_of(model, rows.batch(chosen))
        target = recorded.target(chosen, CPU)
        assert target.values.shape == logits.shape == (sum(int(rows.scored[row].sum()) for row in chosen), 99)
        assert float((target.values - logits.log_softmax(-1)).abs().max()) < near
        assert float(divergence("jensen-shannon", "tokens", logits, target).max()) < near**2 + 1e-7


def test_recorded_answers_in_a_file_and_in_memory_are_the_same(tmp_path: Path) -> None:
    family = language_models()
    model, rows = source_model(family.inputs.weighted[0], CPU), family.rows[0]
    for top_k in (None, 8, 99, 1000):
        path = tmp_path / f"{top_k}.safetensors"
        record(model, rows, CPU, batch_size=5, top_k=top_k, path=path)
        stored = open_outputs(path, "tokens").target([5, 2], CPU)
        held = record(model, rows, CPU, batch_size=5, top_k=top_k).target([5, 2], CPU)
        assert torch.equal(stored.values, held.values)
        assert held.values.shape[1] == (9 if top_k == 8 else 99)
        assert (held.ids is None) == (top_k != 8)
        if held.ids is not None and stored.ids is not None:
            assert torch.equal(stored.ids, held.ids)


def test_a_file_without_recorded_answers_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="no recorded outputs"):
        open_outputs(tmp_path / "other.safetensors", "labels")


def test_answers_that_are_not_finite_are_an_error(classifiers: Any) -> None:
    family = Family(*classifiers)
    model: Any = source_model(family.inputs.weighted[0], CPU)
    model.classifier.bias.data.fill_(math.nan)
    with pytest.raises(RunError, match="not finite"):
        record(model, family.rows[0], CPU)


def learnt(family: Family, granularity: str = "block", measure: Measure = "jensen-shannon", **options: Any) -> Learned:
    """Coefficients learnt by divergence on all of a family's rows."""
    settings = Learning(**{"steps": 60, "learning_rate": 0.05, "batch_size": 12, "held_out": 0, **options})
    parameters = family.parameters(granularity, 0.3)
    return learn(parameters, family.tasks(parameters), Divergence(measure, family.outputs()), settings)


@pytest.mark.parametrize("measure", MEASURES)
def test_of_one_source_the_best_coefficient_is_one(measure: Measure) -> None:
    base = make_model("bert")
    family = Family(base, {"one": fine_tune(base, 1, 0.1)})
    found = learnt(family, "task", measure, steps=150)
    assert found.before[0] > 1e-4
    assert found.after[0] < 1e-3 * found.before[0]
    torch.testing.assert_close(found.coefficients, torch.ones(1, 1, dtype=DOUBLE), rtol=0, atol=0.02)


def test_identical_sources_give_a_merge_that_equals_them() -> None:
    base = make_model("bert")
    same = fine_tune(base, 1, 0.1)
    family = Family(base, {"one": same, "two": same})
    found = learnt(family, "task", steps=150)
    torch.testing.assert_close(found.coefficients.sum(0), torch.ones(1, dtype=DOUBLE), rtol=0, atol=0.02)
    assert sum(found.after) < 1e-3 * sum(found.before)


@pytest.mark.parametrize("granularity", ["task", "block", "tensor"])
@pytest.mark.parametrize("order", ["mixed", "turn"])
def test_learning_lowers_the_divergence(granularity: str, order: str) -> None:
    found = learnt(language_models(), granularity, order=order)
    assert sum(found.after) < 0.9 * sum(found.before)
    assert found.coefficients.shape == (2, len(found.groups))
    assert (found.steps, found.best) == (60, 60)


@pytest.mark.parametrize("kind", ["flags", "values"])
def test_learning_on_flags_and_values(kind: Any) -> None:
    base = make_model("bert")
    family = Family(base, {"one": fine_tune(base, 1, 0.1), "two": fine_tune(base, 2, 0.1)}, kind)
    found = learnt(family)
    assert sum(found.after) < 0.9 * sum(found.before)


def test_recorded_in_float32_and_in_half_precision_learn_the_same(tmp_path: Path) -> None:
    family = language_models()
    found = {}
    settings = Learning(steps=20, learning_rate=0.02, batch_size=4)
    for precision in ("float32", "float16"):
        parameters = family.parameters()
        objective = Divergence("jensen-shannon", family.outputs(precision=precision))
        found[precision] = learn(parameters, family.tasks(parameters), objective, settings)
    parameters = family.parameters()
    plain = learn(parameters, family.tasks(parameters), Uncached(family), settings)
    torch.testing.assert_close(found["float32"].coefficients, plain.coefficients, rtol=0, atol=1e-4)
    torch.testing.assert_close(found["float16"].coefficients, plain.coefficients, rtol=0, atol=5e-3)


class Uncached:
    """Jensen-Shannon divergence from sources that are asked anew each time."""

    def __init__(self, family: Family) -> None:
        self.models = [source_model(source, CPU) for source in family.inputs.weighted]
        self.rows = family.rows

    def __call__(self, task: int, logits: Tensor, rows: Any) -> Tensor:
        with torch.no_grad():
            own = logits_of(self.models[task], self.rows[task].batch(rows))
        return divergence("jensen-shannon", "tokens", logits, Target(own.log_softmax(-1)))


def test_the_same_seed_gives_the_same_coefficients_and_another_does_not() -> None:
    family = language_models()
    objective = Divergence("jensen-shannon", family.outputs())
    found = []
    for seed in (0, 0, 1):
        parameters = family.parameters()
        found.append(learn(parameters, family.tasks(parameters), objective, Learning(steps=6, batch_size=3), seed))
    assert torch.equal(found[0].coefficients, found[1].coefficients)
    assert found[0].history == found[1].history
    assert not torch.equal(found[0].coefficients, found[2].coefficients)


@pytest.mark.parametrize("order", ["mixed", "turn"])
def test_learning_that_was_broken_off_goes_on_to_the_same_coefficients(order: Any, tmp_path: Path) -> None:
    family = language_models()
    objective = Divergence("jensen-shannon", family.outputs())
    settings = Learning(steps=14, batch_size=3, every=4, patience=2, learning_rate=0.2, order=order, balance=True)

    def run(state: LearningState | None = None, **options: Any) -> Learned:
        parameters = family.parameters()
        return learn(parameters, family.tasks(parameters), objective, settings, 3, state=state, **options)

    def number(state: LearningState) -> None:
        state.write(tmp_path / f"{state.step}.safetensors")

    whole = run(keep=number)
    kept = sorted(tmp_path.iterdir(), key=lambda path: int(path.stem))
    assert len(kept) > 1
    for path in kept:
        seen: list[int] = []
        found = run(LearningState.read(path), report=lambda step, value, seen=seen: seen.append(step))
        assert torch.equal(found.coefficients, whole.coefficients)
        assert (found.history, found.best, found.steps) == (whole.history, whole.best, whole.steps)
        assert all(step > int(path.stem) for step in seen)


def test_bounded_coefficients_stay_in_their_bounds() -> None:
    found = learnt(language_models(), "tensor", bounds=(0.0, 0.4))
    assert bool((found.coefficients >= 0).all()) and bool((found.coefficients <= 0.4).all())
    assert bool((found.coefficients == 0.4).any())


def test_the_best_coefficients_on_rows_held_out_are_kept_and_learning_stops() -> None:
    family = language_models()
    parameters = family.parameters()
    looks: list[tuple[int, float]] = []
    settings = Learning(steps=400, learning_rate=0.5, batch_size=2, held_out=0.3, every=4, patience=3)
    found = learn(
        parameters,
        family.tasks(parameters),
        Divergence("jensen-shannon", family.outputs()),
        settings,
        report=lambda *look: looks.append(look),
    )
    assert found.steps == found.best + 12 < 400
    assert [look.step for look in found.history] == list(range(0, found.steps + 1, 4)) == [step for step, _ in looks]
    assert sum(found.after) == min(sum(look.objective) for look in found.history)
    assert torch.equal(parameters.coefficients, found.coefficients)


def test_the_step_size_falls_in_a_line_or_stays() -> None:
    settings = Learning(steps=4, learning_rate=0.8)
    assert [settings.rate(step) for step in (1, 2, 3, 4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert Learning(steps=4, learning_rate=0.8, schedule="constant").rate(4) == 0.8


def test_rows_held_out_are_not_learnt_from() -> None:
    rows = text_rows("task", "labels", 40)
    learnt_from, watched = split(rows, 0.25, seed=3)
    assert len(watched) == 10 and sorted(learnt_from + watched) == list(range(40))
    assert (learnt_from, watched) == split(rows, 0.25, seed=3) != split(rows, 0.25, seed=4)
    assert sorted(split(rows, 0, seed=3)[1]) == list(range(40))
    with pytest.raises(InputError, match="has 1 rows"):
        split(text_rows("task", "labels", 1), 0.5, seed=0)


def test_minibatches_see_every_row_equally_often() -> None:
    batches = minibatches(range(5), 2, torch.Generator().manual_seed(0))
    seen = [row for _ in range(10) for row in next(batches)]
    assert sorted(seen) == sorted(4 * list(range(5)))
    assert len(next(minibatches(range(3), 8, torch.Generator()))) == 3


def test_entropy_is_lowered_without_asking_the_sources(classifiers: Any) -> None:
    family = Family(*classifiers)
    parameters = family.parameters("tensor")
    settings = Learning(steps=40, learning_rate=0.05, batch_size=12, held_out=0)
    found = learn(parameters, family.tasks(parameters), Entropy(["labels"] * 3), settings)
    assert sum(found.after) < sum(found.before)


def test_an_objective_that_is_not_finite_is_an_error() -> None:
    family = language_models()
    with pytest.raises(RunError, match=r"not finite|objective is"):
        learnt(family, learning_rate=1e20, every=1)


def test_balanced_tasks_weigh_alike_at_the_start() -> None:
    start = (0.02, 0.06, 0.1)
    factors = task_factors(Learning(balance=True), start)
    parts = [factor * own for factor, own in zip(factors, start, strict=True)]
    assert parts == pytest.approx([sum(start) / 3] * 3)
    assert task_factors(Learning(balance=True, task_weights=(1.0, 2.0, 0.0)), start)[1:] == (2 * factors[1], 0.0)
    assert task_factors(Learning(balance=True), (0.0, 0.5)) == (1.0, 0.5)
    assert task_factors(Learning(), start) == (1.0, 1.0, 1.0)
