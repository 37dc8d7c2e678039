"""Options of the merge by layer-wise distillation. The work itself is in `hf_fda.distilling` and the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_fda.merge_methods.config import MethodConfig, Scope, option, with_source_names
from hf_fda.merge_methods.fda import AdaptationDistance, Family, Schedule
from hf_fda.merge_methods.looking import passes_over
from hf_fda.merge_methods.registry import method_class, register_config
from hf_fda.merge_methods.unitwise import UnitwiseConfig

DISTANCES: dict[Family, AdaptationDistance] = {"vision": "shift", "encoder": "shift", "decoder": "mse"}
"""A head of a task's own reads what that task wrote; one output layer for all reads everything alike."""

EPOCHS = 10
"""Passes over few rows, chosen on training rows with 64 a task."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig(UnitwiseConfig):
    """Options of `distill`.

    As in ProDistill the blocks are merged one after the other, from the first to the last. Block l of the merged model
    gets the hidden states that the merged model's own blocks before it make of a source's rows, and shall give what
    the source's block gives on the source's own. What is learnt are coefficients of the sources' task vectors, one for
    each entry and source, all from where the start in parameter space has them (`hf_fda.anchors.CoefficientAdam` does
    that with the state of one). Other than there: any parameter-space method may be the start, the errors may be
    counted in the metric of a source's own shift, the step size falls to zero, and a block stays as it started where
    training did not bring it nearer.
    """

    name: ClassVar[str] = "distill"
    summary: ClassVar[str] = "block after block, match what every source's block does on the source's rows"
    paper: ClassVar[str] = "ProDistill, arXiv 2502.12706"
    scope: ClassVar[Scope] = "tensor"
    start: ClassVar[str] = "isotropic"
    parametrization: ClassVar[str] = "coefficients"

    initial: str | MethodConfig | None = option(
        None,
        "where distillation starts: base, or a parameter-space method, whose own options (scaling) may be given with "
        "these; none: isotropic with scaling 3, or task_arithmetic with 0.3 where all sources are adapters",
    )
    rest: str | MethodConfig | None = option(
        None, "what lies outside the blocks: base, or a parameter-space method; none: task_arithmetic"
    )
    epochs: int | None = option(
        None, "passes over all rows, for each block; none: 10 over 64 rows a task, fewer over more", minimum=0
    )
    learning_rate: float = option(3e-2, "Adam's step size, in units of a coefficient", minimum=0)
    schedule: Schedule = option("linear", "the step size stays, or falls to zero over all steps of a block")
    batch_size: int = option(32, "rows a step, drawn from all tasks mixed", minimum=1)
    distance: AdaptationDistance | None = option(
        None,
        "distance of a block's outputs; shift: squared, in the metric of the source's own shift; by kind of model",
    )
    metric_power: float = option(
        0.5, "how much more the main directions of a source's shift count; 0: all alike", minimum=0
    )

    @property
    def propagates(self) -> bool:
        """As `UnitwiseConfig.propagates`."""
        return True

    def completed(self, names: Sequence[str], family: Family, all_thin: bool, rows: int) -> DistillConfig:
        """The config with every open option filled in.

        Args:
            names: of the sources.
            family: "vision", "encoder" (text) or "decoder".
            all_thin: whether all are adapters; a flat spectrum overdoes their few directions.
            rows: of the task that has most.
        """
        roles: dict[str, Any] = {}
        start = ("task_arithmetic", {"scaling": 0.3}) if all_thin else ("isotropic", {"scaling": 3.0})
        for role, method, options in (("initial", *start), ("rest", "task_arithmetic", {})):
            value = getattr(self, role) or method_class(method).from_options(options)
            roles[role] = with_source_names(value, names) if isinstance(value, MethodConfig) else value
        unit, distance = self.unit or ("block",), self.distance or DISTANCES[family]
        epochs = passes_over(rows, EPOCHS) if self.epochs is None else self.epochs
        return dataclasses.replace(self, unit=unit, distance=distance, epochs=epochs, **roles)


register_config(DistillConfig)
