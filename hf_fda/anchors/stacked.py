"""Several units of one shape as one: parameters stacked, rows one below the other, products in batches.

A small unit's products leave most of a machine idle, and starting them takes longer than doing them. Units whose
parameters have the same names and shapes, and which are called alike, can run together: linear layers and layer norms
on stacked parameters, everything else once for the rows of all. What stands outside these layers is not known to be
alike, so a stack is compared with its units, and not used where it gives something else.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_fda.anchors.gradients import FAITHFUL, Matched, in_double
from hf_fda.anchors.outputs import LINEAR, Matcher
from hf_fda.anchors.products import MatrixProduct, narrows
from hf_fda.anchors.smooth import Norm
from hf_fda.blocks.capture import Call, UnitCall
from hf_fda.merge_methods.fda import Distance

TRIED = 2
"""Anchors of each unit on which a stack is compared with its units."""


@dataclass(frozen=True)
class UnitPair:
    """A unit of the base and of a source, both frozen and on one device, and where its anchors start: `call` is how
    both are called, `start` (n, T, d) where X starts, `offset` (T, d) what is added to X in front of the unit (position
    embeddings) or None."""

    base: nn.Module
    source: nn.Module
    call: UnitCall
    start: Tensor
    offset: Tensor | None = None

    @property
    def shift(self) -> Tensor:
        """What is added to X, (T, d)."""
        return torch.zeros_like(self.start[0]) if self.offset is None else self.offset


def match_together(pairs: Sequence[UnitPair], matched: Sequence[Matched], kind: Distance) -> Matcher | None:
    """The cosines of several units as one function of their X (S, n, T, d); None where they cannot run together.

    Args:
        pairs: the units, S of them.
        matched: what can be matched of each.
        kind: distance of the outputs.
    """
    first = matched[0]
    alike = all(
        list(own.tasks) == list(first.tasks)
        and own.plain == first.plain
        and pair.call.like(pairs[0].call)
        and pair.start.shape == pairs[0].start.shape
        for pair, own in zip(pairs, matched, strict=True)
    )
    if not alike or not first.tasks or not (_stackable(pairs) and _faithful(pairs, matched, kind)):
        return None
    modules = [(pair.base, pair.source) for pair in pairs]
    return _matcher(modules, pairs[0].call, matched, kind)


def _stackable(pairs: Sequence[UnitPair]) -> bool:
    """Whether the units have the same parameters, and only such as a stack knows how to use."""
    shapes = [{name: own.shape for name, own in pair.base.named_parameters()} for pair in pairs]
    first = pairs[0].base
    known = all(
        isinstance(module, LINEAR) or own.ndim == 1
        for module in first.modules()
        for own in module.parameters(recurse=False)
    )
    return known and all(own == shapes[0] for own in shapes)


def _faithful(pairs: Sequence[UnitPair], matched: Sequence[Matched], kind: Distance) -> bool:
    """Whether a stack gives each unit's cosines, in float64 on a few anchors."""
    modules, tasks, samples, alone = [], [], [], []
    for pair, own in zip(pairs, matched, strict=True):
        (base, source), call, sample = in_double((pair.base, pair.source), pair.call, (pair.start + pair.shift)[:TRIED])
        used = Matched({name: task.to(sample) for name, task in own.tasks.items()}, own.plain)
        alone.append(used.matcher(base, source, call, kind)(sample.unsqueeze(0))[0])
        modules.append((base, source))
        tasks.append(used)
        samples.append(sample)
    try:
        found = _matcher(modules, pairs[0].call.to(torch.float64), tasks, kind)(torch.stack(samples))
    except Exception:  # what a module does with a stack of its parameters is its own
        return False
    return bool(((found - torch.stack(alone)).abs() < FAITHFUL).all())


def _matcher(
    modules: Sequence[tuple[nn.Module, nn.Module]], call: UnitCall, matched: Sequence[Matched], kind: Distance
) -> Matcher:
    first = matched[0]
    tasks = {name: torch.stack([own.tasks[name] for own in matched]) for name in first.tasks}
    bases, sources = zip(*modules, strict=True)
    return Matcher(stack(bases), stack(sources), StackedCall(call, len(modules)), tasks, kind, first.plain)


def stack(modules: Sequence[nn.Module]) -> nn.Module:
    """A module like the first whose parameters are those of all, (S, *shape); frozen. `StackedCall` calls it."""
    result = copy.deepcopy(modules[0])
    parameters = [dict(module.named_parameters()) for module in modules]
    for name in parameters[0]:
        path, _, own = name.rpartition(".")
        together = torch.stack([peer[name].detach() for peer in parameters])
        setattr(result.get_submodule(path), own, nn.Parameter(together, requires_grad=False))
    return result


@dataclass(frozen=True)
class StackedCall:
    """Calls a stack of `count` units on the rows of all, (S n, T, d), those of a unit beside each other."""

    call: Call
    count: int

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        """Run the stack `module` on x."""
        with Stacked(module, self.count, len(x) // self.count):
            return self.call(module, x)


class Stacked(TorchFunctionMode):
    """Inside, each unit's rows meet that unit's parameters.

    Args:
        module: the stack.
        count: units in it.
        rows: of each in what it is called with.
    """

    def __init__(self, module: nn.Module, count: int, rows: int) -> None:
        super().__init__()
        self.own, self.count, self.rows = {id(one) for one in module.parameters()}, count, rows

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replace what layers do with stacked parameters; leave what takes none of them."""
        kwargs = kwargs or {}
        if not any(id(one) in self.own for one in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        if func is torch.nn.functional.linear:
            return self._linear(*args, **kwargs)
        if func is torch.addmm and len(args) == 3 and not kwargs:  # as GPT-2's Conv1D calls it
            return self._product(args[1], args[2], args[0])
        if func is torch.nn.functional.layer_norm:
            return self._layer_norm(*args, **kwargs)
        return func(*map(self._spread, args), **{name: self._spread(value) for name, value in kwargs.items()})

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._product(input, weight.mT, bias)

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``input weight + bias`` of (..., d_in), (S, d_in, d_out) and (S, d_out)."""
        rows = input.reshape(self.count, -1, input.shape[-1])
        if narrows(rows, weight):
            output = MatrixProduct.apply(rows, weight)
            output = output if bias is None else output + bias.unsqueeze(1)
        else:
            output = rows @ weight if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight)
        return output.view(*input.shape[:-1], weight.shape[-1])

    def _layer_norm(
        self, input: Tensor, normalized_shape: Sequence[int], weight: Tensor, bias: Tensor | None, eps: float = 1e-5
    ) -> Tensor:
        return Norm.apply(input, weight, torch.zeros_like(weight) if bias is None else bias, eps)

    def _spread(self, value: Any) -> Any:
        """A stack of vectors as one for each row, (S n, 1, d); anything else as it is."""
        if id(value) not in self.own:
            return value
        return value.repeat_interleave(self.rows, 0).unsqueeze(1)
