"""Rows, inputs and merged parameters of tiny models, for the tests of what learns from rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_fda.data.rows import Kind, TaskRows
from hf_fda.divergence.coefficients import MergedParameters
from hf_fda.divergence.learning import LearningTask
from hf_fda.divergence.outputs import RecordedOutputs, record
from hf_fda.divergence.task_models import source_model, task_model
from hf_fda.inputs import Inputs, open_inputs
from hf_fda.merge_methods.linear import LinearConfig
from hf_fda.recipes import decide

CPU = torch.device("cpu")


def text_rows(task: str, kind: Kind, count: int = 12, seed: int = 0, by_position: bool = False) -> TaskRows:
    """Rows of random tokens of different lengths; by position, all but the first two of a row count."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 10, (count,), generator=generator).tolist()
    ids = [torch.randint(1, 99, (length,), generator=generator) for length in lengths]
    inputs = [{"input_ids": own, "attention_mask": torch.ones_like(own)} for own in ids]
    scored = [torch.arange(length) >= 2 for length in lengths] if by_position else None
    return TaskRows(task, kind, inputs, scored, {"input_ids": 0}, f"{task} {seed}")


class Family:
    """A base, sources with rows, and what is merged of them.

    Args:
        base: folder or model.
        sources: by task.
        kind: what their logits mean.
    """

    def __init__(self, base: Any, sources: Mapping[str, Any], kind: Kind = "labels", count: int = 12) -> None:
        self.inputs: Inputs = open_inputs(base, dict(sources))
        output = decide(self.inputs, LinearConfig(), (), "keep")
        chosen = [name for name, recipe in output.recipes.items() if recipe.rule == "method"]
        self.names: Sequence[str] = [output.base_names[name] for name in chosen]
        self.rows = [
            text_rows(source.name, kind, count, seed, kind == "tokens")
            for seed, source in enumerate(self.inputs.weighted)
        ]

    def parameters(self, granularity: Any = "block", start: float | Tensor = 0.3, **options: Any) -> MergedParameters:
        """Merged parameters of the family."""
        return MergedParameters(self.inputs.base, self.inputs.weighted, self.names, granularity, start, **options)

    def tasks(self, parameters: MergedParameters, **options: Any) -> list[LearningTask]:
        """The tasks on these parameters."""
        return [
            LearningTask(rows.task, rows, task_model(source, parameters.tensors, CPU, parameters.dtype, **options))
            for source, rows in zip(self.inputs.weighted, self.rows, strict=True)
        ]

    def outputs(self, dtype: torch.dtype = torch.float32, **options: Any) -> list[RecordedOutputs]:
        """What every source answers."""
        return [
            record(source_model(source, CPU, dtype), rows, CPU, batch_size=5, **options)
            for source, rows in zip(self.inputs.weighted, self.rows, strict=True)
        ]
