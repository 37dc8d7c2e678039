"""Runs a plan: block by block and tensor by tensor, in any number of processes, each result a finished file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from hf_fda.adapter_assembly import AdapterAssembly
from hf_fda.assembly import Assembly, CheckpointAssembly
from hf_fda.errors import InputError, RunError, UnreachableError
from hf_fda.given_anchors import check_base
from hf_fda.plans import Plan
from hf_fda.preparing.interface import Preparation
from hf_fda.preparing.registry import preparation_of
from hf_fda.processes import Team, together
from hf_fda.progress import Progress
from hf_fda.refusals import check_disk
from hf_fda.running import ROWS, Run
from hf_fda.sharing import check_same, check_shared
from hf_fda.store import Store, key_of
from hf_fda.streaming.taskvectors import TaskVectors, warn_of_equals
from hf_fda.version import versions


def run(plan: Plan, quiet: bool = False, team: Team | None = None) -> Path:
    """Do what a plan says. Work that an earlier run of the same plan finished is not done again.

    Processes that were launched together share the work; each of them makes the same plan and calls this.

    Args:
        plan: from `hf_fda.plan`.
        quiet: show no progress.
        team: the processes that make the plan come true together; those launched together if None.

    Returns:
        the output folder.

    Raises:
        InputError: when the disk has no room for the result, or processes see different files; nothing was written.
        RunError: when the work fails on the way; the same call goes on from there.
    """
    if team is None:
        with together(plan.device) as team:
            return run(plan, quiet, team)
    team.agree(lambda: check_disk(plan) if team.main else None)
    plan = team.agree(partial(_settled, plan))
    team.agree(lambda: check_base(plan.inputs, bool(plan.arguments.get("force")), fetch=True))
    with Progress(quiet=quiet or not team.main) as progress:
        try:
            mine = Run(plan, Store(plan.output), TaskVectors(plan.inputs, plan.device, plan.seed), team, progress)
            preparation = preparation_of(mine)
            check_same(_facts(mine), team)
            check_shared(plan.output, team)
            _merge(mine, preparation)
        except InputError as error:
            if error.agreed:
                raise
            # An input that was whole when the plan was made: a download that broke off
            raise RunError(f"{error}; the same call goes on from here") from None
    return plan.output


def _settled(plan: Plan) -> Plan:
    """A plan in which nothing is assumed."""
    try:
        return plan if plan.settle is None else plan.settle()
    except UnreachableError as error:
        raise RunError(f"{error}; the same call goes on from here") from None


def _merge(run: Run, preparation: Preparation) -> None:
    """Prepare, assemble, publish: each stage begins when all processes have ended the one before."""
    kind: type[Assembly] = CheckpointAssembly if run.plan.adapter is None else AdapterAssembly
    assembly = kind(run, preparation)
    writing = [assembly.piece(part) for part in assembly.parts]
    run.progress.expect(preparation.count + len(writing))
    written = run.finished(writing)
    unwritten = [part for part, done in zip(assembly.parts, written, strict=True) if not done]
    for pieces in preparation.stages({name for part in unwritten for name in assembly.tensors_in(part)}):
        run.work_off(pieces)
    run.work_off(writing, written)
    if run.team.main:
        assembly.publish()
    moved = run.team.gather(run.vectors.moved)
    if run.team.main:
        warn_of_equals(moved)


def _facts(run: Run) -> dict[str, str]:
    """What all processes must see alike, as hashes by what it is."""
    plan = run.plan
    weights = {_what(name): found for name, found in run.fingerprints.items()}
    targets = () if plan.adapter is None else plan.adapter.targets
    work = [unit.name for unit in plan.units], [shard.file for shard in plan.shards], [t.name for t in targets]
    return {
        "the arguments": key_of(plan.arguments),
        **weights,
        "the work to do": key_of(work),
        "the rows of data": key_of(run.data_prints),
        "versions": key_of(versions()),
    }


def _what(name: str) -> str:
    """What a fingerprint is of, in words."""
    if name == ROWS:
        return "the vocabularies"
    return f"the weights of source '{name}'" if name else "the base's weights"
