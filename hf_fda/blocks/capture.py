"""How a block is called: its arguments, captured from one run of the base with one block in memory at a time."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from hf_fda.blocks.discovery import Unit, example_inputs, find_blocks
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.layout import ModelLayout, meta_model


class Weights(Protocol):
    """What a model runs with: its layout, and its tensors by name."""

    @property
    def layout(self) -> ModelLayout:
        """Of the model."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Of the tensors that there are."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor."""
        ...


@dataclass
class UnitCall:
    """Everything a unit is called with beside its hidden states.

    Calling it with the unit's module and x (n, T, d) gives the unit's output (n, T, d'). An argument that is `batched`
    belongs to rows: it is there once for all rows, or for each of them (then `at` chooses). `along` says which of each
    argument's dimensions run over positions; None where that is not known, and the call cannot be cut.
    """

    arguments: Any = ((None,), {})
    batched: tuple[bool, ...] = ()
    hidden: int | str = 0
    size: int | None = None
    tokens: int | None = None
    along: tuple[tuple[int, ...], ...] | None = None

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

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        """Run `module` on x (n, T, d)."""
        leaves, tree = tree_flatten(self.arguments)
        if self.batched:
            leaves = [
                leaf.expand(len(x), *leaf.shape[1:]) if batched else leaf
                for leaf, batched in zip(leaves, self.batched, strict=True)
            ]
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
    twice, on one and on two random examples, each module's weights read when it is entered and dropped when it is
    left; an argument whose first dimension differs between the runs belongs to the batch.

    Args:
        base: the base checkpoint.
        units: what will be called.
        tokens: T, for text; the T of images follows from the model.
        device: where the arguments shall lie.
    """
    if tokens is not None and _needs_no_run(base.layout.model, units):
        size = int(base.config.get_text_config().hidden_size)
        return Capture({unit.name: UnitCall(size=size, tokens=tokens) for unit in units})
    one, positions = _run(base, units, 1, tokens or 5, device)
    two, _ = _run(base, units, 2, tokens or 5, device)
    return Capture({name: _call(one[name], two[name]) for name in one}, positions)


def _needs_no_run(model: PreTrainedModel, units: Sequence[Unit]) -> bool:
    """Whether the calls are known beforehand: text (an image sets its own number of tokens), no table of position
    embeddings whose ids are wanted, and units that take hidden states alone."""
    text = "pixel_values" not in inspect.signature(model.base_model.forward).parameters
    plain = all(len(inspect.signature(model.get_submodule(unit.name).forward).parameters) == 1 for unit in units)
    return text and plain and not any(_is_position_table(path, module) for path, module in model.named_modules())


def _is_position_table(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and "position" in path.rpartition(".")[2]


def _run(
    base: Checkpoint, units: Sequence[Unit], batch: int, tokens: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    layout = base.layout
    model = meta_model(layout.config, layout.model_class)
    seen: dict[str, Any] = {}
    positions: dict[str, Tensor] = {}
    for unit in units:
        hook = _recorder(seen, unit.name)
        model.get_submodule(unit.name).register_forward_pre_hook(hook, with_kwargs=True)
    for path, module in model.named_modules():
        if _is_position_table(path, module):
            module.register_forward_pre_hook(
                lambda _module, args, name=f"{path}.weight": positions.__setitem__(name, args[0].detach().cpu())
            )
    stream_weights(model, base, device)
    body: Any = model.base_model
    with torch.no_grad():
        body(**example_inputs(body, batch, tokens, device))
    return seen, positions


def _recorder(seen: dict[str, Any], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def record(_module: nn.Module, args: Any, kwargs: Any) -> None:
        seen[name] = (tuple(args), dict(kwargs))

    return record


def stream_weights(model: PreTrainedModel, checkpoint: Weights, device: torch.device) -> None:
    """Make a meta model runnable with little memory: a block, or a module outside the blocks, holds its weights only
    while it runs.

    Args:
        model: on the meta device with real buffers, of the checkpoint's own class.
        checkpoint: where the weights come from.
        device: where to run.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    blocks = find_blocks(model)
    inside = tuple(f"{block}." for block in blocks)
    tied = checkpoint.layout.tied
    for path, module in model.named_modules():
        whole = path in blocks
        if path.startswith(inside) or not (whole or module._parameters):
            continue
        loader, dropper = _weight_hooks(path, module, checkpoint, tied, device, recurse=whole)
        module.register_forward_pre_hook(loader, prepend=True)
        module.register_forward_hook(dropper, always_call=True)


def _weight_hooks(
    path: str,
    module: nn.Module,
    checkpoint: Weights,
    tied: dict[str, str],
    device: torch.device,
    recurse: bool,
) -> tuple[Callable[..., None], Callable[..., None]]:
    prefix = f"{path}." if path else ""
    meta = dict(module.named_parameters(recurse=recurse))

    def set_all(values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            owner, _, attribute = name.rpartition(".")
            module.get_submodule(owner)._parameters[attribute] = nn.Parameter(value, requires_grad=False)

    held = set(checkpoint.names)

    def weight(name: str, shape: torch.Size) -> Tensor:
        if name not in held:  # a pooler that the files lack: what follows the blocks does not matter here
            return torch.zeros(shape, device=device)
        return checkpoint.read(name).to(device, torch.float32)

    def load(*_: Any) -> None:
        names = {name: tied.get(prefix + name, prefix + name) for name in meta}
        set_all({name: weight(full, meta[name].shape) for name, full in names.items()})

    def drop(*_: Any) -> None:
        set_all(dict(meta))

    return load, drop


def _call(one: Any, two: Any) -> UnitCall:
    """The call of a unit from its arguments on one example and on two."""
    args, kwargs = one
    hidden: int | str = 0 if args else "hidden_states"
    x = args[0] if args else kwargs["hidden_states"]
    leaves, tree = tree_flatten(one)
    others, _ = tree_flatten(two)
    batched = tuple(
        isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == 1 and other.shape[0] == 2
        for leaf, other in zip(leaves, others, strict=True)
    )
    kept = tree_unflatten([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves], tree)
    return UnitCall(kept, batched, hidden, size=x.shape[-1], tokens=x.shape[1])
