"""Passes of a source's rows through its model, or the first part of it, to see the inputs of linear layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.data.rows import TaskRows
from hf_fda.statistics.grams import GramSums
from hf_fda.statistics.layers import Group, path_in
from hf_fda.statistics.positions import Positions
from hf_fda.statistics.reading import HeldView, streamed_model

TOKENS = 4096
"""Tokens in a batch at most, if it has more than one row."""

IMAGE_TOKENS = 256
"""Tokens that a row without token ids counts for."""


class Stop(Exception):
    """Raised inside a model when all that was to be seen has been seen."""


class StopAfter:
    """Ends each run of a model when the last of some blocks is done.

    Which one that is, and how often it runs, shows itself in the first run, which goes to the end.

    Args:
        model: which runs.
        blocks: paths in it; without any, every run goes to the end.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[str]) -> None:
        self._done: Counter[str] = Counter()
        self._last: tuple[str, int] | None = None
        self._seen = ""
        for block in blocks:
            model.get_submodule(block).register_forward_hook(self._hook(block))

    def end_batch(self) -> None:
        """The run of a batch has ended."""
        if self._last is None and self._seen:
            self._last = self._seen, self._done[self._seen]
        self._done.clear()

    def _hook(self, block: str) -> Callable[[nn.Module, Any, Any], None]:
        def count(_module: nn.Module, _args: Any, _output: Any) -> None:
            self._done[block] += 1
            self._seen = block
            if self._last == (block, self._done[block]):
                raise Stop

        return count


def batch_size(rows: TaskRows) -> int:
    """How many rows of a task go through a model at once."""
    lengths = [row["input_ids"].numel() if "input_ids" in row else IMAGE_TOKENS for row in rows.inputs]
    return max(1, TOKENS // max(1, *lengths))


def run_batches(
    model: PreTrainedModel,
    rows: TaskRows,
    device: torch.device,
    positions: Positions,
    before: Callable[[int], None],
    after: Callable[[int], None],
) -> None:
    """Run a model on all rows; a batch that is stopped on the way counts as done.

    Args:
        model: takes the rows' inputs.
        rows: of its task.
        device: where it lies.
        positions: is told of every batch.
        before: called with the number of every batch, before it runs.
        after: called when it has.
    """
    run: Any = model
    with torch.no_grad():
        for number, (_, batch) in enumerate(rows.batches(batch_size(rows))):
            there = batch.to(device)
            positions.begin(there)
            before(number)
            with suppress(Stop):
                run(**there.inputs)
            after(number)


def input_grams(
    source: AlignedSource,
    group: Group,
    rows: TaskRows,
    device: torch.device,
    report: Callable[[int], None] = lambda batch: None,
) -> dict[str, Tensor]:
    """The Gram matrices of the inputs of some layers of a source on its rows (`GramSums.tensors`).

    Args:
        source: the source.
        group: the layers; those that the source lacks are left out.
        rows: of its task.
        device: where to run.
        report: called with the number of every batch that is done.
    """
    weights = HeldView(source.checkpoint)
    model = streamed_model(weights, device)
    positions = Positions(model)
    paths = {name: source.tensor_of[name].rpartition(".")[0] for name in group.weights if name in source.tensor_of}
    sums = GramSums({name: (path, model.get_submodule(path)) for name, path in paths.items()}, positions)
    blocks = [block for block in group.blocks if any(name.startswith(f"{block}.") for name in paths)]
    stop = StopAfter(model, [path_in(source, block, paths) for block in blocks])

    def after(number: int) -> None:
        sums.end_batch()
        stop.end_batch()
        report(number)

    run_batches(model, rows, device, positions, lambda number: None, after)
    weights.forget()
    return sums.tensors()
