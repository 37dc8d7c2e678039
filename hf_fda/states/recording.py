"""Recording what the units of a model are called with on real rows, with one block's weights in memory at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_fda.blocks import find_blocks
from hf_fda.blocks.capture import UnitCall
from hf_fda.blocks.streamed import Weights, stream_weights
from hf_fda.checkpoint.layout import meta_model
from hf_fda.data.rows import TaskRows
from hf_fda.errors import RunError
from hf_fda.states.rows_together import companions, shorter_pair
from hf_fda.states.unit_states import Ragged, UnitStates, compact, halved

HELD_BYTES = 2**30
"""Hidden states of the merged model, in single precision, that are held from one unit to the next."""


class _AllSeen(Exception):
    """Every unit was called; what follows need not run."""


@dataclass(frozen=True)
class Followed:
    """The states of a unit on some rows; the hidden states (b, T, d) of all rows that ran, as the unit takes them, on
    the CPU (None where nobody wants them); and whether blocks that ran gave hidden states alone, and the one where rows
    entered these."""

    states: UnitStates
    hidden: Tensor | None
    straight: bool


class StatesRecorder:
    """Runs the body of one model on rows of its task and keeps what its units are called with.

    Args:
        weights: the model.
        units: paths of units in this model, by the name to record them under.
        device: where to run, and where what is recorded lies.
        entry: the path of a block where rows enter the model with hidden states that are given (`follow`): what blocks
            before it do is left out.
    """

    def __init__(
        self, weights: Weights, units: Mapping[str, str], device: torch.device, entry: str | None = None
    ) -> None:
        self.device, self.units = device, dict(units)
        self.decodes = bool(weights.layout.config.is_encoder_decoder)
        self.decoding = {name for name, path in units.items() if self.decodes and "decoder" in path}
        model = meta_model(weights.layout.config, weights.layout.model_class)
        blocks = find_blocks(model)
        skipped = blocks[: blocks.index(entry)] if entry is not None else ()
        for block in skipped:
            model.get_submodule(block).forward = lambda *args, **kwargs: _taken_apart(args, kwargs)[1]
        stream_weights(model, weights, device, skipped)
        self.entering: Tensor | None = None
        self.left: Any = None
        self.plain = True
        for block in blocks:
            model.get_submodule(block).register_forward_hook(self._look)
        if entry is not None:
            module = model.get_submodule(entry)
            module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
            module.register_forward_hook(self._leave)
        self.body: Any = model.base_model
        self.takes = inspect.signature(self.body.forward).parameters
        self.seen: dict[str, tuple[Any, Any]] = {}
        self._shorter: tuple[str, dict[str, list[Any]]] = "", {}
        for name, path in self.units.items():
            module = model.get_submodule(path)
            module.register_forward_pre_hook(self._hook(name), prepend=True, with_kwargs=True)

    def _hook(self, name: str) -> Callable[..., None]:
        def record(_module: Any, args: Any, kwargs: Any) -> None:
            if name in self.seen:
                raise RunError(f"unit '{name}' runs more than once on a row; merge whole blocks, or without data")
            self.seen[name] = tuple(args), dict(kwargs)
            if len(self.seen) == len(self.units):
                raise _AllSeen

        return record

    def _enter(self, _module: Any, args: Any, kwargs: Any) -> Any:
        if self.entering is None:
            return None
        return ((self.entering, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": self.entering})

    def _look(self, _module: Any, _args: Any, output: Any) -> None:
        self.plain = self.plain and isinstance(output, Tensor)

    def _leave(self, _module: Any, _args: Any, output: Any) -> None:
        self.left = output

    @torch.no_grad()
    def record(self, rows: TaskRows, numbers: Sequence[int]) -> dict[str, UnitStates]:
        """What every unit is called with on some rows, by its name.

        Args:
            rows: of the model's task.
            numbers: which of them.

        Raises:
            RunError: naming the unit, when it does not run once on every row.
        """
        found = self._record(rows, numbers, None)
        self.seen.clear()
        return found

    @torch.no_grad()
    def follow(self, rows: TaskRows, numbers: Sequence[int], hidden: Tensor | None) -> Followed:
        """As `record`, of one unit, from the hidden states with which rows enter the model; with what it takes to go on
        from the unit.

        Args:
            rows: of the model's task.
            numbers: which of them.
            hidden: those that `follow` gave for the entry on the same rows; None where the model has no entry.
        """
        (found,) = self._record(rows, numbers, hidden).values()
        ((args, kwargs),) = self.seen.values()
        self.seen.clear()
        reached = _taken_apart(args, kwargs)[1]
        straight = self.plain and (hidden is None or torch.equal(self.left, reached))
        self.left = None
        return Followed(found, reached.cpu(), straight)

    def _record(self, rows: TaskRows, numbers: Sequence[int], hidden: Tensor | None) -> dict[str, UnitStates]:
        together = [*numbers, *companions(rows, len(numbers))]
        shorter = self._shorter_sizes(rows)
        self.entering = None if hidden is None else hidden.to(self.device)
        given = self._run(rows, together)
        self.entering = None
        shared: dict[int, Tensor] = {}
        found = {}
        for name in self.units:
            real = _real(given, "decoder_" if name in self.decoding else "", rows, together)
            found[name] = _states(name, self.seen[name], real, len(numbers), shared, shorter.get(name))
        return found

    def _run(self, rows: TaskRows, numbers: Sequence[int]) -> dict[str, Any]:
        """Run until every unit was called; what the body was given."""
        batch = rows.batch(numbers).to(self.device)
        given: dict[str, Any] = {name: value for name, value in batch.inputs.items() if name in self.takes}
        if self.decoding and "decoder_input_ids" not in given:
            raise RunError(
                f"rows of task '{rows.task}' do not say what is written on them, so decoder blocks do not run"
            )
        if "use_cache" in self.takes:
            given["use_cache"] = False
        self.seen.clear()
        with suppress(_AllSeen):
            self.body(**given)
        missed = [name for name in self.units if name not in self.seen]
        if missed:
            raise RunError(f"unit '{missed[0]}' does not run on rows of task '{rows.task}'; merge it without data")
        return given

    def _shorter_sizes(self, rows: TaskRows) -> dict[str, list[Any]]:
        """The shapes of every unit's arguments on shorter rows, which tell what runs over positions; nothing where no
        rows are shorter, or have positions of two kinds."""
        if self._shorter[0] != rows.fingerprint:
            pair = None if self.decodes else shorter_pair(rows)
            sizes = {}
            if pair is not None:
                self._run(rows, pair)
                sizes = {name: _sizes(*self.seen[name]) for name in self.units}
            self._shorter = rows.fingerprint, sizes
        return self._shorter[1]


def _real(given: Mapping[str, Tensor], side: str, rows: TaskRows, numbers: Sequence[int]) -> Tensor | None:
    """Which positions of rows are real, (b, T): those that are not filled up and that the mask leaves; None where rows
    have no positions of their own (images)."""
    name = next((f"{side}{name}" for name in ("input_ids", "inputs_embeds") if f"{side}{name}" in given), None)
    if name is None:
        return None
    whole = given[name]
    lengths = torch.tensor([rows.inputs[number][name].shape[0] for number in numbers], device=whole.device)
    real = torch.arange(whole.shape[1], device=whole.device) < lengths[:, None]
    mask = given.get(f"{side}attention_mask")
    return real if mask is None else real & (mask != 0)


def _states(
    name: str,
    seen: tuple[Any, Any],
    real: Tensor | None,
    count: int,
    shared: dict[int, Tensor],
    shorter: Sequence[Any] | None,
) -> UnitStates:
    """One unit's call as it is kept.

    Args:
        name: of the unit.
        seen: its arguments on all rows.
        real: which positions are real.
        count: how many rows are kept, the first ones.
        shared: arguments that other units were called with too, as they are kept.
        shorter: shapes of the arguments on shorter rows, the hidden states' first.
    """
    hidden, x, leaves, tree = _taken_apart(*seen)
    if not isinstance(x, Tensor) or x.ndim != 3 or (real is not None and x.shape[:2] != real.shape):
        raise RunError(f"unit '{name}' takes no hidden states (rows, positions, width); merge it without data")
    if real is None:
        real = x.new_ones(x.shape[:2], dtype=torch.bool)
    own = [isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == len(x) for leaf in leaves]
    kept = [
        _kept(leaf, count if of_rows else None, shared) if isinstance(leaf, Tensor) else leaf
        for leaf, of_rows in zip(leaves, own, strict=True)
    ]
    real = real[:count]
    along = None if shorter is None else _along(_sizes(*seen), shorter)
    call = UnitCall(tree_unflatten(kept, tree), tuple(own), hidden, size=x.shape[-1], tokens=x.shape[1], along=along)
    return UnitStates(Ragged.of(halved(x[:count][real]), real), call)


def _taken_apart(args: Any, kwargs: Any) -> tuple[int | str, Any, list[Any], Any]:
    """Where hidden states are among a unit's arguments, these, and the other arguments as leaves of a tree."""
    hidden: int | str = 0 if args else "hidden_states"
    x = args[0] if args else kwargs.get("hidden_states")
    rest = (None, *args[1:]) if args else (), {key: value for key, value in kwargs.items() if key != hidden}
    return hidden, x, *tree_flatten(rest)


def _sizes(args: Any, kwargs: Any) -> list[Any]:
    """The shapes of a unit's hidden states and of its other arguments; None for what is no tensor."""
    _, x, leaves, _ = _taken_apart(args, kwargs)
    return [leaf.shape if isinstance(leaf, Tensor) else None for leaf in (x, *leaves)]


def _along(sizes: Sequence[Any], shorter: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    """For each argument the dimensions that run over positions: those that are as long as the rows in both."""
    long, short = sizes[0][1], shorter[0][1]
    found = []
    for own, other in zip(sizes[1:], shorter[1:], strict=True):
        pairs = enumerate(zip(own, other, strict=True)) if own is not None and other is not None else ()
        found.append(tuple(d for d, pair in pairs if d > 0 and pair == (long, short)))
    return tuple(found)


def _kept(leaf: Tensor, count: int | None, shared: dict[int, Tensor]) -> Tensor:
    """An argument as it is kept: of rows the first `count`, once for all units that are called with it."""
    if id(leaf) not in shared:
        shared[id(leaf)] = leaf.clone() if count is None else compact(leaf[:count])
    return shared[id(leaf)]
