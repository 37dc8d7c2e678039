"""Inputs of one block's layers as the blocks that were merged before it give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.data.rows import TaskRows
from hf_fda.statistics.grams import GramSums
from hf_fda.statistics.passes import Stop, run_batches
from hf_fda.statistics.positions import Positions
from hf_fda.statistics.reading import HeldView, streamed_model
from hf_fda.statistics.states import KeptStates, skip_block, stack_of, state_tensors


def following_grams(
    source: AlignedSource,
    rows: TaskRows,
    device: torch.device,
    done: Sequence[str],
    own: str | None,
    weights: Sequence[str],
    merged: Mapping[str, Callable[[], Tensor]],
    kept: KeptStates,
    report: Callable[[int], None] = lambda batch: None,
) -> dict[str, Tensor]:
    """Run a model whose first blocks are merged and whose next block is the source's own.

    Of the merged blocks only the last one runs; the others give out what is kept of them. The run ends when the
    source's own block is done; where no block is left, at the model's end.

    Args:
        source: the source.
        rows: of its task.
        device: where to run.
        done: paths, in the source's model, of the blocks that are merged, in order.
        own: path of the block that is the source's own; None: what follows the blocks is.
        weights: the base's names of the layers whose inputs are looked at.
        merged: merged tensors by the source's names: of the last merged block, and of what lies before the blocks.
        kept: what the merged blocks but the last gave out.
        report: called with the number of every batch that is done.

    Returns:
        the Gram matrices (`GramSums.tensors`) and what is now to be kept (`state_tensors`).
    """
    model = streamed_model(HeldView(source.checkpoint, None, merged), device)
    paths = {name: source.tensor_of[name].rpartition(".")[0] for name in weights if name in source.tensor_of}
    positions = Positions(model)
    sums = GramSums({name: (path, model.get_submodule(path)) for name, path in paths.items()}, positions)
    states: dict[str, Any] = {}
    found: dict[str, Tensor] = {}
    for block in done[:-1]:
        skip_block(model, block, lambda: states)
    if done:
        model.get_submodule(done[-1]).register_forward_hook(_keeper(states, done[-1]))
    if own is not None:
        model.get_submodule(own).register_forward_hook(_stop)

    def before(number: int) -> None:
        states.clear()
        states.update(kept.read(number, device))

    def after(number: int) -> None:
        found.update(state_tensors(number, states))
        sums.end_batch()
        report(number)

    run_batches(model, rows, device, positions, before, after)
    return {**sums.tensors(), **found}


def _keeper(states: dict[str, Any], block: str) -> Callable[[nn.Module, Any, Any], None]:
    """Puts what a block gives out, which what follows may change, in the place of what its stack gave out before."""

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        states[stack_of(block)] = tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, output)

    return keep


def _stop(*_: object) -> None:
    raise Stop
