"""How a block is called: its arguments, captured from one run of the base with one block in memory at a time."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from hf_fda.blocks.discovery import Unit, example_inputs, find_blocks
from hf_fda.blocks.streamed import stream_weights
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.layout import meta_model
from hf_fda.errors import HFFDAError, InputError, RunError

Call = Callable[[nn.Module, Tensor], Tensor]
"""Runs a unit's module on x (n, T, d), as a `UnitCall` does."""


@contextmanager
def apart(what: str) -> Iterator[None]:
    """Says what could not be run apart from its model, whatever the model's own code raises.

    Args:
        what: runs inside, in words.

    Raises:
        RunError: with what was raised, and the way out.
    """
    try:
        yield
    except (HFFDAError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        raise RunError(
            f"{what} cannot be run apart from the whole model ({type(error).__name__}: {said}); name parts of the "
            "blocks (such as unit='mlp'), or use a parameter-space method (such as method='isotropic')"
        ) from error


@dataclass
class UnitCall:
    """Everything a unit is called with beside its hidden states.

    Calling it with the unit's module and x (n, T, d) gives the unit's output (n, T, d'). An argument that is `batched`
    belongs to rows: it is there once for all rows, or for each of them (then `at` chooses). Those numbered in `folded`
    are given to the unit with their first two dimensions as one (a bias for every row's heads). `along` says which of
    each argument's dimensions run over positions; None where that is not known, and the call cannot be cut.
    """

    arguments: Any = ((None,), {})
    batched: tuple[bool, ...] = ()
    hidden: int | str = 0
    size: int | None = None
    tokens: int | None = None
    along: tuple[tuple[int, ...], ...] | None = None
    folded: tuple[int, ...] = ()

    def to(self, dtype: torch.dtype) -> UnitCall:
        """The same call with its floating-point arguments in another type."""
        leaves, tree = tree_flatten(self.arguments)
        cast = [leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf for leaf in leaves]
        return dataclasses.replace(self, arguments=tree_unflatten(cast, tree))

    def at(self, rows: Tensor) -> UnitCall:
        """The call of some rows, (b,) numbers on the device."""
        if not any(self.batched):
            return self
        leaves, tree = tree_flatten(self.arguments)
        chosen = [
            leaf[rows] if batched and len(leaf) > 1 else leaf
            for leaf, batched in zip(leaves, self.batched, strict=True)
        ]
        return dataclasses.replace(self, arguments=tree_unflatten(chosen, tree))

    def cut(self, positions: int) -> UnitCall:
        """The call on the first positions only."""
        assert self.along is not None
        leaves, tree = tree_flatten(self.arguments)
        for number, dimensions in enumerate(self.along):
            for dimension in dimensions:
                leaves[number] = leaves[number].narrow(dimension, 0, positions)
        return dataclasses.replace(self, arguments=tree_unflatten(leaves, tree))

    def like(self, other: UnitCall) -> bool:
        """Whether another call gives a unit the same beside its hidden states."""
        facts, others = ((own.batched, own.hidden, own.size, own.tokens, own.folded) for own in (self, other))
        (leaves, tree), (theirs, structure) = self._beside_hidden(), other._beside_hidden()
        return facts == others and tree == structure and all(map(_equal, leaves, theirs))

    def _beside_hidden(self) -> tuple[list[Any], Any]:
        """The arguments but for the hidden states, as leaves of a tree."""
        args, kwargs = self.arguments
        positional = [None if at == self.hidden else value for at, value in enumerate(args)]
        return tree_flatten((positional, {name: value for name, value in kwargs.items() if name != self.hidden}))

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        """Run `module` on x (n, T, d)."""
        leaves, tree = tree_flatten(self.arguments)
        if self.batched:
            leaves = [
                leaf.expand(len(x), *leaf.shape[1:]) if batched else leaf
                for leaf, batched in zip(leaves, self.batched, strict=True)
            ]
        for number in self.folded:
            leaves[number] = leaves[number].flatten(0, 1)
        args, kwargs = tree_unflatten(leaves, tree)
        if isinstance(self.hidden, str):
            output = module(*args, **kwargs | {self.hidden: x})
        else:
            output = module(*(x if at == self.hidden else value for at, value in enumerate(args)), **kwargs)
        return output[0] if isinstance(output, tuple) else output


@dataclass
class Capture:
    """Calls of all units, and the ids that the model's position embeddings were asked for (by name)."""

    calls: dict[str, UnitCall] = field(default_factory=dict)
    positions: dict[str, Tensor] = field(default_factory=dict)


def capture_calls(base: Checkpoint, units: Sequence[Unit], tokens: int | None, device: torch.device) -> Capture:
    """Capture how each unit is called.

    In a text model, a unit whose forward takes hidden states alone (an MLP) needs no run. Otherwise the base runs
    twice, on one and on two random examples; an argument whose first dimension differs between the runs belongs to the
    batch. Where blocks of a text model are called alike whatever those before them return, they are skipped; elsewhere
    each module's weights are read when it is entered and dropped when it is left.

    Args:
        base: the base checkpoint.
        units: what will be called.
        tokens: T, for text; the T of images follows from the model.
        device: where the arguments shall lie.
    """
    if tokens is not None and _needs_no_run(base.layout.model, units):
        size = int(base.config.get_text_config().hidden_size)
        return Capture({unit.name: UnitCall(size=size, tokens=tokens) for unit in units})
    if tokens is not None:
        found = _without_blocks(base, units, tokens, device)
        if found is not None:
            return found
    one, positions = _run(base, units, 1, tokens or 5, device)
    two, _ = _run(base, units, 2, tokens or 5, device)
    return Capture({name: _call(one[name], two[name]) for name in one}, positions)


def _without_blocks(base: Checkpoint, units: Sequence[Unit], tokens: int, device: torch.device) -> Capture | None:
    """The calls of whole blocks, found without any block's weights: every block hands on its hidden states, once as
    they are and once moved. None where that changes a call, or a model wants more of its blocks."""
    if any(unit.name != unit.block for unit in units):
        return None
    try:
        one, positions = _run(base, units, 1, tokens, device, skip=0.0)
        moved, _ = _run(base, units, 1, tokens, device, skip=1.0)
        two, _ = _run(base, units, 2, tokens, device, skip=0.0)
        calls = {unit.name: _call(one[unit.name], two[unit.name]) for unit in units}
    except Exception:  # what a model does with its blocks' outputs, which may be more than hidden states, is its own
        return None
    size = base.config.get_text_config().hidden_size
    shapes = {_hidden(seen[unit.name]).shape for seen in (one, moved) for unit in units}
    alike = all(_same_beside_hidden(one[unit.name], moved[unit.name]) for unit in units)
    return Capture(calls, positions) if alike and shapes == {(1, tokens, size)} else None


def _same_beside_hidden(one: Any, other: Any) -> bool:
    """Whether two calls have the same arguments but for the hidden states."""
    (leaves, tree), (others, structure) = tree_flatten(one), tree_flatten(other)
    own, hidden = _hidden(one), _hidden(other)
    return tree == structure and all(
        (leaf is own and peer is hidden) or _equal(leaf, peer) for leaf, peer in zip(leaves, others, strict=True)
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return bool(one == other)


def _needs_no_run(model: PreTrainedModel, units: Sequence[Unit]) -> bool:
    """Whether the calls are known beforehand: text (an image sets its own number of tokens), no table of position
    embeddings whose ids are wanted, and units that take hidden states alone."""
    text = "pixel_values" not in inspect.signature(model.base_model.forward).parameters
    plain = all(len(inspect.signature(model.get_submodule(unit.name).forward).parameters) == 1 for unit in units)
    return text and plain and not any(_is_position_table(path, module) for path, module in model.named_modules())


def _is_position_table(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and "position" in path.rpartition(".")[2]


def _run(
    base: Checkpoint, units: Sequence[Unit], batch: int, tokens: int, device: torch.device, skip: float | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What units are called with, and the positions that were asked for, in a run of the base; with `skip` its blocks
    do nothing but add that number."""
    layout = base.layout
    model = meta_model(layout.config, layout.model_class)
    seen: dict[str, Any] = {}
    positions: dict[str, Tensor] = {}
    for unit in units:
        hook = _recorder(seen, unit.name)
        model.get_submodule(unit.name).register_forward_pre_hook(hook, with_kwargs=True)
    for path, module in model.named_modules():
        if _is_position_table(path, module):
            module.register_forward_pre_hook(_position_recorder(positions, f"{path}.weight"))
    skipped = () if skip is None else find_blocks(model)
    for block in skipped:
        model.get_submodule(block).forward = lambda *args, **kwargs: _hidden((args, kwargs)) + (skip or 0)
    stream_weights(model, base, device, skipped)
    body: Any = model.base_model
    with torch.no_grad():
        body(**example_inputs(body, batch, tokens, device))
    return seen, positions


def _hidden(call: Any) -> Tensor:
    """The hidden states of a call."""
    args, kwargs = call
    return args[0] if args else kwargs["hidden_states"]


def _recorder(seen: dict[str, Any], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def record(_module: nn.Module, args: Any, kwargs: Any) -> None:
        seen[name] = (tuple(args), dict(kwargs))

    return record


def _position_recorder(positions: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any], None]:
    def record(_module: nn.Module, args: Any) -> None:
        if isinstance(args[0], Tensor):  # of a table that is not learned it may be a shape
            positions[name] = args[0].detach().cpu()

    return record


def _call(one: Any, two: Any) -> UnitCall:
    """The call of a unit from its arguments on one example and on two."""
    hidden: int | str = 0 if one[0] else "hidden_states"
    x = _hidden(one)
    if x.ndim != 3:
        raise InputError(
            f"blocks take hidden states {tuple(x.shape)} here, not (examples, tokens, width), and cannot be merged "
            "whole; name parts of them, such as unit='mlp'"
        )
    leaves, tree = tree_flatten(one)
    others, _ = tree_flatten(two)
    batched = tuple(
        isinstance(leaf, Tensor) and leaf.ndim > 0 and 2 * leaf.shape[0] == other.shape[0] > 0
        for leaf, other in zip(leaves, others, strict=True)
    )
    folded = tuple(number for number, own in enumerate(batched) if own and len(leaves[number]) > 1)
    kept = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    for number in folded:
        kept[number] = kept[number][None]
    return UnitCall(tree_unflatten(kept, tree), batched, hidden, size=x.shape[-1], tokens=x.shape[1], folded=folded)
