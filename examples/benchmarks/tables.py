"""Reads the measured tables of the project's pages: shared by `advice.py` and the tests of what cites them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hf_fda.advising.evidence import Cell

ROOT = Path(__file__).parents[2]
"""The folder that the pages' names start from."""

NOT_MERGES = ("individual", "base", "each task's own")
"""How rows begin that are of no merge."""

Rows = dict[str, dict[str, str]]
"""A table: by the first cell of each row its others, by the names of their columns."""


def tables_in(page: str, section: str) -> Iterator[Rows]:
    """The tables in a section of a page, without those of its subsections."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.lstrip("#") == f" {section}")
    found: list[list[str]] = []
    for line in lines[start + 1 :]:
        if line.startswith("#"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells:
            found.append(cells)
        elif found:
            yield _table(found)
            found = []
    if found:
        yield _table(found)


def table_with(cell: Cell) -> Rows:
    """The table that a cell is cited from.

    Raises:
        LookupError: when its page has none with this row and column.
    """
    for table in tables_in(cell.table.page, cell.table.section):
        if cell.column in table.get(cell.row, {}):
            return table
    raise LookupError(f"{cell.table}: no table there has row '{cell.row}' and column '{cell.column}'")


def number(text: str) -> float:
    """The number that a cell begins with ("0.834 ± 0.001")."""
    return float(text.split()[0])


def best_row(table: Rows, column: str) -> str:
    """The merge with the most in a column."""
    merges = {row: own[column] for row, own in table.items() if not row.startswith(NOT_MERGES) and own.get(column)}
    return max(merges, key=lambda row: number(merges[row]))


def _table(lines: list[list[str]]) -> Rows:
    header, _, *rows = lines
    return {row[0]: dict(zip(header[1:], row[1:], strict=False)) for row in rows}
