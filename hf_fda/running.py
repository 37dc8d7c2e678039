"""What every part of a run has at hand: the plan, the files, the task vectors, the other processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hf_fda.data.rows import TaskRows
from hf_fda.plans import Plan
from hf_fda.preparing.targets import with_targets
from hf_fda.processes import Team
from hf_fda.progress import Progress
from hf_fda.spending import Meter
from hf_fda.stages import Piece, find_finished, work_off
from hf_fda.store import Store
from hf_fda.streaming.taskvectors import TaskVectors

ROWS = "/rows"
"""The name, which no source can have, of the hash of what the vocabulary's rows are made of."""


@dataclass(frozen=True)
class Run:
    """One process's part in making a plan come true.

    `store` is its output folder, `vectors` reads base and sources, `team` are the processes that work together,
    `progress` whom they tell, and `meter` measures what it takes.
    """

    plan: Plan
    store: Store
    vectors: TaskVectors
    team: Team
    progress: Progress
    meter: Meter = field(default_factory=Meter)
    _rows: dict[str, TaskRows] = field(default_factory=dict)

    @property
    def spent(self) -> dict[str, Any] | None:
        """What this run took so far, as `Meter.spending`."""
        return self.meter.spending(self.plan.device, self.team.count)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """A hash of base and sources, by name; it changes when their weights do, or their vocabularies' rows."""
        inputs = self.plan.inputs
        named = {source.name: source.checkpoint.fingerprint() for source in inputs.moving}
        found = {"": inputs.base.fingerprint(), **named}
        rows = inputs.vocabulary.fingerprint
        return found | {ROWS: rows} if rows else found

    def rows(self, task: str) -> TaskRows:
        """The rows of data of one task, as its model takes them; what `writing_pieces` makes is made."""
        rows = self._encoded(task)
        return with_targets(rows, self.plan.output) if self.plan.data[task].lacks_targets else rows

    def _encoded(self, task: str) -> TaskRows:
        if task not in self._rows:
            self._rows[task] = self.plan.data[task].encode()
        return self._rows[task]

    @cached_property
    def data_prints(self) -> dict[str, str]:
        """A hash of every task's rows of data; all processes ask for it."""
        tasks = list(self.plan.data)
        return dict(zip(tasks, self.team.map(lambda task: self._encoded(task).fingerprint, tasks), strict=True))

    def finished(self, pieces: Sequence[Piece]) -> list[bool]:
        """Which pieces an earlier run finished."""
        found = find_finished(pieces, self.store, self.team)
        self.meter.count(found)
        return found

    def work_off(self, pieces: Sequence[Piece], finished: Sequence[bool] | None = None) -> None:
        """Do what is not finished, together with the other processes."""
        known = self.finished(pieces) if finished is None else finished
        work_off(pieces, known, self.store, self.team, self.progress)
