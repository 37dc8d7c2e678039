"""What a recommendation rests on: cells of measured tables, and how alike the sources of these tables were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

README, EXAMPLES = "README.md", "examples/README.md"
RESULTS, DEFAULTS = "examples/benchmarks/results.md", "examples/benchmarks/defaults.md"


@dataclass(frozen=True)
class Table:
    """A measured table: the page and section it stands in.

    `sources` is how many sources its merges have, at least and at most. `ratios` and `cosines` are those of their task
    vectors (the largest norm by the smallest; the smallest and the largest cosine of two), as `advise` measures them
    on the checkpoints it was made from; None where these were not measured.
    """

    page: str
    section: str
    sources: tuple[int, int]
    ratio: float | None = None
    cosines: tuple[float, float] | None = None

    def __str__(self) -> str:
        return f"{self.page}, {self.section}"


ENCODERS = Table(README, "Real encoders", (2, 5), 1.53, (0.02, 0.10))
WITH_DATA = Table(RESULTS, "Real encoders, with data", (5, 5), 1.53, (0.02, 0.10))
CHOSEN = Table(DEFAULTS, "How the defaults were chosen", (5, 5), 1.53, (0.02, 0.10))
DECODERS = Table(RESULTS, "Small decoders", (4, 4), 1.14, (0.01, 0.22))
DIGITS = Table(RESULTS, "Digits", (4, 4), 1.29, (-0.01, 0.09))
ADAPTERS = Table(EXAMPLES, "Adapters", (5, 5), 2.11, (-0.01, 0.01))
LANGUAGE = Table(EXAMPLES, "Language models", (2, 2))
SHARED = Table(EXAMPLES, "Sharing anchors", (5, 5))


@dataclass(frozen=True)
class Cell:
    """A cell of a measured table, by the first words of its row and of its column, and what stands there."""

    table: Table
    row: str
    column: str
    value: str

    def __str__(self) -> str:
        return f"{self.table}: {self.row}, {self.column} {self.value}"


def grouped(cells: tuple[Cell, ...]) -> str:
    """Cells in words, each table and each row named once.

    >>> grouped((Cell(DIGITS, "tsv", "mean", "69.7"), Cell(DIGITS, "fda from tsv", "mean", "71.8")))
    'examples/benchmarks/results.md, Digits: tsv, mean 69.7; fda from tsv, mean 71.8'
    """
    by_table: Mapping[str, dict[str, list[str]]] = {str(cell.table): {} for cell in cells}
    for cell in cells:
        by_table[str(cell.table)].setdefault(cell.row, []).append(f"{cell.column} {cell.value}")
    return ". ".join(
        f"{table}: " + "; ".join(f"{row}, {', '.join(values)}" for row, values in rows.items())
        for table, rows in by_table.items()
    )
