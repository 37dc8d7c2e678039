"""What is minimised: the divergence from a source's answers on its rows, or the entropy of the merged model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from hf_fda.data.rows import Kind
from hf_fda.divergence.measures import divergence, entropy
from hf_fda.divergence.outputs import RecordedOutputs
from hf_fda.merge_methods.divmerge import Measure


class Objective(Protocol):
    """What coefficients are learnt by."""

    def __call__(self, task: int, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Its value at each of n rows or scored positions, (n,).

        Args:
            task: number of the task.
            logits: (n, C), the merged model's at what counts of these rows, row after row.
            rows: numbers of the rows.
        """
        ...


class Divergence:
    """The divergence of the merged model's answers from each source's on its own rows (DivMerge, arXiv 2509.02108).

    Args:
        measure: which divergence.
        outputs: the answers of each task's source, in the order of the tasks.
    """

    def __init__(self, measure: Measure, outputs: Sequence[RecordedOutputs]) -> None:
        self.measure, self.outputs = measure, outputs

    def __call__(self, task: int, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """As `Objective`."""
        own = self.outputs[task]
        return divergence(self.measure, own.kind, logits, own.target(rows, logits.device))


class Entropy:
    """The entropy of the merged model's answers (AdaMerging, arXiv 2310.02575); the sources are not asked.

    Args:
        kinds: what the logits of each task mean.
    """

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self.kinds = kinds

    def __call__(self, task: int, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """As `Objective`.

        Raises:
            InputError: when the task is a regression.
        """
        return entropy(self.kinds[task], logits)
