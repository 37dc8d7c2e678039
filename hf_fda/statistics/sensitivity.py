"""How a source's answers depend on what one of its units gives: which positions count, and in which directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_fda.checkpoint.alignment import AlignedSource
from hf_fda.data.rows import Kind, TaskRows
from hf_fda.divergence.task_models import logits_of
from hf_fda.statistics.likelihood import directions
from hf_fda.statistics.passes import batch_size
from hf_fda.statistics.reading import streamed_model


@dataclass(frozen=True)
class Sensitivity:
    """What a source's answers on n rows depend on, of what one of its units gives.

    `positions` (n, T) on the CPU is true where an answer depends on the unit's output. `fisher` (d, d) is the Fisher
    information of the answers about it, summed over these positions, a mean over the rows: with J the Jacobian of the
    logits by the output at one of them, and F the logits' own Fisher information, the sum of ``J^T F J``. An error e
    changes an answer by about ``e^T J^T F J e / 2`` nats.
    """

    positions: Tensor
    fisher: Tensor


def sensitivity(
    source: AlignedSource, path: str, rows: TaskRows, device: torch.device, generator: torch.Generator
) -> Sensitivity | None:
    """What a source's answers depend on; None where it answers for each position, or not at all.

    Args:
        source: its blocks' weights are read when they run.
        path: of the unit, in the source's own model.
        rows: of its task.
        device: where to run, and where `fisher` lies.
        generator: of answers that are drawn where there are many, on the CPU.
    """
    if rows.kind in ("tokens", "states"):
        return None
    model = streamed_model(source.checkpoint, device)
    given: list[Tensor] = []
    model.get_submodule(path).register_forward_hook(_cutter(given))
    read: dict[int, Tensor] = {}
    fisher: Tensor | None = None
    for numbers, batch in rows.batches(batch_size(rows)):
        logits = logits_of(model, batch.to(device))
        hidden = given.pop()
        gradients = torch.stack([_gradient(logits, hidden, own) for own in _along(logits, rows.kind, generator)])
        read |= dict(zip(numbers, (gradients != 0).any(0).any(-1).cpu(), strict=True))
        flat = gradients.flatten(0, -2)
        here = flat.mT @ flat / len(rows)
        fisher = here if fisher is None else fisher + here
    if fisher is None or not bool(fisher.any()):
        return None
    return Sensitivity(nn.utils.rnn.pad_sequence([read[row] for row in range(len(rows))], batch_first=True), fisher)


def _along(logits: Tensor, kind: Kind, generator: torch.Generator) -> list[Tensor]:
    """Of the logits of rows (b, C) the directions of each, as `directions`, the k-th of all rows together."""
    own = [directions(row, kind, None, generator) for row in logits.split(1)]
    none = torch.zeros_like(logits[:1])
    return [torch.cat([one[k] if k < len(one) else none for one in own]) for k in range(max(map(len, own)))]


def _gradient(logits: Tensor, hidden: Tensor, direction: Tensor) -> Tensor:
    """Of ``<logits, direction>`` by hidden states; zeros where they do not count."""
    (found,) = torch.autograd.grad(logits, hidden, direction, retain_graph=True, allow_unused=True)
    return torch.zeros_like(hidden) if found is None else found


def _cutter(given: list[Tensor]) -> Callable[..., Any]:
    """Keeps a unit's hidden states, from which on gradients are known."""

    def cut(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        given.append(hidden.detach().requires_grad_())
        return (given[-1], *output[1:]) if isinstance(output, tuple) else given[-1]

    return cut
