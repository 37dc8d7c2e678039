"""What a merged adapter's factors leave out, module by module."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

REPORT = "adapter_report.json"
"""What the factors leave out, beside the adapter."""


@dataclass(frozen=True)
class ModuleReport:
    """One module's factors: their rank, the Frobenius norm of what they stand for, and the norm of what they leave out
    as a fraction of it."""

    module: str
    rank: int
    norm: float
    error: float


@dataclass(frozen=True)
class AdapterReport:
    """All modules of a merged adapter."""

    modules: tuple[ModuleReport, ...]

    @property
    def error(self) -> float:
        """What all factors leave out, as a fraction of all that was merged (Frobenius norms)."""
        whole = sum(own.norm**2 for own in self.modules)
        left = sum((own.error * own.norm) ** 2 for own in self.modules)
        return (left / whole) ** 0.5 if whole else 0.0

    @property
    def ranks(self) -> str:
        """The ranks in words: "8", or "4 to 16"."""
        ranks = sorted({own.rank for own in self.modules})
        return "none" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"

    def worst(self, count: int = 5) -> Sequence[ModuleReport]:
        """The modules whose factors leave out most."""
        return sorted(self.modules, key=lambda own: -own.error)[:count]

    def __str__(self) -> str:
        lines = [f"{len(self.modules)} modules, ranks {self.ranks}, relative error {self.error:.2e}"]
        lines += [f"  {own.module}: rank {own.rank}, relative error {own.error:.2e}" for own in self.worst()]
        return "\n".join(lines)

    def text(self) -> str:
        """As JSON."""
        return json.dumps({"error": self.error, "modules": [asdict(own) for own in self.modules]}, indent=2) + "\n"


def read_report(text: str) -> AdapterReport:
    """The report that `AdapterReport.text` wrote."""
    return AdapterReport(tuple(ModuleReport(**own) for own in json.loads(text)["modules"]))
