"""What the methods that learn coefficients of task vectors on data have in common. The work itself is in
`hf_fda.divergence`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_fda.errors import InputError
from hf_fda.merge_methods.config import WeightedConfig, option
from hf_fda.merge_methods.looking import RowsConfig

Granularity = Literal["task", "block", "tensor"]
Order = Literal["mixed", "turn"]
Schedule = Literal["constant", "linear"]
TaskVectorForm = Literal["float32", "bfloat16", "disk"]
"""How dense task vectors are held: in the type that is computed in; rounded to bfloat16 after the difference was taken
(8 significant bits of the change, not of the weight), at half the memory; or not at all, but read at each use."""


@dataclass(frozen=True, kw_only=True)
class LearnedConfig(WeightedConfig, RowsConfig):
    """Options of every method that learns coefficients of the task vectors."""

    weights: tuple[float, ...] | dict[str, float] | None = option(
        None,
        "a factor for each source's part of what is minimised: a list in the order of the sources, or by source name",
        per_source=True,
    )
    granularity: Granularity = option(
        "tensor", "which tensors share a coefficient: all of them, those of a block, or none"
    )
    scaling: float = option(0.4, "the coefficients to start from")
    lower: float | None = option(None, "no coefficient becomes less; none: no bound")
    upper: float | None = option(None, "no coefficient becomes more; none: no bound")
    steps: int = option(40, "minibatches of every task at most", minimum=0)
    learning_rate: float = option(1e-1, "Adam's step size", minimum=0)
    schedule: Schedule = option("linear", "the step size stays, or falls to zero over all steps")
    batch_size: int = option(8, "rows of a task in a minibatch", minimum=1)
    order: Order = option("turn", "a step of Adam sees a minibatch of one task in turn, or of every task")
    held_out: float = option(
        0.2, "fraction of the rows by which the best coefficients are told; 0: the last ones", minimum=0, maximum=0.9
    )
    every: int = option(4, "minibatches of every task between two looks at the rows held out", minimum=1)
    patience: int = option(4, "looks without an improvement after which to stop", minimum=1)
    task_vectors: TaskVectorForm = option(
        "float32", "how task vectors are held: in memory, or disk: read at each use; those of adapters are thin anyway"
    )
    recompute: bool = option(False, "keep the activations of one block at a time: less memory, a third more time")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lower is not None and self.upper is not None and self.lower > self.upper:
            raise InputError(f"method '{self.name}': lower ({self.lower}) is above upper ({self.upper})")
