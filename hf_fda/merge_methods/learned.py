"""What the methods that learn coefficients of task vectors on data have in common. The work itself is in
`hf_fda.divergence`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hf_fda.errors import InputError
from hf_fda.merge_methods.config import Scope, TaskVectorConfig, WeightedConfig, option
from hf_fda.merge_methods.looking import RowsConfig
from hf_fda.merge_methods.task_arithmetic import TaskArithmeticConfig
from hf_fda.merge_methods.tsv import TSVConfig

Granularity = Literal["task", "block", "tensor"]
Order = Literal["mixed", "turn"]
Schedule = Literal["constant", "linear"]
Initial = Literal["task_arithmetic", "tsv"]
INITIAL = (
    "the merge whose weights are learnt: of the task vectors, or of their leading singular directions made orthogonal "
    "to the other tasks'"
)
TaskVectorForm = Literal["float32", "bfloat16", "disk"]
"""How dense task vectors are held: in the type that is computed in; rounded to bfloat16 after the difference was taken
(8 significant bits of the change, not of the weight), at half the memory; or not at all, but read at each use."""


@dataclass(frozen=True, kw_only=True)
class LearnedConfig(WeightedConfig, RowsConfig):
    """Options of every method that learns coefficients of the task vectors."""

    plain_start: ClassVar[float] = 0.4
    """What coefficients of plain task vectors start from, unless `scaling` says otherwise."""

    weights: tuple[float, ...] | dict[str, float] | None = option(
        None,
        "a factor for each source's part of what is minimised: a list in the order of the sources, or by source name",
        per_source=True,
    )
    initial: Initial = option("task_arithmetic", INITIAL)
    granularity: Granularity = option(
        "tensor", "which tensors share a coefficient: all of them, those of a block, or none"
    )
    scaling: float | None = option(None, "the coefficients to start from; none: 1 from tsv, else 0.4 (adamerging 0.3)")
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
        if self.initial == "tsv" and self.task_vectors == "disk":
            raise InputError(
                f"method '{self.name}': the orthogonalised directions of initial='tsv' are made once and held; take "
                "task_vectors 'float32' or 'bfloat16', or initial 'task_arithmetic'"
            )

    @property
    def start(self) -> float:
        """The coefficients to start from."""
        if self.scaling is not None:
            return self.scaling
        return 1.0 if self.learnt is TSVConfig else self.plain_start

    @property
    def learnt(self) -> type[TaskVectorConfig]:
        """The method whose weights are learnt."""
        return TSVConfig if self.initial == "tsv" else TaskArithmeticConfig

    @property
    def works_on(self) -> Scope:
        """As `MethodConfig.works_on`: as the method does whose weights are learnt."""
        return self.learnt.scope
