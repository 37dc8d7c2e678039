"""Learning the coefficients: Adam on K x G numbers, by minibatches of unlabelled rows, stopped on rows held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_fda.data.rows import TaskRows
from hf_fda.devices import release_memory
from hf_fda.divergence.coefficients import MergedParameters
from hf_fda.divergence.objectives import Objective
from hf_fda.divergence.sampling import minibatches, split
from hf_fda.divergence.state import Keep, LearningState, Look
from hf_fda.divergence.task_models import logits_of
from hf_fda.errors import RunError
from hf_fda.merge_methods.learned import Order, Schedule
from hf_fda.randomness import random_stream


@dataclass(frozen=True)
class Learning:
    """How coefficients are learnt.

    Args:
        steps: steps of Adam at most.
        learning_rate: its step size, in units of a coefficient.
        schedule: the step size stays, or falls in a line to zero over all steps ("linear"), so that the noise of small
            minibatches averages out.
        batch_size: rows of a task in a minibatch.
        order: a step sees a minibatch of every task ("mixed"), or of one task in turn ("turn").
        bounds: keep coefficients between these two; None: any are allowed.
        held_out: fraction of each task's rows that are not learnt from, by which the best coefficients are told; 0: the
            last coefficients are the result.
        every: steps between two looks at the rows held out.
        patience: looks without an improvement after which to stop.
        task_weights: a factor of each task's objective; None: one.
        balance: divide each task's objective by what it is at the start, on the rows held out, so that tasks whose
            answers are near to certain do not drown those whose answers are close to call.
    """

    steps: int = 300
    learning_rate: float = 1e-2
    schedule: Schedule = "linear"
    batch_size: int = 16
    order: Order = "mixed"
    bounds: tuple[float, float] | None = None
    held_out: float = 0.2
    every: int = 20
    patience: int = 5
    task_weights: tuple[float, ...] | None = None
    balance: bool = False

    def rate(self, step: int) -> float:
        """The step size of a step, counted from 1."""
        left = 1 - (step - 1) / self.steps if self.schedule == "linear" else 1
        return self.learning_rate * left


@dataclass(frozen=True)
class LearningTask:
    """A task to learn on: its rows, and its model on the shared merged tensors."""

    name: str
    rows: TaskRows
    model: PreTrainedModel


@dataclass(frozen=True)
class Learned:
    """Learnt coefficients.

    Args:
        tasks: K names, in the order of the coefficients' rows.
        groups: G names, in the order of their columns.
        coefficients: (K, G), float64 on the CPU.
        history: what was seen on the rows held out (on all rows, where none are), from step 0 on.
        best: the step of the coefficients that were kept.
        steps: steps taken.
    """

    tasks: tuple[str, ...]
    groups: tuple[str, ...]
    coefficients: Tensor
    history: tuple[Look, ...]
    best: int
    steps: int

    @property
    def before(self) -> tuple[float, ...]:
        """The objective of each task at the start."""
        return self.history[0].objective

    @property
    def after(self) -> tuple[float, ...]:
        """The objective of each task at the coefficients that were kept."""
        return next(look.objective for look in self.history if look.step == self.best)


Report = Callable[[int, float], None]


def learn(
    parameters: MergedParameters,
    tasks: Sequence[LearningTask],
    objective: Objective,
    settings: Learning,
    seed: int = 0,
    report: Report = lambda step, value: None,
    keep: Keep = lambda state: None,
    state: LearningState | None = None,
) -> Learned:
    """Learn the coefficients of merged parameters, from where these are; they end at the result.

    The sum over tasks of the mean over a task's rows (of language models: over its scored positions) is minimised. The
    same seed gives the same coefficients, also where learning was broken off and goes on from what was kept.

    Args:
        parameters: what is learnt.
        tasks: what to learn on, one for each source, in their order.
        objective: what to minimise.
        settings: how.
        seed: of the rows held out and of the minibatches.
        report: called with (step, objective on the rows held out, summed over tasks) at every look.
        keep: called at every look with where learning stands.
        state: where it stood when it was broken off; None: it begins.

    Raises:
        InputError: when a task has too few rows.
        RunError: when the objective becomes infinite or not a number.
    """
    splits = [split(task.rows, settings.held_out, seed) for task in tasks]
    batches = _Batches(tasks, [learnt for learnt, _ in splits], settings, seed)

    def look() -> list[float]:
        return _objectives(parameters, tasks, objective, splits, settings.batch_size)

    begun = state is not None
    state = state or LearningState(_within(parameters.coefficients.clone(), settings.bounds))
    adam = state.optimizer(settings.learning_rate)
    parameters.put(state.coefficients)
    start = state.history[0].objective if begun else look()
    factors = task_factors(settings, start)
    if begun:
        batches.skip(state.step)
    else:
        report(0, state.look(start, factors))
    while state.step < settings.steps and not (settings.held_out and state.since_best >= settings.patience):
        state.step += 1
        for number, rows in batches.of(state.step):
            _backward(parameters, tasks[number], objective, number, rows, factors[number])
        state.coefficients.grad = _finite(parameters.take_gradient(), state.step)
        adam.param_groups[0]["lr"] = settings.rate(state.step)
        adam.step()
        parameters.put(_within(state.coefficients, settings.bounds))
        release_memory()  # minibatches are of many lengths
        if state.step % settings.every == 0 or state.step == settings.steps:
            report(state.step, state.look(look(), factors))
            keep(state)
    if settings.held_out:
        assert state.best is not None
        parameters.put(state.best)
    best = state.best_step if settings.held_out else state.step
    names, groups = tuple(source.name for source in parameters.sources), parameters.groups.names
    return Learned(names, groups, parameters.coefficients, tuple(state.history), best, state.step)


class _Batches:
    """Which rows each step sees: the same for the same seed, whether it was broken off or not."""

    def __init__(
        self, tasks: Sequence[LearningTask], rows: Sequence[Sequence[int]], settings: Learning, seed: int
    ) -> None:
        self.mixed = settings.order == "mixed"
        self.streams = [
            minibatches(own, settings.batch_size, random_stream(seed, "minibatches", task.name))
            for task, own in zip(tasks, rows, strict=True)
        ]

    def of(self, step: int) -> list[tuple[int, list[int]]]:
        """The tasks of a step, counted from 1, by number, and the rows of each; steps come in order."""
        seen = range(len(self.streams)) if self.mixed else [(step - 1) % len(self.streams)]
        return [(number, next(self.streams[number])) for number in seen]

    def skip(self, steps: int) -> None:
        """Leave out the first steps."""
        for step in range(1, steps + 1):
            self.of(step)


def task_factors(settings: Learning, start: Sequence[float]) -> tuple[float, ...]:
    """The factor of each task's objective: its weight and, balanced, the mean of all tasks' objectives at the start
    over its own (where that is zero: one).

    >>> task_factors(Learning(balance=True), (0.1, 0.3))
    (2.0, 0.6666666666666667)
    """
    weights = settings.task_weights or (1.0,) * len(start)
    if not settings.balance:
        return tuple(weights)
    mean = sum(start) / len(start)
    return tuple(weight * (mean / own if own > 0 else 1.0) for weight, own in zip(weights, start, strict=True))


def _finite(gradient: Tensor, step: int) -> Tensor:
    if not bool(gradient.isfinite().all()):
        raise RunError(f"the gradient of the coefficients is not finite at step {step}; try a smaller step size")
    return gradient


def _within(coefficients: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    return coefficients if bounds is None else coefficients.clamp_(*bounds)


def _backward(
    parameters: MergedParameters,
    task: LearningTask,
    objective: Objective,
    number: int,
    rows: Sequence[int],
    factor: float,
) -> None:
    batch = task.rows.batch(rows).to(parameters.device)
    loss = objective(number, logits_of(task.model, batch), rows).mean()
    (factor * loss).backward()


@torch.no_grad()
def _objectives(
    parameters: MergedParameters,
    tasks: Sequence[LearningTask],
    objective: Objective,
    splits: Sequence[tuple[list[int], list[int]]],
    batch_size: int,
) -> list[float]:
    """The mean of the objective over each task's rows that are held out."""
    found = []
    for number, (task, (_, watched)) in enumerate(zip(tasks, splits, strict=True)):
        summed, count = torch.zeros((), dtype=torch.float64, device=parameters.device), 0
        for rows, batch in task.rows.batches(4 * batch_size, watched):
            values = objective(number, logits_of(task.model, batch.to(parameters.device)), rows)
            summed += values.sum()
            count += len(values)
        found.append(float(summed) / max(count, 1))
    return found
