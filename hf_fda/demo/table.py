"""The demo's table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NOTE = (
    "Accuracy in percent on test images that no training and no choice has seen. Seconds of this run: training base\n"
    "and fine-tunes (first row), then each merge. The first fda row also constructs the anchors; the other fda rows\n"
    "reuse them. What an earlier run finished costs nothing."
)


@dataclass(frozen=True)
class Row:
    """One line: accuracy by task on the test rows, the mean accuracy on the validation rows, seconds.

    `folder` holds the merged model; the individual models, which are not one, have none.
    """

    label: str
    test: dict[str, float]
    validation: float
    seconds: float
    folder: Path | None = None

    @property
    def average(self) -> float:
        """Mean test accuracy over the tasks."""
        return sum(self.test.values()) / len(self.test)


def format_table(rows: Sequence[Row]) -> str:
    """The rows as text, accuracies in percent.

    >>> print(format_table([Row("linear", {"a": 0.5, "b": 1.0}, 0.7, 0.25)]).splitlines()[2])
    linear    50.0  100.0     75.0      0.2
    """
    tasks = list(rows[0].test)
    label = max(len(row.label) for row in rows) + 1
    widths = [max(len(task), 6) + 1 for task in tasks]
    head = f"{'model':<{label}}" + "".join(f"{task:>{width}}" for task, width in zip(tasks, widths, strict=True))
    lines = [f"{head}  average  seconds"]
    lines.append("-" * len(lines[0]))
    for row in rows:
        cells = "".join(f"{100 * row.test[task]:>{width}.1f}" for task, width in zip(tasks, widths, strict=True))
        lines.append(f"{row.label:<{label}}{cells}{100 * row.average:>9.1f}{row.seconds:>9.1f}")
    return "\n".join([*lines, "", NOTE])
