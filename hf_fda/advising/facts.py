"""What advice looks at: base and sources, how their task vectors lie, the rows that are given, the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import torch

from hf_fda.adapters import AdapterCheckpoint, adapter_of
from hf_fda.advising.overlap import Overlap, measure
from hf_fda.blocks import family_of, find_blocks, regions
from hf_fda.checkpoint.layout import ModelLayout
from hf_fda.data.opening import OpenedData
from hf_fda.heads import task_head
from hf_fda.inputs import Inputs, Source

Kind = Literal["vision", "encoder", "decoder", "encoder-decoder", "unknown"]
SourceKind = Literal["full", "adapter", "anchors"]

KINDS: Mapping[Kind, str] = {
    "vision": "a vision model",
    "encoder": "a text encoder",
    "decoder": "a language model",
    "encoder-decoder": "an encoder-decoder",
    "unknown": "an architecture whose blocks are not known",
}
"""What models are called."""


@dataclass(frozen=True)
class SourceFacts:
    """One source: what it is, the ranks of an adapter's factors, and how many rows of data it has (None: none)."""

    name: str
    kind: SourceKind
    ranks: tuple[int, ...] = ()
    rows: int | None = None


@dataclass(frozen=True)
class Facts:
    """What the rules look at.

    `parameters` are the base's; `overlap` is None where fewer than two sources have task vectors. `free_bytes` is the
    memory that the device has free, None where the system does not say.
    """

    kind: Kind
    parameters: int
    sources: tuple[SourceFacts, ...]
    overlap: Overlap | None
    device: str
    free_bytes: int | None

    @property
    def count(self) -> int:
        """K, the number of sources."""
        return len(self.sources)

    @property
    def all_adapters(self) -> bool:
        """Whether every source is an adapter."""
        return all(source.kind == "adapter" for source in self.sources)

    @property
    def mixed(self) -> bool:
        """Whether some sources are adapters and others are not."""
        return not self.all_adapters and any(source.kind == "adapter" for source in self.sources)

    @property
    def some_anchors_only(self) -> bool:
        """Whether a source has no weights."""
        return any(source.kind == "anchors" for source in self.sources)

    @property
    def rows(self) -> int:
        """Rows of the source that has the fewest; 0 where one has none."""
        return min(source.rows or 0 for source in self.sources)

    @property
    def some_rows(self) -> bool:
        """Whether any source has rows."""
        return any(source.rows for source in self.sources)


def gather(inputs: Inputs, rows: Mapping[str, OpenedData], limit: int, device: torch.device) -> Facts:
    """Look at what is open; weights are read part by part.

    Args:
        inputs: base and sources.
        rows: of data, by task.
        limit: rows of a task that are looked at, at most, which is what a stream counts as.
        device: where the merge will be computed.
    """
    layout = inputs.base.layout
    return Facts(
        kind=kind_of(layout),
        parameters=sum(prod(inputs.base.shape(name)) for name in inputs.base.names),
        sources=tuple(_of_source(source, rows.get(source.name), limit) for source in inputs.sources),
        overlap=measure(inputs, merged_names(inputs)) if len(inputs.moving) > 1 else None,
        device=str(device),
        free_bytes=free_bytes(device),
    )


def kind_of(layout: ModelLayout) -> Kind:
    """What kind of model a layout is of, as far as measured tables tell kinds apart."""
    if not layout.known or not find_blocks(layout.model):
        return "unknown"
    return "encoder-decoder" if layout.config.is_encoder_decoder else family_of(layout)


def merged_names(inputs: Inputs) -> list[str]:
    """The base's names of the tensors that methods merge: those that sources have, but for a task head and what stands
    between it and the last block."""
    headed = any(task_head(source) is not None for source in inputs.weighted)
    where = regions(inputs.base.layout) if inputs.base.layout.known else {}
    return [
        name
        for name in inputs.base.names
        if not (headed and where.get(name) == "after") and any(name in source.tensor_of for source in inputs.moving)
    ]


def free_bytes(device: torch.device) -> int | None:
    """The memory that a device has free; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = Path("/proc/meminfo")
    if device.type != "cpu" or not known.is_file():
        return None
    lines = known.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _of_source(source: Source, rows: OpenedData | None, limit: int) -> SourceFacts:
    adapter = None if source.weights is None else adapter_of(source.weights.checkpoint)
    kind: SourceKind = "anchors" if source.weights is None else "full" if adapter is None else "adapter"
    count = None if rows is None else limit if rows.count is None else rows.count
    return SourceFacts(source.name, kind, () if adapter is None else _ranks(adapter), count)


def _ranks(adapter: AdapterCheckpoint) -> tuple[int, ...]:
    """The ranks of an adapter's factors, each once."""
    return tuple(sorted({rank for name in adapter.names if (rank := adapter.rank(name)) is not None}))
