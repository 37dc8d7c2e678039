"""A merge that has been checked: what it reads, makes and writes, and how to say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hf_fda.adapters import adapter_of
from hf_fda.adapters.targets import AdapterPlan
from hf_fda.block_losses import LOSSES
from hf_fda.blocks import Unit
from hf_fda.checkpoint.interface import Checkpoint
from hf_fda.checkpoint.writer import Shard
from hf_fda.coefficients import COEFFICIENTS
from hf_fda.data.opening import OpenedData
from hf_fda.estimate import adapter_bytes, disk_bytes, peak_memory_bytes
from hf_fda.inputs import Inputs, Source
from hf_fda.merge_methods import FDAConfig, MethodConfig
from hf_fda.merge_methods.learned import LearnedConfig
from hf_fda.merge_methods.unitwise import UnitwiseConfig
from hf_fda.prediction import Prediction
from hf_fda.printing import html_table
from hf_fda.recipes import Heads, Output


@dataclass(frozen=True)
class Plan:
    """A merge, checked. `print(plan)` tells what will happen; `hf_fda.engine.run(plan)` does it.

    `units` are what function-space methods merge one by one; `shards` the weight files that will be written, or
    `adapter` the adapter; `ranks` of the thin factors that adaptation steps on, by the base's names of tensors; `time`
    is how long it will take, where that was asked for; `notes` say what a user may not expect; `data` are the rows of
    every task that the method looks at, `anchoring` the options with which anchors are made if it looks at these.
    `settle` checks the merge again where rows are drawn from weights that were not downloaded yet, and downloads them.
    """

    inputs: Inputs
    config: MethodConfig
    output: Path
    result: Output
    units: tuple[Unit, ...]
    shards: tuple[Shard, ...]
    dtype: torch.dtype | None
    device: torch.device
    seed: int
    heads: Heads
    arguments: dict[str, Any]
    notes: tuple[str, ...] = field(default=())
    adapter: AdapterPlan | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    time: Prediction | None = None
    data: Mapping[str, OpenedData] = field(default_factory=dict)
    anchoring: FDAConfig | None = None
    settle: Callable[[], Plan] | None = field(default=None, compare=False, repr=False)

    @cached_property
    def peak_memory_bytes(self) -> int:
        """Bytes that the merge holds at most, beside the libraries themselves: an estimate from shapes alone."""
        return peak_memory_bytes(self)

    @cached_property
    def disk_bytes(self) -> int:
        """Bytes that the output folder takes at most: an estimate from shapes alone."""
        return disk_bytes(self)

    @property
    def constructions(self) -> tuple[tuple[Source, Unit], ...]:
        """The (source, unit) pairs whose anchors have to be constructed."""
        return tuple((source, unit) for source in self.anchors_made for unit in self.units_of(source))

    @property
    def anchors_made(self) -> tuple[Source, ...]:
        """The sources whose anchors are constructed and written beside the merge."""
        if not self.units:
            return ()
        return tuple(source for source in self.inputs.sources if source.anchors is None and self.anchored(source))

    def anchored(self, source: Source) -> bool:
        """Whether a source's anchors are looked at: without rows of data, or where both are."""
        if self.anchoring is None:
            return False
        return self.anchoring.with_data != "states" or source.name not in self.data

    @property
    def propagates(self) -> bool:
        """Whether units are merged in the order of the model, on what those before them make of rows."""
        return isinstance(self.config, UnitwiseConfig) and self.config.propagates and bool(self.data)

    def sources_of(self, unit: Unit) -> tuple[Source, ...]:
        """The sources that have a unit."""
        return tuple(source for source in self.inputs.sources if source.has(unit))

    def units_of(self, source: Source) -> tuple[Unit, ...]:
        """The units that a source has."""
        return tuple(unit for unit in self.units if source.has(unit))

    def __str__(self) -> str:
        return "\n".join([self._title(), *(f"  {label:<9} {text}" for label, text in self._facts())])

    def _repr_html_(self) -> str:
        return html_table(self._title(), self._facts())

    def _title(self) -> str:
        return f"Merge of {len(self.inputs.sources)} sources by {self.config.name} into {self.output}"

    def _facts(self) -> list[tuple[str, str]]:
        """What will be done, in words: what each line is about, and the line."""
        base = self.inputs.base
        facts = [("base", f"{base.id} ({base.layout.model_class.__name__}, {len(base.names)} tensors)")]
        for source in self.inputs.sources:
            head = next((head for head in self.result.heads if head.task == source.name), None)
            kept = f", keeps its own {len(head.tensors)} tensors after the last block" if head else ""
            beside = "anchors only" if source.rest is None else "anchors, and what it changed outside the blocks"
            what = beside if source.weights is None else _kind(source.weights.checkpoint)
            facts.append(("source", f"{source.name}: {source.id} ({what}{kept})"))
        facts += [("data", f"{task}: {rows.summary}") for task, rows in self.data.items()]
        if self.inputs.vocabulary.summary is not None:
            facts.append(("tokens", self.inputs.vocabulary.summary))
        stated = {**self.config.options(), **self.arguments["options"]}
        options = {name: value for name, value in stated.items() if value is not None}
        facts += [
            ("options", ", ".join(f"{name}={_brief(value)}" for name, value in options.items())),
            ("work", self._work()),
            ("writes", ", ".join(self._writes())),
            ("memory", f"about {readable_size(self.peak_memory_bytes)} beside the libraries"),
            ("disk", f"about {readable_size(self.disk_bytes)}"),
        ]
        if self.time is not None:
            facts.append(("time", str(self.time)))
        return facts + [("note", note) for note in self.notes]

    def _work(self) -> str:
        rules = [recipe.rule for recipe in self.result.recipes.values()]
        tensors = f"{rules.count('method')} tensors by method, {rules.count('base')} from the base"
        if self.adapter is not None:
            tensors = f"{len(self.adapter.parts)} tensors that the sources change"
        elif rules.count("soup"):
            tensors += f", {rules.count('soup')} means of the sources"
        if not self.units:
            return tensors
        if isinstance(self.config, LearnedConfig):
            return f"{len(self.constructions)} constructions, then coefficients; {tensors}"
        return f"{len(self.constructions)} constructions, {len(self.units)} adaptations; {tensors}"

    def _writes(self) -> list[str]:
        heads = [f"task_heads/{head.task}" for head in self.result.heads]
        anchors = [f"anchors/{source.name}" for source in self.anchors_made]
        found = [COEFFICIENTS] if isinstance(self.config, LearnedConfig) else []
        found += [LOSSES] if self.units else []
        return [*self._weights(), *found, "merge_config.yaml", "README.md", "card.json", *heads, *anchors]

    def _weights(self) -> list[str]:
        if self.adapter is not None:
            rank = f"of rank {self.adapter.top_rank} at most, " if self.adapter.top_rank else ""
            size = readable_size(adapter_bytes(self.inputs, self.adapter))
            return [f"an adapter ({rank}{size} at most)", "adapter_report.json"]
        size = readable_size(sum(shard.nbytes for shard in self.shards))
        return [f"{len(self.shards)} weight file{'s' if len(self.shards) > 1 else ''} ({size})", "config.json"]


def _kind(checkpoint: Checkpoint) -> str:
    name = checkpoint.layout.model_class.__name__
    adapter = adapter_of(checkpoint)
    return name if adapter is None else f"{adapter.files.kind} adapter of a {name}"


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        options = [f"{name}={item}" for name, item in value.items() if name != "method" and item is not None]
        return f"{value.get('method')}({', '.join(options)})"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def readable_size(count: int) -> str:
    """Bytes for reading."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
