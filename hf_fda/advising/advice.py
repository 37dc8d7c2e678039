"""Advice: ranked recommendations, and how they are shown."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_fda.advising.costing import Cost
from hf_fda.advising.evidence import Cell, grouped
from hf_fda.advising.facts import KINDS, Facts, SourceFacts
from hf_fda.advising.rules import Shown, labelled
from hf_fda.data.request import WORDS
from hf_fda.plans import readable_size
from hf_fda.prediction import readable_time
from hf_fda.printing import html_table, text_table

WIDTH, INDENT = 118, "     "
"""Of the lines that reasons are shown in."""


@dataclass(frozen=True)
class Tried:
    """What a candidate did on held-out rows.

    `scores` are by task, in the task's own metric; `score` is what candidates are ranked by, the larger the better.
    `seconds` and `peak_bytes` are of the merge (the most the process held, libraries included; None where the system
    does not say); `resumed` says that an earlier run had done part of it, which they leave out.
    """

    scores: Mapping[str, float]
    score: float
    seconds: float | None
    peak_bytes: int | None
    resumed: bool
    folder: Path


@dataclass(frozen=True)
class Recommendation:
    """A way to merge: the method and the options that differ from its defaults, the rows that it looks at, its
    place by the rules (from 1), the reasons in words, the cells of measured tables that they rest on, what it is
    expected to cost, and what it did on held-out rows if it was tried."""

    method: str
    options: Mapping[str, Any]
    data: Shown | None
    place: int
    reasons: tuple[str, ...]
    cells: tuple[Cell, ...]
    cost: Cost
    tried: Tried | None = None

    @property
    def label(self) -> str:
        """What to call it."""
        return labelled(self.method, self.options, self.data)

    @property
    def flags(self) -> str:
        """The method as `hf-fda merge` takes it, but for rows that were given."""
        options = [f"--{name.replace('_', '-')} {_said(value)}" for name, value in self.options.items()]
        shown = [f"--data {self.data}"] if self.data in WORDS else []
        return " ".join([f"--method {self.method}", *options, *shown])

    @property
    def arguments(self) -> dict[str, Any]:
        """The method as `hf_fda.merge` takes it, by keyword, but for rows that were given."""
        shown = {"data": self.data} if self.data in WORDS else {}
        return {"method": self.method, **self.options, **shown}


@dataclass(frozen=True, repr=False)
class Advice:
    """Recommendations, best first, and the facts that they follow from.

    `rule` names what kind of merge this was taken for; `uncovered` says in words what of it no measured table covers,
    `notes` what else a user should know. `metric` is what was tried by, None where nothing was.
    """

    facts: Facts
    rule: str
    recommendations: tuple[Recommendation, ...]
    uncovered: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    metric: str | None = None
    individual: Mapping[str, float] | None = None

    @property
    def first(self) -> Recommendation:
        """The first choice."""
        return self.recommendations[0]

    def __str__(self) -> str:
        lines = [self._title(), *(f"  {label:<10} {text}" for label, text in self._facts()), ""]
        for number, one in enumerate(self.recommendations, 1):
            lines += [f"{number}. {one.label}", f"     {one.flags}"]
            lines += [line for text in _reasons(one) for line in _wrapped(text)]
        if self.metric is not None:
            lines += ["", f"Tried on held-out rows ({self.metric}):"]
            lines += text_table([self._tried_titles(), *self._tried_rows()], right=range(1, 99))
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        choices = [
            (number, one.label, ". ".join(_reasons(one)), *_cost_cells(one.cost))
            for number, one in enumerate(self.recommendations, 1)
        ]
        shown = html_table(self._title(), self._facts())
        shown += html_table("Recommended", choices, ("", "method", "why", "seconds", "memory", "disk"))
        if self.metric is not None:
            shown += html_table(f"Tried on held-out rows ({self.metric})", self._tried_rows(), self._tried_titles())
        return shown

    def _title(self) -> str:
        return f"Advice for {self.facts.count} sources: {self.first.label}"

    def _facts(self) -> list[tuple[str, str]]:
        """What was looked at, in words: what each line is about, and the line."""
        facts = self.facts
        found = [("model", f"{KINDS[facts.kind]} of {facts.parameters:,} parameters; taken for: {self.rule}")]
        found.append(("sources", ", ".join(map(_source, facts.sources))))
        if facts.overlap is not None:
            found += _overlap(facts)
        rows = [f"{own.name} {own.rows:,}" for own in facts.sources if own.rows]
        found.append(("data", f"rows: {', '.join(rows)}" if rows else "none"))
        free = "unknown" if facts.free_bytes is None else readable_size(facts.free_bytes)
        found.append(("device", f"{facts.device}, free memory {free}"))
        return found + [("not known", text) for text in self.uncovered] + [("note", text) for text in self.notes]

    def _tried_titles(self) -> tuple[str, ...]:
        return ("merge", *self._tasks(), "score", "seconds", "peak MB")

    def _tasks(self) -> tuple[str, ...]:
        return tuple(own.name for own in self.facts.sources)

    def _tried_rows(self) -> list[tuple[str, ...]]:
        """A row for what was tried, best first, after one of the fine-tunes alone."""
        rows = []
        if self.individual is not None:
            alone = [f"{self.individual[task]:.4g}" for task in self._tasks()]
            rows.append(("fine-tunes alone", *alone, "", "", ""))
        for one in self.recommendations:
            if one.tried is None:
                continue
            own = one.tried
            seconds = "" if own.seconds is None else f"{'>' if own.resumed else ''}{own.seconds:.1f}"
            peak = "" if own.peak_bytes is None else f"{own.peak_bytes / 1e6:,.0f}"
            scores = [f"{own.scores[task]:.4g}" for task in self._tasks()]
            rows.append((one.label, *scores, f"{own.score:.4g}", seconds, peak))
        return rows


def _reasons(one: Recommendation) -> list[str]:
    cited = [f"[{grouped(one.cells)}]"] if one.cells else []
    return [*one.reasons, *cited, f"expected: {one.cost}"]


def _cost_cells(cost: Cost) -> tuple[str, str, str]:
    seconds = "not predicted" if cost.seconds is None else readable_time(cost.seconds)
    return seconds, readable_size(cost.peak_memory_bytes), readable_size(cost.disk_bytes)


def _said(value: Any) -> str:
    """An option's value on a command line."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _wrapped(text: str) -> list[str]:
    """A reason in lines for a terminal."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT, break_long_words=False, break_on_hyphens=False
    )


def _source(own: SourceFacts) -> str:
    if own.kind != "adapter":
        return f"{own.name} ({'full checkpoint' if own.kind == 'full' else 'anchors only'})"
    return f"{own.name} (adapter{', rank ' + ' and '.join(map(str, own.ranks)) if own.ranks else ''})"


def _overlap(facts: Facts) -> list[tuple[str, str]]:
    """How the task vectors lie, in words."""
    overlap = facts.overlap
    assert overlap is not None
    sizes = ", ".join(
        f"{name} {norm:.3g} ({part:.1%})"
        for name, norm, part in zip(overlap.names, overlap.norms, overlap.relative, strict=True)
    )
    share = "" if overlap.read >= 1 else f", in {overlap.read:.1%} of the entries, evenly spread"
    found = [("norms", f"{sizes} of the base's; longest by shortest {overlap.ratio:.2f}{share}")]
    cosines, conflicts = _span(overlap.cosines, "{:.2f}"), _span(overlap.conflicts, "{:.1%}")
    found.append(("overlap", f"cosines {cosines}; signs in conflict {conflicts} (chance 50%)"))
    if overlap.directions is not None:
        shared, own = _span(overlap.directions.shared, "{:.2f}"), overlap.directions
        found.append(
            ("directions", f"leading ones shared {shared} (chance {own.chance:.2f}), in {own.matrices} matrices")
        )
    return found


def _span(matrix: tuple[tuple[float, ...], ...], form: str) -> str:
    """The least and the largest entry of a matrix beside its diagonal, in words."""
    pairs = sorted(value for number, row in enumerate(matrix) for value in row[:number])
    least, most = form.format(pairs[0]), form.format(pairs[-1])
    return least if least == most else f"{least} to {most}"
