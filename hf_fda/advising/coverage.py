"""What of a merge the tables that a rule is read off were not measured on, in words."""

from __future__ import annotations

from hf_fda.advising.evidence import LANGUAGE, WITH_DATA, Table
from hf_fda.advising.facts import KINDS, Facts

TABLE_ROWS = 128
"""Rows a task in the table of methods that look at data."""


def uncovered(facts: Facts, table: Table) -> list[str]:
    """In words, what of a merge the table of its rule was not measured on."""
    found = []
    if facts.kind in ("unknown", "encoder-decoder"):
        found.append(f"no table covers {KINDS[facts.kind]}; the order is that of text encoders")
    if facts.mixed:
        found.append("no table covers adapters beside full checkpoints; the order is that of full checkpoints")
    if facts.some_rows and table not in (WITH_DATA, LANGUAGE):
        found.append(_unused_rows(facts))
    if table is WITH_DATA and facts.rows < TABLE_ROWS:
        found.append(f"the table is of {TABLE_ROWS} rows a task; here one has {facts.rows}")
    if not table.sources[0] <= facts.count <= table.sources[1]:
        least, most = table.sources
        number = f"{least}" if least == most else f"{least} to {most}"
        found.append(f"{table} is of {number} sources; here are {facts.count}")
    return found + _unlike(facts, table)


def _unused_rows(facts: Facts) -> str:
    """Why rows that are given change nothing."""
    if facts.rows == 0:
        return "some sources have no rows, which no table covers: the order is that without rows"
    what = "adapters" if facts.all_adapters else KINDS[facts.kind]
    return (
        f"no table covers {what} with rows: the order is that without; one that takes them can be tried (--method fda)"
    )


def _unlike(facts: Facts, table: Table) -> list[str]:
    """In which way the task vectors lie outside what the table was measured on."""
    overlap, found = facts.overlap, list[str]()
    if overlap is None:
        return found
    still = [name for name, norm in zip(overlap.names, overlap.norms, strict=True) if norm == 0]
    if still:
        return [f"'{still[0]}' equals the base in all that is merged: leave it out"]
    if table.ratio is not None and round(overlap.ratio, 2) > table.ratio:
        found.append(
            f"the longest task vector is {overlap.ratio:.2f} times the shortest; in {table}, it was {table.ratio:.2f} "
            "times"
        )
    pairs = [round(value, 2) for number, row in enumerate(overlap.cosines) for value in row[:number]]
    if table.cosines is not None and not table.cosines[0] <= min(pairs) <= max(pairs) <= table.cosines[1]:
        least, most = table.cosines
        found.append(
            f"cosines of task vectors lie between {min(pairs):.2f} and {max(pairs):.2f}; in {table}, between "
            f"{least:.2f} and {most:.2f}"
        )
    return found
