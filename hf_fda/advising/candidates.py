"""The merges that come into question, each checked as a plan, in the order in which they are recommended."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_fda.advising.advice import Recommendation
from hf_fda.advising.costing import Cost, cost_of
from hf_fda.advising.facts import Facts
from hf_fda.advising.rules import Proposal
from hf_fda.errors import InputError
from hf_fda.inputs import Inputs
from hf_fda.merge_methods import resolve_method
from hf_fda.planning import check_merge
from hf_fda.plans import Plan, readable_size
from hf_fda.prediction import readable_time
from hf_fda.refusals import check_wants_data
from hf_fda.settings import Settings
from hf_fda.store import key_of, new_folder

LONGEST = 80
"""Letters of a folder's name."""


@dataclass(frozen=True)
class Candidate:
    """A merge that can be made: its plan, what is said of it, and whether it is the user's own."""

    plan: Plan
    recommendation: Recommendation
    own: bool


@dataclass(frozen=True)
class Planner:
    """Makes plans of one merge by different methods.

    Args:
        inputs: base and sources.
        settings: where and how it is written; each plan gets a folder of its own in `settings.output`.
        data: rows by task as a user gives them, or the word for anchors; None: none.
        trust_remote_code: run code that comes with a tokenizer.
    """

    inputs: Inputs
    settings: Settings
    data: Mapping[str, Any] | str | None
    trust_remote_code: bool

    def plan(self, proposal: Proposal) -> Plan:
        """The plan of a proposal.

        Raises:
            InputError: when it cannot merge these sources.
        """
        config = resolve_method(proposal.method, proposal.options)
        data = self.data if proposal.data == "given" else proposal.data
        check_wants_data(config, data)
        folder = self.settings.output / slug(proposal.label)
        settings = replace(self.settings, output=new_folder(folder))
        return check_merge(self.inputs, config, settings, data, self.trust_remote_code)


def slug(label: str) -> str:
    """A folder's name for a label.

    >>> slug("fda initial=tsv scaling=1.75")
    'fda-initial-tsv-scaling-1.75'
    """
    name = re.sub(r"[^\w.]+", "-", label)
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{key_of(label)[:8]}"


def candidates(
    planner: Planner, proposals: Sequence[Proposal], own: Proposal | None, facts: Facts, seconds: float | None
) -> tuple[list[Candidate], list[str]]:
    """The proposals that can be done, best first: behind come those that do not fit into memory, or into the time.

    Args:
        planner: makes their plans.
        proposals: best first.
        own: one of the user's, which comes last unless it is among the proposals.
        facts: of the merge.
        seconds: that it may take, at most.

    Returns:
        the candidates, and in words what cannot be done.

    Raises:
        InputError: when the user's own cannot be done, or nothing else can.
    """
    planned, refused = list[tuple[Proposal, Plan]](), list[InputError]()
    for one in proposals:
        try:
            planned.append((one, planner.plan(one)))
        except InputError as error:
            refused.append(error)
    users = None
    if own is not None:
        checked = planner.plan(own)
        same = (one for one, plan in planned if plan.arguments == checked.arguments)
        users = next(same, own)
        if users is own:
            planned.append((own, checked))
    if not planned:
        raise refused[0]
    costs = [cost_of(plan) for _, plan in planned]
    closed = [one.closed for one, _ in planned]
    against = [_shortcomings(*own, facts, seconds) for own in zip(costs, closed, strict=True)]
    order = sorted(range(len(planned)), key=lambda number: len(against[number]))
    found = []
    for place, number in enumerate(order, 1):
        (one, plan), reasons = planned[number], (planned[number][0].why, *against[number])
        said = Recommendation(one.method, one.options, one.data, place, reasons, one.cells, costs[number])
        found.append(Candidate(plan, said, one is users))
    return found, [f"not possible here: {error}" for error in refused]


def _shortcomings(cost: Cost, closed: bool, facts: Facts, seconds: float | None) -> list[str]:
    """In words, what stands against a merge, perhaps a closed form: memory, time."""
    found = []
    if facts.free_bytes is not None and cost.peak_memory_bytes > facts.free_bytes:
        needed, free = readable_size(cost.peak_memory_bytes), readable_size(facts.free_bytes)
        found.append(f"placed behind: it needs {needed} of memory, and {facts.device} has {free} free")
    if seconds is not None and cost.seconds is not None and cost.seconds > seconds:
        found.append(f"placed behind: it takes more than the {readable_time(seconds)} that are allowed")
    if seconds is not None and cost.seconds is None and not closed:
        found.append("placed behind: how long it takes is not predicted")
    return found
